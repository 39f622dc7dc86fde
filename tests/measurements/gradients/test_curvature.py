"""Curvature and what it predicts: against a quadratic loss whose Hessian is known, and the loss of both hosts."""

import dataclasses
import math

import pytest
import torch

from llava_patch import AuxiliaryProbe, SkipLinks, patch
from llava_patch.core.errors import SettingError
from llava_patch.integrations.training.gradients import check
from llava_patch.measurements.gradients.curvature import bends, moved
from llava_patch.measurements.gradients.decompose import block_parameters, decompose, measured_block
from llava_patch.measurements.gradients.measure import measure_gradients
from llava_patch.measurements.gradients.measurement import Gradients
from llava_patch.measurements.gradients.result import GradientsResult
from llava_patch.measurements.gradients.statistics import Window
from tests.support.fusions import randomise

from .test_decompose import batch_of, loss_of, same, snapshot
from .test_measure import batches_of

SIZE, COUNT = 24, 6


def quadratic(seed=0):
    """Its Hessian, float64 [24, 24], with eigenvalues of both signs, and main and skip gradients of six batches."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    hessian = basis @ torch.diag(torch.linspace(-0.5, 3.0, SIZE, dtype=torch.float64)) @ basis.T
    main, skip = torch.randn(2, COUNT, SIZE, generator=generator, dtype=torch.float64)
    return hessian, 0.3 + main, 2 * skip - 0.4 * main


def moments_of(hessian, main, skip):
    window = Window(len(main))
    for number, (m, s) in enumerate(zip(main, skip, strict=True), 1):
        f = m + s
        _, moments = window.add(number, m, f, bends=(float(f @ hessian @ f), float(m @ hessian @ m)))
    return moments


def test_predicted_gains_are_those_of_steps_on_the_quadratic_loss():
    """Exact: the loss has no third derivative. Roundings of float64 alone are left, 1e-9 of numbers of about 1."""
    hessian, main, skip = quadratic()
    full, gamma = main + skip, 0.05
    moments = moments_of(hessian, main, skip)

    def change(gradient, step):  # of the loss, whose gradient at this place is `gradient`
        return -gamma * gradient @ step + gamma**2 / 2 * step @ hessian @ step

    pairs = [(i, j) for i in range(COUNT) for j in range(COUNT) if i != j]

    def mean_change(steps):  # first order over different batches, second order over the steps themselves
        first = sum(-gamma * full[i] @ steps[j] for i, j in pairs) / len(pairs)
        second = sum(change(torch.zeros(SIZE, dtype=torch.float64), step) for step in steps) / COUNT
        return float(first + second)

    stretch = math.sqrt(full.square().sum() / main.square().sum())
    close = lambda value: pytest.approx(value, rel=1e-9, abs=1e-9)  # noqa: E731
    assert moments.stretch == close(float(stretch))
    assert moments.detach_gain_own(gamma) == close(mean_change(full) - mean_change(main))
    assert moments.same_length_gain(gamma) == close(mean_change(full) - mean_change(stretch * main))
    assert moments.curvature == close(float(sum(f @ hessian @ f for f in full) / full.square().sum()))


@pytest.mark.parametrize("bound", [0.3, 2.5])
def test_with_one_curvature_for_both_paths_condition_seven_is_the_whole_truth(bound):
    """H = L times the identity: (7) predicts the gain, its sign and the step size where it turns."""
    _, main, skip = quadratic(1)
    moments = moments_of(bound * torch.eye(SIZE, dtype=torch.float64), main, skip)
    assert moments.curvature == pytest.approx(bound) == moments.main_curvature
    for gamma in (1e-3, 0.1, 10.0):
        assert moments.detach_gain(gamma) == pytest.approx(moments.detach_gain_own(gamma), rel=1e-6, abs=1e-12)
        assert moments.detach_gain(gamma) == moments.detach_gain(gamma, moments.curvature)
        assert (moments.detach_gain(gamma) >= 0) == moments.holds(moments.curvature * gamma)
        assert moments.to_dict(None, gamma)["condition"] == moments.holds(moments.curvature * gamma)
        assert moments.to_dict(9.0, gamma)["condition"] == moments.holds(9.0 * gamma)  # a named L goes before
    even = 2 * moments.gain / (moments.curvature * moments.penalty)
    assert moments.detach_gain(even) == pytest.approx(0, abs=1e-9)


def test_a_main_gradient_as_long_as_the_full_one_and_along_it_gains_nothing():
    """The control's zero: skip = main, so the stretched main gradient is the full one, whatever the Hessian."""
    hessian, main, _ = quadratic(2)
    moments = moments_of(hessian, main, main)
    assert moments.stretch == pytest.approx(2)
    assert moments.same_length_gain(0.3) == pytest.approx(0, abs=1e-6 * moments.full_square)
    assert abs(moments.detach_gain_own(0.3)) > 0.1


