"""Gradient reach against plain autograd, and the paper's claims about it."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from llava_patch import DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import InputError, LlavaPatchError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.reach import gradients
from llava_patch.measurements.reach import measurement as groups
from llava_patch.measurements.reach.gradients import SideOutput, training_step
from llava_patch.measurements.reach.measure import compare_reach, measure_reach, parts_of
from llava_patch.measurements.reach.measurement import Reach, ReachComparison, ReachResult
from llava_patch.routing import layers
from tests.support import fusions, models, tiny
from tests.support import routings as cases

SAMPLES = [(2, models.IMAGE, 5), (1, models.IMAGE, 9)]
ENTRIES = {
    "lf": (5,), "lf-split0": (5,), "lf-k2": (4,), "lf-sparse": (2,), "lf-sparse-last": (3,), "pc": (2, 3, 4, 5),
    "kv": (2, 3, 4, 5), "ideal": (),
}  # fmt: skip
"""Layers at which the side branch's output enters the stream that the loss depends on, for tests' settings."""


@pytest.fixture(params=["hf", "llava"])
def host(request, tower_folder):
    """As in the tests above this folder, where the fixture of this name gives more layers."""
    if request.param == "hf":
        return models.Host("hf", models.hf_model())
    pytest.importorskip("llava")
    return models.Host("llava", models.llava_model(tower_folder))


def samples(host, count=2, answer=3):
    """Only the last few tokens have labels, as in LLaVA's data."""
    found = [host.batch([SAMPLES[i]], seed=i, labels=True).inputs for i in range(count)]
    for sample in found:
        sample["labels"][:, :-answer] = -100
    return found


def measure(host, everything=False, count=2):
    return measure_reach(host.model, samples(host, count), Reach(count, everything), progress=False)


def by_hand(host, count=2):
    """Root mean square over samples of every parameter's gradient norm, by ordinary backward passes."""
    squares = {}
    host.model.train()
    for sample in samples(host, count):
        host.model.zero_grad(set_to_none=True)
        host.model(**sample, use_cache=False).loss.backward()
        for name, parameter in host.model.named_parameters():
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0.0) + float(parameter.grad.double().square().sum()) / count
    host.model.zero_grad(set_to_none=True)
    host.model.eval()
    return squares


def check_against_autograd(host, result):
    squares = by_hand(host)
    named = parts_of(find(host.model))
    flags = {n: p.requires_grad for n, p in host.model.named_parameters()}
    assert [f.part for f in result.parts] == list(dict.fromkeys(named.values()))
    for found in result.parts:
        names = [n for n, part in named.items() if part == found.part]
        asking = [n for n in names if flags[n]]
        arrived = [n for n in asking if n in squares]
        wanted = sum(squares[n] for n in arrived) ** 0.5
        assert (found.tensors, found.reached) == (len(asking), len(arrived)), found
        assert found.norm == pytest.approx(wanted, rel=1e-4, abs=1e-12), found
        state = "frozen" if not asking else "none" if not arrived else "nonzero" if wanted else "zero"
        assert found.state == state, found
    assert sum(f.parameters for f in result.parts) == sum(p.numel() for p in host.model.parameters())


@pytest.mark.parametrize("name", ["stock", *cases.VARIANTS])
def test_every_norm_is_autograds(host, name):
    with patch(host.model, **cases.VARIANTS.get(name, {})):
        check_against_autograd(host, measure(host))


@pytest.mark.parametrize("name", ["stock", "lf", "pc", "vtw"])
def test_as_if_everything_trained(host, name):
    """On llava the tower runs under no_grad unless something lifts it, which this does for the measurement."""
    with patch(host.model, **cases.VARIANTS.get(name, {})):
        result = measure(host, everything=True)
    assert all(f.asking == f.parameters for f in result.parts)
    states = [f.state for f in result.of(groups.BLOCK)]
    assert states == ["nonzero"] * 7 + ["none"]  # the main feature is block 7 of 8
    assert {f.state for f in result.of(groups.LAYER)} == {"nonzero"}
    assert result.of(groups.AFTER)[0].state == "none"


