"""Trains tiny patched models on the engines that shard: `engines.py FOLDER JOB ...`, each "host:engine:method".

Two ranks a job, forked from this process, which has imported everything: a job takes seconds. Its folder
FOLDER/host-engine-method gets result.json (losses, or the error of each rank) and weights.pt, the whole weights after
training by their stock names; where an adapter was saved, adapter/. The engine "one" is a process alone, on the same
samples.
"""

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import cpu_deepspeed  # noqa: F401  what DeepSpeed takes for granted of a GPU
import cpu_fsdp
import deepspeed
import torch
from transformers import Trainer, TrainingArguments

from llava_patch import DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.hosts import zero
from tests.support import models

PATIENCE = 60  # seconds; ranks that wait for one another wait for ever
STEPS = 2
_AUTO = "auto"


def _deepspeed(stage: int, offload: bool = False) -> dict:
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 10_000}
    if offload:
        optimization |= {"offload_optimizer": {"device": "cpu"}}
        optimization |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    return {"deepspeed": {
        "train_micro_batch_size_per_gpu": _AUTO, "train_batch_size": _AUTO, "gradient_accumulation_steps": _AUTO,
        "gradient_clipping": _AUTO, "bf16": {"enabled": _AUTO}, "fp16": {"enabled": _AUTO},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": optimization,
    }}  # fmt: skip


def _fsdp(version: int = 1, **more: object) -> dict:
    """From transformers 5.0 on the version counts, before it SECOND."""
    config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "sync_module_states": False, **more}
    config["version"] = version
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


ENGINES = {
    "one": {}, "zero3": _deepspeed(3), "zero3_offload": _deepspeed(3, offload=True), "fsdp": _fsdp(),
    "fsdp_flat": _fsdp(use_orig_params=False), "fsdp_checkpoints": _fsdp(activation_checkpointing=True),
    "fsdp2": _fsdp(2), "fsdp2_checkpoints": _fsdp(2, activation_checkpointing=True),
}  # fmt: skip
SECOND = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
"""What `accelerate launch` sets for fsdp_version: 2."""

KV = Routing(split=3, variant="kv", freeze="none")
METHODS = {
    "lf": {"routing": Routing(split=3)},
    "kv": {"routing": KV},
    "lf_fastv": {"routing": Routing(split=3, freeze="none"), "pruning": FastV(2, 0.5, training=True)},
    "skip": {"fusion": SkipLinks(stride=2, train_tower="all", tower_lr=0.02)},
    "deep_kv": {"fusion": DeepStack(taps=(2, 4), start=0, interval=1), "routing": KV},
}


class Samples(torch.utils.data.Dataset):
    """16 samples; of `llava`, which gives a batch without an image a dummy, every second one has no image."""

    def __init__(self, host: models.Host) -> None:
        self._host = host

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        parts = (2 + index % 3, models.IMAGE, 6 + index % 2)
        if self._host.name == "llava" and index % 2:
            parts = (9 + index % 4,)
        return self._host.batch([parts], seed=index, labels=True).inputs


def _collate(rows: list[dict]) -> dict:
    batch = {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "images") if name in rows[0]}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        longest = max(row[name].shape[1] for row in rows)
        pad = torch.nn.functional.pad
        batch[name] = torch.cat([pad(row[name], (0, longest - row[name].shape[1]), value=fill) for row in rows])
    return batch


def _train(folder: Path, host_name: str, engine: str, method: str, rank: int) -> None:
    if engine.startswith("fsdp"):
        cpu_fsdp.install()
        os.environ |= SECOND if engine.startswith("fsdp2") else {}
    model = models.hf_model() if host_name == "hf" else models.llava_model(folder.parent)
    model.config._name_or_path = "hub/base"
    model.config.use_cache = False  # as training scripts set it
    getattr(model.config, "text_config", model.config).use_cache = False
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=2 if engine == "one" else 1,
        max_steps=STEPS, learning_rate=0.05, lr_scheduler_type="constant", optim="sgd", logging_steps=1, report_to=[],
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True, ddp_timeout=PATIENCE,
        gradient_checkpointing=engine == "zero3", use_cpu=not engine.startswith(("zero", "fsdp")),
        **ENGINES[engine],
    )  # fmt: skip
    if engine.startswith("zero3"):
        deepspeed.zero.Init(module=model, config_dict_or_path=arguments.hf_deepspeed_config.config)
    handle = patch(model.train(), **METHODS[method])
    trainer = Trainer(model, arguments, _collate, Samples(models.Host(host_name, model)))
    trainer.train()
    if engine.startswith("fsdp"):
        first = type(trainer.model).__name__ == "FullyShardedDataParallel"
        assert first != engine.startswith("fsdp2"), f"{engine} ran as {type(trainer.model).__name__}"
        weights = trainer.accelerator.get_state_dict(trainer.model)
        with zero.whole_model(trainer.model):
            if rank == 0 or not zero.in_pieces(model):
                handle.save(folder / "adapter")
    else:
        with zero.gathered(model.parameters()):
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "result.json").write_text(json.dumps({"losses": losses}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _rank(folder: Path, job: list[str], number: int, port: int) -> None:
    """A rank's process: it ends here."""
    code = 1
    try:
        log = os.open(folder / f"rank{number}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job[1] != "one":
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        _train(folder, *job, number)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        (folder / f"error{number}.json").write_text(json.dumps(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(code)


def run(root: Path, job: list[str]) -> None:
    """One job to its end, or to the end of patience."""
    folder = root / "-".join(job)
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for number in range(1 if job[1] == "one" else 2):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            _rank(folder, job, number, port)
    end, waiting = time.monotonic() + PATIENCE, list(ranks)
    while waiting and time.monotonic() < end:
        waiting = [pid for pid in waiting if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        time.sleep(0.02)
    for pid in waiting:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    if not (folder / "result.json").exists():
        errors = [json.loads(path.read_text()) for path in sorted(folder.glob("error*.json"))]
        (folder / "result.json").write_text(json.dumps({"errors": errors or ["no end: ranks wait for one another"]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    models.llava_model(Path(sys.argv[1]))  # the first one makes the tower's folder, which moves the random numbers on
    for text in sys.argv[2:]:
        run(Path(sys.argv[1]), text.split(":"))