def test_files_without_curvature_are_as_they_were_and_one_missing_step_leaves_a_window_without():
    hessian, main, skip = quadratic()
    window = Window(2)
    first, _ = window.add(1, main[0], main[0] + skip[0], bends=(1.0, 2.0))
    second, moments = window.add(2, main[1], main[1] + skip[1], bends=(math.nan, 1.0))
    assert first.full_bend == 1.0 and second.full_bend is None and moments.full_bend is None
    assert math.isnan(moments.curvature) and math.isnan(moments.same_length_gain(1.0))
    assert "full_bend" not in second.to_dict() and not {"curvature", "full_bend"} & set(moments.to_dict(None, 1.0))
    assert moments.to_dict(None, 1.0)["condition"] is None


@pytest.fixture
def patched(host):
    with patch(host.model, fusion=SkipLinks(stride=2)) as handle:
        randomise(handle)
        yield host, handle


def tame(handle):
    """Weights of a tower that is smooth enough for differences over a thousandth of them."""
    with torch.no_grad():
        for parameter in [*handle.anatomy.vision_model.parameters(), *handle.anatomy.projector.parameters()]:
            parameter.mul_(0.05 if parameter.dim() == 2 else 1)


@pytest.mark.parametrize("detach", [0, 3])
def test_the_curvature_is_what_losses_show(host, detach):
    """Against the second difference of the loss in float64; 5 %: losses round, and are no parabola.

    The same with every tap detached, which says how gradients are taken and not what the loss is.
    """
    with patch(host.model, fusion=SkipLinks(stride=2, detach=detach)) as handle:
        randomise(handle)
        tame(handle)
        work = loss_of(host, batch_of(handle, host))
        main, full = decompose(host.model, work, 2, "attached")
        before = snapshot(host.model)
        found = bends(host.model, work, 2, (full, main, torch.zeros_like(main)), 0.001)
        same(before, snapshot(host.model))
        weights = block_parameters(host.model, 2).values()
        distance = 0.003 * math.sqrt(sum(float(p.detach().square().sum()) for p in weights))
        for g, bend in zip((full, main), found, strict=False):
            losses = []
            for sign in (1, 0, -1):
                with moved(host.model, 2, sign * distance * g / g.norm()), torch.no_grad():
                    losses.append(loss64(host, handle))
            second = (losses[0] - 2 * losses[1] + losses[2]) / distance**2 * float(g.norm()) ** 2
            # llava's loss is one float32 number: a second difference keeps the rounding of its four terms, and of the
            # logits that they are means of (which on other processors came to 3 of these at most).
            rounding = 16 * abs(losses[1]) * 2**-24 if host.name == "llava" else 0
            noise = rounding / distance**2 * float(g.norm()) ** 2
            assert bend == pytest.approx(second, rel=0.05, abs=noise)
        assert found[2] == 0


def loss64(host, handle):
    inputs = batch_of(handle, host)
    labels = inputs["labels"]
    if host.name == "llava":  # its own places for the image: the loss is the mean over the same tokens
        return float(host.model(**inputs, use_cache=False).loss.double())
    logits = host.model(**inputs, use_cache=False).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:]))


