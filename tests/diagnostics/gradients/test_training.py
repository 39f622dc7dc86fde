"""Gradient statistics under Hugging Face's Trainer: the run stays as it is, and what is measured is its gradient."""

import json
import random

import numpy as np
import pytest
import torch

from llava_patch.diagnostics.gradients import Gradients
from llava_patch.diagnostics.gradients.training import follow

from .training_cases import STEPS, history, model, trainer

EVERY_STEP = Gradients(window=2)


def _weights(made):
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16 and checkpointing": {"bf16": True, "gradient_checkpointing": True,
                               "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_stays_as_it_is_bit_for_bit(case, tmp_path):
    plain = trainer(tmp_path / "plain", **CASES[case])
    plain.train()
    ended = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measured = trainer(tmp_path / "measured", **CASES[case])
    attributes = set(vars(measured))
    following = follow(measured, EVERY_STEP)
    measured.train()
    assert torch.equal(ended[0], torch.get_rng_state())
    assert ended[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert history(plain) == history(measured) and len(history(plain)) == STEPS
    assert _same(_weights(plain), _weights(measured))
    assert not _same(_weights(plain), model().state_dict())  # it did train
    result = following.result
    assert [step.step for step in result.steps] == list(range(1, STEPS + 1)) and len(result.windows) == 3
    assert all(step.main > 0 and step.skip > 0 for step in result.steps)
    assert set(vars(measured)) - attributes <= {"_load_optimizer_and_scheduler", "_memory_tracker", "deepspeed"}
