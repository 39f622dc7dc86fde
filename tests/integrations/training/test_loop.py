"""A training loop of one's own is followed as a Trainer's run is: the same figures under the same names."""

import pytest
import torch

import llava_patch
from llava_patch import AuxiliaryProbe, Gradients, Routing, get_handle, patch
from llava_patch.core.errors import SettingError
from llava_patch.integrations.training.auxiliary import follow as follow_auxiliary
from llava_patch.integrations.training.gradients import follow
from tests.support.models import hf_model

from .gradients.test_training import _with_regions
from .gradients.training_cases import STEPS, model, trainer

EVERY_OTHER = Gradients(window=2, every=2)


def made(probe):
    torch.manual_seed(5)  # of the auxiliary loss's head
    found = model(dropout=0.0)
    if probe:
        patch(found, probe=AuxiliaryProbe(weight=0.5, share=0.5))
    return found


def a_trainer(out, probe):
    found = trainer(out, made(probe))
    found.model_accepts_loss_kwargs = False  # the loss is then the model's own mean, as in a plain loop
    if probe:
        found.data_collator = _with_regions(found.data_collator)
        follow_auxiliary(found)
    return found


def test_names_stand_together_in_a_trainers_log_and_its_trackers():
    from transformers.integrations.integration_utils import rewrite_logs

    names = ["llava_patch/grad/main_norm", "llava_patch/probe/loss", "llava_patch/trainable_share"]
    assert list(rewrite_logs(dict.fromkeys(names, 1.0))) == [f"train/{name}" for name in names]


@pytest.mark.parametrize("probe", [False, True])
def test_a_loop_of_ones_own_gives_what_the_trainers_log_holds(probe, tmp_path):
    run, batches = a_trainer(tmp_path / "run", probe), []
    collate = run.data_collator
    run.data_collator = lambda records: batches.append(collate(records)) or batches[-1]
    follow(run, EVERY_OTHER)
    run.train()
    logged = [{k: v for k, v in one.items() if k.startswith("llava_patch/")} for one in run.state.log_history]

    other = a_trainer(tmp_path / "other", probe)
    other.create_optimizer_and_scheduler(STEPS)
    mine, optimizer, schedule, found = other.model.train(), other.optimizer, other.lr_scheduler, []
    with llava_patch.follow(mine, EVERY_OTHER) as loop:
        for batch in batches[:STEPS]:
            loop.micro_batch(lambda batch=batch: mine(**batch).loss)
            mine(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append(loop.step())
    assert found == logged[:STEPS] and len(found) == STEPS
    assert ["llava_patch/grad/cosine" in one for one in found] == [True, False] * 3
    assert all(("llava_patch/probe/model_loss" in one) == probe for one in found)
    assert sum("llava_patch/probe/loss" in one for one in found) == (4 if probe else 0)  # share
    weights = run.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in mine.state_dict().items() if "drawn" not in name)


def test_the_share_alone_and_the_count_of_steps_from_before():
    found = made(probe=True)
    handle = get_handle(found)
    handle.auxiliary.begin_step(7)
    with pytest.raises(RuntimeError, match="broken"), llava_patch.follow(found) as loop:
        assert loop.step() == {"llava_patch/trainable_share": handle.trained_share()}
        assert handle.auxiliary._step == 1
        raise RuntimeError("broken")
    assert handle.auxiliary._step == 7


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(SettingError, match="has no patch"), llava_patch.follow(hf_model()):
        pass
    found = model()
    with pytest.raises(SettingError, match=r"Gradients\.stop is not for"), llava_patch.follow(found, Gradients(stop=9)):
        pass
    routed = hf_model()
    patch(routed, routing=Routing(split=1))
    with pytest.raises(SettingError), llava_patch.follow(routed, Gradients()):
        pass