@pytest.mark.parametrize("freeze", [None, "none"])
@pytest.mark.parametrize("name", ENTRIES)
def test_which_layers_the_side_outputs_gradient_comes_through(host, name, freeze):
    routing = cases.VARIANTS[name]["routing"]
    if freeze is not None:
        routing = Routing(routing.variant, routing.split, routing.fusion_layers, routing.side_layers, freeze)
    with patch(host.model, routing=routing):
        result = measure(host)
    assert result.side.nonzero == ENTRIES[name]
    branch = result.of(groups.SIDE)
    if name == "ideal":
        assert result.side.layers == {models.LAYERS: 0.0} and result.side.norm == 0.0
        assert {f.state for f in branch} == {"zero"}
        assert "is exactly zero: the side branch cannot be trained" in result.summary()
    else:
        assert tuple(result.side.layers) == ENTRIES[name] and all(f.state == "nonzero" for f in branch)
        if len(ENTRIES[name]) == 1:
            assert result.side.layers[ENTRIES[name][0]] == pytest.approx(result.side.norm, rel=1e-6)


def test_an_image_position_that_is_read_itself_trains_even_ideal(host):
    """A caption's first word has the last image position before it: the published proof does not cover that data."""
    with patch(host.model, routing=Routing("ideal", split=2)):
        result = measure_reach(host.model, samples(host, answer=9), Reach(1), progress=False)
    assert result.side.nonzero == (models.LAYERS,) and result.reading_layers == ()
    assert "through the decoder's end (an image position is read itself" in result.summary()


class Keep(SideOutput):
    """Keeps the gradients themselves."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def _listen(self, states, name):
        states.register_hook(lambda g: self.kept.__setitem__(name, self.kept.get(name, 0) + g))


def autograds_own(host, sample):
    """The gradient at the output of the last side-branch layer, without anybody watching."""
    seen = []
    branch = find(host.model).decoder.side_branch
    hook = branch[-1].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    loss = host.model(**sample, use_cache=False).loss
    hook.remove()
    return torch.autograd.grad(loss, seen[0])[0], loss.detach()


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", [n for n in ENTRIES if n != "ideal"])
def test_the_layers_contributions_sum_to_the_gradient(host, name, pruned):
    settings = dict(cases.VARIANTS[name])
    if pruned:
        if name == "lf-split0":
            pytest.skip("FastV prunes from layer 1 on")
        settings["pruning"] = FastV(layer=1, ratio=0.5, training=True)
    sample = samples(host)[1]
    with patch(host.model, **settings) as handle, training_step(handle.anatomy, False):
        wanted, loss = autograds_own(host, sample)
        side = Keep()
        assert gradients.backward(host.model, sample, side) == loss  # watching changes no number
        total = side.kept.pop(side.WHOLE)
    assert wanted.abs().max() > 0 and tuple(side.kept) and set(side.kept) == set(ENTRIES[name])
    scale = float(wanted.abs().max())
    assert torch.allclose(sum(side.kept.values()), total, rtol=0, atol=1e-6 * scale)  # summed in another order
    assert torch.allclose(total, wanted, rtol=0, atol=1e-6 * scale)


def test_pruning_between_deep_layers_is_no_reader():
    """PC with FastV above its split: later layers read a part of the side output, and each is still counted once."""
    host = models.Host("hf", models.hf_model())
    settings = {"routing": Routing("pc", split=1), "pruning": FastV(layer=3, ratio=0.5, training=True)}
    with patch(host.model, **settings) as handle, training_step(handle.anatomy, False):
        sample = samples(host)[0]
        wanted, _ = autograds_own(host, sample)
        side = Keep()
        gradients.backward(host.model, sample, side)
        total = side.kept.pop(side.WHOLE)
    assert {k: v.shape[1] for k, v in side.kept.items()} == {1: 16, 2: 16, 3: 8, 4: 8, 5: 8}
    assert torch.allclose(total, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_one_path_in_fourteen():
    """The paper's 7B: 32 layers, split 18: PC passes the gradient on through 14 layers, LF through one, ideal none."""
    model = tiny.hf_model(layers=32)
    sample = tiny.hf_sample()
    sample["labels"] = sample["input_ids"].clone()
    sample["labels"][:, :-2] = -100
    found = compare_reach(model, lambda: [sample], ["lf", "pc", "kv", "ideal", "vtw"], 18, progress=False)
    assert [None if r.side is None else len(r.side.nonzero) for r in found.results] == [1, 14, 14, 0, None]
    assert found.of("pc").side.nonzero == tuple(range(18, 32)) and found.of("lf").side.nonzero == (31,)
    assert found.of("pc").side.norm == pytest.approx(found.of("kv").side.norm, rel=1e-4)  # PC = KV at text positions
    assert "LF 1, PC 14" in found.summary() and "under ideal: it cannot be trained there" in found.summary()


