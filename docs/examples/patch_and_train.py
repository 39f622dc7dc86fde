"""Patch a model and watch what trains: shares, which parameters get gradients, undo.

    python patch_and_train.py [CKPT] [DATA]

CKPT is a LLaVA checkpoint of either host (default: a tiny one with random weights), DATA what R-Probe and the
diagnostics take: LLaVA's JSON, pages with text, images with transcripts (default: rendered pages).
"""

import sys
from collections import Counter

import torch
from tiny import tiny_llava

import llava_patch
from llava_patch import Routing, SkipLinks, patch

checkpoint = sys.argv[1] if len(sys.argv) > 1 else tiny_llava()
data = sys.argv[2] if len(sys.argv) > 2 else ""

subject = llava_patch.load_subject(checkpoint)
model = subject.model
samples = subject.samples(data, count=2, answers=True)  # keyword arguments of model.forward, with labels
depth = model.config.get_text_config().num_hidden_layers


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    parts = {"side_branch": "side branch", "vision_tower": "vision tower", "projector": "projector"}
    return next((part for word, part in parts.items() if word in name), "language model")


def train(name: str, **methods) -> None:
    """Two AdamW steps under a patch; prints what trains, what got gradients, and whether the patch came off."""
    print(f"\n{name}")
    with torch.no_grad():
        before = model(**samples[0]).logits
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with patch(model, **methods) as handle:
        print(f"  {handle.report()}")
        optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-3))
        for step, sample in enumerate(samples, 1):
            loss = model(**sample).loss
            loss.backward()
            reached = Counter(part_of(n) for n, p in model.named_parameters() if p.grad is not None and p.grad.any())
            optimizer.step()
            optimizer.zero_grad()
            print(f"  step {step}: loss {loss.item():.3f}; tensors with a gradient: {dict(sorted(reached.items()))}")
    # The patch is off. Its own weights are gone with it; what it trained of the model's stays trained.
    with torch.no_grad():
        after = model(**samples[0]).logits
    changed = Counter(part_of(n) for n, value in model.state_dict().items() if not torch.equal(value, weights[n]))
    print(f"  after undo: same logits: {torch.equal(before, after)}; weights changed: {dict(sorted(changed.items()))}")
    model.load_state_dict(weights)


model.requires_grad_(True)  # what a full fine-tuning trains
split = depth // 2
train("DPVR-LF: the side branch alone trains", routing=Routing(split=split))
train("Skip-Links: projector and language model train", fusion=SkipLinks(stride=2))
train("Skip-Links, the vision tower too", fusion=SkipLinks(stride=2, train_tower="all"))
train("both, nothing frozen", fusion=SkipLinks(stride=2), routing=Routing(split=split, freeze="none"))
