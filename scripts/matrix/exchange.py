"""Checkpoints of one environment for another: `exchange.py write FOLDER` there, `exchange.py read FOLDER` here.

What is written lies on a base beside the folder, which the first environment makes: a release of the hub is one.

Reading prints a line of JSON for each checkpoint: how far the logits are from those of the environment that wrote it.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava_patch import Routing, SkipLinks, get_handle, patch
from llava_patch.core.errors import HostError
from tests.support import checkpoints
from tests.support.release import write_fileset
from tests.support.tiny_train import TEXT, VISION

FUSION, ROUTING = SkipLinks(stride=2, detach=1), Routing(split=3)
KINDS = [(host, form) for host in ("hf", "llava") for form in ("adapter", "full")]


def write(folder: Path) -> None:
    """What both methods add to a base of each host, trained a little, in both forms."""
    base = folder.parent / "base"
    if not base.is_dir():
        write_fileset(base, vision=VISION, text=TEXT, vocab_size=512)
    bases = {"hf": base / "llava-1.5-small-hf", "llava": base / "llava-v1.5-small"}
    folder.mkdir(parents=True)
    logits = {}
    for host, form in KINDS:
        if not bases[host].is_dir():  # its class is refused where the base was made
            continue
        model = checkpoints.load(bases[host])
        try:
            handle = patch(model, fusion=FUSION)
        except HostError:  # refused here
            continue
        checkpoints.trained(handle.anatomy.projector)
        patch(model, routing=ROUTING)
        checkpoints.trained(handle.anatomy.decoder.side_branch)
        logits[f"{host} {form}"] = checkpoints.logits(model).contiguous()
        handle.save(folder / f"llava-{host}-{form}", form=form)
    save_file(logits, folder / "logits.safetensors")


def read(folder: Path) -> None:
    """Open what `write` has written, with the host's own loader."""
    expected = load_file(folder / "logits.safetensors")
    for host, form in KINDS:
        name = f"{host} {form}"
        if name not in expected:
            print(json.dumps({"checkpoint": name, "refused": "not written: the host is refused there"}), flush=True)
            continue
        try:
            model = checkpoints.load(folder / f"llava-{host}-{form}")
            handle = get_handle(model)
            if handle is None or (handle.fusion, handle.routing) != (FUSION, ROUTING):
                raise AssertionError("the model came back without its patch")
            found = checkpoints.logits(model).contiguous()
            row = {"far": float((found - expected[name]).abs().max()), "of": float(expected[name].abs().max())}
        except Exception as error:  # a refusal is an answer too; the table shows it
            row = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps({"checkpoint": name, **row}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