def test_a_detached_tap_cuts_its_blocks(host):
    """Taps at blocks 1, 5 and 8, main feature 7: block 8 is reached through its own tap alone."""
    for detach, last in ((3, "frozen"), (2, "nonzero")):
        fusion = SkipLinks(layers=(1, 5, 8), detach=detach, train_tower="all")
        with patch(host.model, fusion=fusion) as handle:
            fusions.randomise(handle)
            handle.apply_freeze()
            states = [f.state for f in measure(host).of(groups.BLOCK)]
            assert states == ["nonzero"] * 7 + [last], detach
            asked = [f.state for f in measure(host, everything=True).of(groups.BLOCK)]
            assert asked == ["nonzero"] * 7 + ["none" if last == "frozen" else last], detach


@pytest.mark.parametrize("fusion", [
    SkipLinks(stride=2), DeepStack(start=0, interval=1), DeepStack(start=0, interval=1, projector="shared"),
], ids=["skip", "deepstack", "shared"])  # fmt: skip
def test_fusions_and_routing_together(host, fusion):
    with patch(host.model, fusion=fusion, routing=Routing(split=4, freeze="none")) as handle:
        fusions.randomise(handle)
        result = measure(host)
        check_against_autograd(host, result)
    assert result.name == f"{type(fusion).__name__} + lf" and result.of(groups.PROJECTOR)[0].state == "nonzero"
    assert [f.state for f in result.of(groups.STACK)] == ["nonzero"] * (getattr(fusion, "projector", "") == "own")


def test_fastv_prunes_in_training_only_where_it_is_asked_to(host):
    norms = []
    for pruning in (None, FastV(2, 0.5), FastV(2, 0.5, training=True)):
        with patch(host.model, pruning=pruning):
            norms.append(measure(host).norm_of(groups.LAYER))
    assert norms[0] == norms[1] != norms[2]


def test_the_model_is_afterwards_as_it_was(host):
    with patch(host.model, routing=Routing(split=2)) as handle:
        anatomy = handle.anatomy
        parameters = list(host.model.parameters())
        parameters[3].grad = torch.ones_like(parameters[3])
        anatomy.layers[1].train()
        anatomy.layers[0].self_attn.attention_dropout = 0.5  # draws random numbers
        anatomy.layers[2].gradient_checkpointing = True
        state = copy.deepcopy(host.model.state_dict())
        before = (
            [p.requires_grad for p in parameters],
            [m.training for m in host.model.modules()],
            [sorted(vars(m)) for m in host.model.modules()],
            [len(p._post_accumulate_grad_hooks or ()) for p in parameters],
            torch.random.get_rng_state().tolist(),
        )
        for everything in (False, True):
            measure(host, everything)
        after = (
            [p.requires_grad for p in parameters],
            [m.training for m in host.model.modules()],
            [sorted(vars(m)) for m in host.model.modules()],
            [len(p._post_accumulate_grad_hooks or ()) for p in parameters],
            torch.random.get_rng_state().tolist(),
        )
        assert before == after and anatomy.layers[2].gradient_checkpointing is True
        assert [p.grad is not None for p in parameters] == [i == 3 for i in range(len(parameters))]
        assert bool((parameters[3].grad == 1).all())
        assert all(torch.equal(v, state[k]) for k, v in host.model.state_dict().items())
        with pytest.raises(InputError, match="labels"):  # also after an error
            measure_reach(host.model, [host.batch([SAMPLES[0]]).inputs], progress=False)
        assert [m.training for m in host.model.modules()] == before[1] and layers.observer() is None


def test_gradients_are_not_held_together(host, monkeypatch):
    held = []
    note = gradients.Arrivals.note

    def counting(self, name, gradient):
        held.append(sum(p.grad is not None for p in host.model.parameters()))
        note(self, name, gradient)

    monkeypatch.setattr(gradients.Arrivals, "note", counting)
    measure(host, everything=True)
    assert len(held) > 50 and max(held) == 1