def test_the_whole_tower_holds_each_block(patched):
    host, handle = patched
    assert measured_block(host.model, 0) == 0
    work = loss_of(host, batch_of(handle, host))
    names = list(block_parameters(host.model, 0))
    sizes = [p.numel() for p in block_parameters(host.model, 0).values()]
    whole = [dict(zip(names, g.split(sizes), strict=True)) for g in decompose(host.model, work, 0)]
    one = decompose(host.model, work, 2)
    inside = [name for name in names if ".layers.1." in name]
    for everything, part in zip(whole, one, strict=True):
        assert torch.equal(torch.cat([everything[name] for name in inside]), part)
    assert any("embeddings" in name and g.norm() > 0 for name, g in whole[0].items())
    above = [name for name in names if ".layers.7." in name]  # the main path ends at block 7
    assert above and all(not whole[1][name].any() for name in above)


def test_a_tower_whose_taps_are_all_detached_is_refused(host):
    with (
        patch(host.model, fusion=SkipLinks(stride=2, detach=3)),
        pytest.raises(SettingError, match="detaches every tap, so"),
    ):
        measured_block(host.model, 0)


def test_a_measurement_with_curvature(patched, tmp_path):
    host, _ = patched
    settings = Gradients(window=2, block=0, curvature=0.01, step_size=0.1)
    batches = batches_of(host, count=4)
    result = measure_gradients(host.model, batches, settings, tmp_path, progress=False)
    plain = measure_gradients(host.model, batches, dataclasses.replace(settings, curvature=None), progress=False)
    for ours, theirs in zip(result.windows, plain.windows, strict=True):
        assert dataclasses.replace(ours, full_bend=None, main_bend=None) == theirs
        assert math.isfinite(ours.curvature) and math.isfinite(ours.main_curvature)
    assert None not in result.conditions() and plain.conditions() == [None, None]
    assert len(result.gains()) == 2 and plain.gains() == []
    assert {"gain of detaching, by the condition", "curvature along the full gradient, L"} <= {
        r[0] for r in result.table()[1]
    }
    assert "the whole tower" in result.summary() and "predicted gain of detaching in one plain step" in result.summary()
    assert "Curvature" not in plain.summary()
    assert GradientsResult.read(tmp_path) == result and GradientsResult.from_dict(result.to_dict()) == result
    result.save(tmp_path)


def test_an_unfinished_window_keeps_its_curvature(tmp_path):
    hessian, main, skip = quadratic()
    whole, cut = Window(3), Window(3)
    for number in range(3):
        if number == 2:
            cut = Window.load(cut.save(tmp_path / "state.safetensors"), 3)
        given = (number + 1, main[number].float(), (main + skip)[number].float(), None, (number + 0.5, 2.0))
        _, ours = cut.add(*given)
        _, theirs = whole.add(*given)
    assert ours == theirs and ours.full_bend == 1.5


def test_the_auxiliary_loss_does_not_count_the_losses(tower_folder):
    from tests.support import models

    host = models.Host("hf", models.hf_model())
    handle = patch(host.model, fusion=SkipLinks(stride=2), probe=AuxiliaryProbe(weight=0.1))
    randomise(handle)
    host.model.train()
    work = loss_of(host, batch_of(handle, host))
    work()
    _, full = decompose(host.model, work, 2)
    bends(host.model, work, 2, (full,), 0.01)
    assert handle.auxiliary._without == 1


def test_where_curvature_is_refused(patched):
    host, handle = patched
    work = loss_of(host, batch_of(handle, host))
    _, full = decompose(host.model, work, 2)
    handle.anatomy.vision_parts().blocks[1].to(torch.bfloat16)
    with pytest.raises(SettingError, match="weights of 16 bits round away"):
        bends(host.model, work, 2, (full,), 0.01)
    with pytest.raises(SettingError, match=r"Gradients\.curvature = 0: expected a number above 0"):
        Gradients(curvature=0)


def test_a_training_run_is_sent_to_its_checkpoints(patched):
    from types import SimpleNamespace

    host, _ = patched
    arguments = SimpleNamespace(n_gpu=1, torch_compile=False, fp16=False, fsdp="", fsdp_config=None)
    with pytest.raises(SettingError, match="measure its checkpoints"):
        check(host.model, arguments, Gradients(curvature=0.003))
