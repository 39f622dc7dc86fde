"""Two processes against one; all that needs two is done in one pair of them, because each costs seconds to start."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llava_patch.core import parallel
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.keys import make_key
from llava_patch.measurements.rprobe.resume import TrainingFolder
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.train import choose_trained, train_probe
from llava_patch.probe.decoder import ProbeDecoder
from tests.support.paths import ROOT
from tests.support.probes import Characters, made_up, processor, tiny_model

from .test_resume import Interrupted, Stopping

SETTINGS = RProbe(steps=6, batch_size=7, save_every=2)
WHOLE = RProbe(steps=4, batch_size=3, train_pages=6, heldout_pages=3, threshold=1e-6)
# Sums of float32 numbers in another order; six steps of Adam carry a difference of 1e-7 on.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def fitted(settings, work=None, wrap=lambda data: data):
    data = made_up(20, 1, "true")
    decoder = ProbeDecoder(find(tiny_model()), data.grid)
    choose_trained(decoder, settings)
    if work is not None:
        work = TrainingFolder(work, make_key(decoder, "data", data.text.table, settings, 1e-2))
    losses = train_probe(decoder, wrap(data), settings, 1e-2, work=work)
    return losses, decoder.head[0].weight.detach().clone(), decoder.layers[0].mlp.down_proj.weight.detach().clone()


def numbers(found):
    return [found[0], *(tensor.double().sum().item() for tensor in found[1:])]


def error_of(work) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def both(folder: Path) -> dict:
    """What one of two processes does and finds."""
    rank = dist.get_rank()
    found: dict = {"rank": parallel.rank(), "world": parallel.world()}
    found["shares"] = [list(parallel.share(n)) for n in (7, 2, 1, 0)]
    found["rows"] = parallel.gather_rows([f"{rank}:{i}" for i in parallel.share(5)])
    found["seven"] = numbers(fitted(SETTINGS))
    found["one"] = numbers(fitted(dataclasses.replace(SETTINGS, batch_size=1)))
    found["lora"] = numbers(fitted(dataclasses.replace(SETTINGS, trained="lora")))

    fail_on = lambda which: lambda data: Stopping(data, 3 if rank == which else 99)  # noqa: E731
    found["fails"] = [error_of(lambda: fitted(SETTINGS, wrap=fail_on(which))) for which in (0, 1)]
    found["diverges"] = error_of(
        lambda: fitted(dataclasses.replace(SETTINGS, clip=1e30, lr=1e30, warmup=0.0), None, huge)
    )

    def outside():
        with parallel.guard():
            with parallel.guard():  # only the outermost one speaks
                if rank == 1:
                    raise ValueError("no such image")
            parallel.exchange(None)

    found["outside"] = error_of(outside)
    found["interrupted"] = error_of(lambda: fitted(SETTINGS, folder / "work", fail_on(1)))
    found["resumed"] = numbers(fitted(SETTINGS, folder / "work"))
    found["left"] = sorted(path.name for path in (folder / "work").iterdir())
    result = run_rprobe(tiny_model(), processor(), Characters(), WHOLE, progress=False)
    found["result"] = [result.mse, result.psnr, result.losses[-1], result.facts["processes"]]
    other = dataclasses.replace(WHOLE, clip=1.0 + rank)
    found["different"] = error_of(lambda: run_rprobe(tiny_model(), processor(), Characters(), other, progress=False))
    found["still in step"] = parallel.exchange(rank)
    return found


def huge(data):
    data.shards[0].tensors["pixels"].fill_(1e30)
    return data


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    script = (
        "import json, os, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from llava_patch.core import parallel; from tests.measurements.rprobe.test_parallel import both\n"
        "folder = Path(sys.argv[1])\n"
        "with parallel.processes():\n"
        "    found = both(folder)\n"
        "(folder / f'{os.environ[\"RANK\"]}.json').write_text(json.dumps(found))\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    (folder / "both.py").write_text(script)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(folder / "both.py"), str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "LLAVA_PATCH_CACHE": str(folder / "c")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_work_is_divided_and_rows_come_back_in_order(pair):
    assert [found["rank"] for found in pair] == [0, 1] and pair[0]["world"] == 2
    assert pair[0]["shares"] == [[0, 1, 2], [0], [], []]
    assert pair[1]["shares"] == [[3, 4, 5, 6], [1], [0], []]
    assert pair[0]["rows"] == pair[1]["rows"] == ["0:0", "0:1", "1:2", "1:3", "1:4"]


@pytest.mark.parametrize("name, change", [("seven", {}), ("one", {"batch_size": 1}), ("lora", {"trained": "lora"})])
def test_two_processes_give_the_numbers_of_one(pair, name, change):
    alone = numbers(fitted(dataclasses.replace(SETTINGS, **change)))
    for found in pair:
        for one, two in zip(alone, found[name], strict=True):
            torch.testing.assert_close(torch.tensor(two), torch.tensor(one), **CLOSE)
    assert pair[0][name] == pair[1][name]  # the same decoder, to the bit
    assert alone[0][-1] != alone[0][0]


def test_a_failure_on_one_process_ends_all_with_its_message(pair):
    for which in (0, 1):
        assert pair[which]["fails"][which].startswith("Interrupted")
        assert f"process {which} of 2 failed: Interrupted" in pair[1 - which]["fails"][which]
    assert pair[1]["outside"] == "ValueError: no such image"
    assert pair[0]["outside"].endswith("process 1 of 2 failed: ValueError: no such image")
    for found in pair:
        assert "R-Probe's loss is inf at step 1: lower RProbe.lr" in found["diverges"]
        assert "process 1 and process 0 do not run the same: RProbe.clip was 2.0" in found["different"]
        assert found["still in step"] == [0, 1]


def test_two_processes_resume_to_the_same_bits(pair):
    assert pair[1]["interrupted"].startswith("Interrupted")
    assert pair[0]["resumed"] == pair[1]["resumed"] == pair[0]["seven"]
    assert pair[0]["left"] == ["decoder.safetensors"]


def test_a_whole_run_is_one_result(pair):
    alone = run_rprobe(tiny_model(), processor(), Characters(), WHOLE, progress=False)
    assert pair[0]["result"] == pair[1]["result"]
    assert pair[0]["result"] == pytest.approx([alone.mse, alone.psnr, alone.losses[-1], 2], rel=1e-4)


def test_alone_nothing_is_divided_and_errors_pass():
    assert list(parallel.share(3)) == [0, 1, 2] and parallel.gather_rows([1, 2]) == [1, 2]
    with parallel.processes(), parallel.guard():
        assert not dist.is_initialized()
    with pytest.raises(Interrupted), parallel.guard():
        raise Interrupted