def test_what_cannot_be_measured_is_said(host, monkeypatch):
    with monkeypatch.context() as inside, pytest.raises(SettingError, match="partitioned by DeepSpeed ZeRO-3"):
        inside.setattr("llava_patch.hosts.zero.is_partitioned", lambda parameters: True)
        measure(host)
    with pytest.raises(InputError, match="no samples"):
        measure_reach(host.model, [], progress=False)
    with pytest.raises(SettingError, match=r"Reach.samples = 0: expected an integer >= 1"):
        Reach(samples=0)
    with pytest.raises(SettingError, match=r"variants = lf, lg: expected different ones of lf, pc"):
        compare_reach(host.model, list, ["lf", "lg"], 2)
    with patch(host.model, routing=Routing(split=2)), pytest.raises(SettingError, match="is routed already"):
        compare_reach(host.model, list, ["lf"], 2)
    with torch.no_grad():
        find(host.model).norm.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="the loss is nan"):
        measure(host)


def test_results_go_through_json_and_are_drawn(host, tmp_path):
    with patch(host.model, routing=Routing(split=2)):
        result = measure(host)
    paths = result.save(tmp_path)
    values = json.loads(paths[0].read_text())
    assert ReachResult.from_dict(values) == result and values["summary"] == result.summary()
    head, rows = result.table()
    assert head[0] == "part" and ["decoder layers 2-4, text only", "no", "frozen"] in [[r[0], r[3], r[4]] for r in rows]
    assert any(r[0] == "decoder layer 5, fusion" for r in rows) and any(r[0] == "side branch layer 0" for r in rows)
    with patch(host.model, pruning=FastV(2, 0.5), routing=Routing("ideal", split=2)):
        pruned = measure(host)
        paths += pruned.save(tmp_path / "pruned")
    assert (pruned.name, pruned.variant) == ("ideal + FastV", "ideal")
    both = compare_reach(host.model, lambda: samples(host), ["pc", "lf", "ideal"], 2, progress=False)
    paths += both.save(tmp_path)
    assert ReachComparison.from_dict(json.loads(paths[4].read_text())) == both
    assert all(path.stat().st_size > 5_000 for path in paths if path.suffix == ".png")
    assert measure(host).save(tmp_path / "stock")[1].is_file()


def test_lora_is_a_part_of_its_own(host):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*layers\.[01]\.self_attn\.q_proj")
    model = peft.get_peft_model(host.model, config)
    result = measure_reach(model, samples(host), Reach(2), progress=False)
    found = [f for f in result.parts if f.part.kind == groups.LAYER + groups.LORA and f.asking]
    assert [f.part.number for f in found][-2:] == [0, 1] and {f.state for f in found} == {"nonzero"}
    assert any(row[0].startswith("decoder layers LoRA") or "LoRA" in row[0] for row in result.table()[1])


def test_the_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from llava_patch.cli.main import app
    from llava_patch.data import loaded
    from llava_patch.data.target import Target
    from llava_patch.patching.handle import get_handle

    model = tiny.hf_model()
    sample = tiny.hf_sample()
    sample["labels"] = sample["input_ids"].masked_fill(sample["input_ids"] == tiny.IMAGE_TOKEN, -100)
    subject = type("Subject", (), {"model": model})
    monkeypatch.setattr(loaded, "load_subject", lambda *args: subject)
    monkeypatch.setattr(Target, "samples", lambda *args, **kwargs: [sample])
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        model.save_pretrained(tmp_path / name)

    def run(*words):
        return CliRunner().invoke(app, ["reach", "model", *words])

    done = run("--samples", "1")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "wrote llava_patch_out/reach/model/reach.png" in done.output and "stock:" in done.output
    done = run("--variants", "lf,pc", "--split", "2")
    assert "LF 1, PC 3" in done.output and get_handle(model) is None
    assert json.loads((tmp_path / "llava_patch_out/reach/model/reach_variants.json").read_text())["facts"][
        "checkpoint"
    ] == str(tmp_path / "model")
    other = CliRunner().invoke(app, ["reach", "other", "--output", "llava_patch_out/reach/model"])
    assert isinstance(other.exception, LlavaPatchError)
    assert f"holds the results of {tmp_path / 'model'}, not of {tmp_path / 'other'}" in str(other.exception)
    assert "--split 2 belongs to --variants" in str(run("--split", "2").exception)
    done = run("--gin-param", "Reach.everything = True", "--gin-param", "Reach.samples = 1", "--output", "all")
    assert "would train" in done.output and json.loads((tmp_path / "all/reach.json").read_text())["samples"] == 1
