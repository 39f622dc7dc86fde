"""The FLOP model against PyTorch's counter, part by part, and its table."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_patch import FastV, Routing, patch
from llava_patch.core.errors import SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.base import default_split
from llava_patch.measurements.flops import shape as shapes
from llava_patch.measurements.flops.count import (
    Mode,
    Prompt,
    cache_bytes,
    chooser_products,
    count_flops,
    decoder_positions,
    program_of,
    total,
)
from llava_patch.measurements.flops.result import FlopsResult, measure_flops
from llava_patch.routing.cache import RoutedCache
from llava_patch.routing.cache import cache_bytes as held_bytes
from tests.support import fusions, models, tiny, zoo
from tests.support import routings as cases
from tests.support.models import set_attention

COUNTED = [name for name in cases.ALL if "sparse" not in name]  # whose raters are as many as the words make them
GROUPED = {k: v for k, v in cases.ALL.items() if k in ("lf", "lf-k2", "pc", "kv", "ideal", "vtw", "fastv", "lf+fastv")}


@pytest.fixture(params=["hf", "llava"])
def host(request, tower_folder):
    """As in the tests above this folder, where the fixture of this name gives more layers."""
    if request.param == "hf":
        return models.Host("hf", models.hf_model())
    pytest.importorskip("llava")
    return models.Host("llava", models.llava_model(tower_folder))


class Counted:
    """What the counter saw, by module of the model."""

    def __init__(self, model, run):
        names = {id(m): n for n, m in model.named_modules(remove_duplicate=False)}
        self.parts = find(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        root = type(model).__name__
        self.counts = {k.removeprefix(f"{root}."): v for k, v in counter.flop_counts.items()}
        self.total = sum(counter.flop_counts["Global"].values())
        self._names = names

    def of(self, module):
        return sum(self.counts.get(self._names[id(module)], {}).values())

    def layer(self, module):
        """A decoder layer, its projections apart from its own call included (kv, the lean last layer)."""
        linears = sum(self.of(m) for m in module.modules() if isinstance(m, torch.nn.Linear))
        inside = self.counts.get(self._names[id(module.self_attn)], {})
        products = Counter({str(k): v for k, v in inside.items()})
        return linears, products["aten.bmm"]


def eager(host):
    set_attention(host.model, "eager")
    models.set_attention(find(host.model).vision_model, "eager")


def check(model, settings, inputs, prompt, mode, **kwargs):
    """Exactly the counter's numbers for every part; the rotary angles are all that it counts besides."""
    with patch(model, **settings) as handle:
        shape = shapes.shape_of(model)
        program = program_of(shape, settings.get("routing"), settings.get("pruning"))
        wanted = count_flops(shape, program, prompt, mode)
        seen = Counted(model, lambda: model(**inputs, **kwargs))
        anatomy, layers = handle.anatomy, handle.anatomy.layers
        choosers = chooser_projections(shape, program, prompt, mode)
        for number, layer in enumerate(layers):
            linears, attention = seen.layer(layer)
            own = wanted.layers[number]
            linears -= choosers.get(number, 0)
            assert (linears, attention) == (own.projections + own.feed_forward, own.attention), number
        side = getattr(anatomy.decoder, "side_branch", [])
        assert sum(sum(seen.layer(layer)) for layer in side) == wanted.side.total
        shares = getattr(settings.get("fusion"), "projector", "") == "shared"  # then the counter has seen the taps too
        assert seen.of(anatomy.projector) * (1 if shares else 1 + shape.stacked) == wanted.projector
        assert seen.of(anatomy.lm_head) == wanted.head
        vision = anatomy.vision_model
        assert seen.of(vision) == wanted.tower
        rotary = seen.of(anatomy.decoder.rotary_emb)
    assert seen.total == wanted.total + rotary
    assert rotary < 0.01 * seen.total
    return wanted


def chooser_projections(shape, program, prompt, mode):
    """What pruning has a layer project apart from the layer's own call, by layer."""
    choosers = decoder_positions(program, prompt.text, prompt.image, mode).choosers
    reads = [layer - (not program.pruning.READS_NEXT) for layer in program.stages]
    row = 2 * prompt.batch * shape.decoder.heads * shape.decoder.head_dim
    return {
        layer: total(chooser_products(shape.decoder, at, prompt.batch)) - row * at.held
        for layer, at in zip(reads, choosers, strict=bool(choosers))
    }


def equal_samples(host, text, batch):
    made = host.batch([(3, models.IMAGE, text - 3)] * batch)
    return made.inputs, Prompt(text, host.tokens, batch)


@pytest.mark.parametrize("text, batch", [(5, 1), (29, 2)])
@pytest.mark.parametrize("name", ["stock", *COUNTED])
def test_a_forward_pass_costs_what_the_counter_counts(host, name, text, batch):
    eager(host)
    inputs, prompt = equal_samples(host, text, batch)
    check(host.model, cases.ALL.get(name, {}), inputs, prompt, Mode.FORWARD, use_cache=False)


@pytest.mark.parametrize("name", ["stock", *COUNTED])
def test_generations_prefill_and_token_cost_what_the_counter_counts(name):
    """The lean last layer, and the keys that a token finds: Hugging Face's host, as its generation calls it."""
    host = models.Host("hf", models.hf_model("eager"))
    eager(host)
    inputs, prompt = equal_samples(host, 11, 1)
    settings = cases.ALL.get(name, {})
    check(host.model, settings, inputs, prompt, Mode.PREFILL, use_cache=True, logits_to_keep=1)
    with patch(host.model, **settings), torch.no_grad():
        shape = shapes.shape_of(host.model)
        program = program_of(shape, settings.get("routing"), settings.get("pruning"))
        cache = host.model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        own = cache.nbytes() if isinstance(cache, RoutedCache) else held_bytes(cache)
        assert own == cache_bytes(shape, program, prompt, value_bytes=4)
        token = {
            "input_ids": torch.full((1, 1), 7),
            "attention_mask": torch.ones(1, prompt.text + prompt.image + 1, dtype=torch.long),
        }
        seen = Counted(host.model, lambda: host.model(**token, past_key_values=cache, use_cache=True, logits_to_keep=1))
        wanted = count_flops(shape, program, prompt, Mode.DECODE)
        rotary = seen.of(find(host.model).decoder.rotary_emb)
    assert seen.total == wanted.total + rotary


def test_the_llava_packages_generation_answers_every_position_unless_it_is_routed(tower_folder):
    pytest.importorskip("llava")
    host = models.Host("llava", models.llava_model(tower_folder, "eager"))
    inputs, prompt = equal_samples(host, 9, 1)
    for settings in ({}, {"routing": Routing(split=2)}):
        with patch(host.model, **settings):
            shape = shapes.shape_of(host.model)
            program = program_of(shape, settings.get("routing"), None)
            heads: list[int] = []
            hook = find(host.model).lm_head.register_forward_pre_hook(
                lambda m, args, to=heads: to.append(args[0].shape[1])
            )
            ids = inputs["input_ids"]
            host.model.generate(ids, images=inputs["images"], max_new_tokens=1, do_sample=False)
            hook.remove()
            wanted = count_flops(shape, program, prompt, Mode.PREFILL)
        assert wanted.head == 2 * heads[0] * shape.decoder.hidden * shape.decoder.vocabulary


@pytest.mark.parametrize("name", ["stock", "lf"])
def test_tiles_of_which_tokens_are_dropped(name, tower_folder):
    """Anyres on llava: five tiles of 16 tokens a sample, of which more than a tile's are cut away as padding."""
    pytest.importorskip("llava")
    host = models.Host("llava", models.llava_model(tower_folder))
    eager(host)
    config = host.model.config
    config.image_aspect_ratio, config.mm_patch_merge_type = "anyres", "spatial_unpad"
    config.image_grid_pinpoints = [[112, 112]]
    host.decoder.image_newline = torch.nn.Parameter(torch.randn(64))
    inputs = {
        "input_ids": torch.tensor([[3, 4, -200, 5, 6, 7]] * 2), "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "images": [torch.randn(5, 3, 56, 56)] * 2, "image_sizes": [(112, 56)] * 2,
    }  # fmt: skip
    image = 16 + 4 * (8 + 1)  # 8 x 8 cut to 4 rows of 8 and a newline each
    prompt = Prompt(5, image, 2, tiles=5)
    wanted = check(host.model, cases.ALL.get(name, {}), inputs, prompt, Mode.FORWARD, use_cache=False)
    shape = shapes.shape_of(host.model)
    assert count_flops(shape, program_of(shape, None, None), Prompt(5, image, 2)).tower == wanted.tower * 4 / 5


@pytest.mark.parametrize("name", ["stock", *GROUPED])
def test_grouped_query_attention(name):
    model = tiny.hf_model(layers=6, attention="eager")
    sample = tiny.hf_sample(before=3, after=8)
    check(model, cases.ALL.get(name, {}), sample, Prompt(11, 4), Mode.FORWARD, use_cache=False)


@pytest.mark.parametrize("name", fusions.ALL)
def test_fusions_change_projector_and_tokens(host, name):
    eager(host)
    settings = {"fusion": fusions.ALL[name]}
    host.tokens = fusions.TOKENS.get(name, models.TOKENS)
    inputs, prompt = equal_samples(host, 5, 2)
    check(host.model, settings, inputs, prompt, Mode.FORWARD, use_cache=False)


@pytest.mark.parametrize("kind", zoo.NAMES)
def test_every_known_tower(kind):
    """Within 1 %: some towers have small products of their own (rotary angles, a resized grid of positions)."""
    if kind == "timm":
        pytest.importorskip("timm")
    vision = zoo.ours(kind)
    if hasattr(vision, "set_attn_implementation") and kind != "timm":
        vision.set_attn_implementation("eager")
    shape = shapes.tower_shape(vision)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vision(torch.randn(2, 3, zoo.SIDE, zoo.SIDE), output_hidden_states=True)
    full = shapes.ModelShape("", "hf", shapes.named("small").decoder, shape, (), 16)
    wanted = count_flops(full, program_of(full, None, None), Prompt(1, 16, 2)).tower
    attention = 0 if kind != "timm" else 2 * 2 * 2 * shape.blocks * shape.tokens**2 * shape.attention_width
    assert wanted - attention == pytest.approx(counter.get_total_flops(), rel=0.01)  # timm runs sdpa, not counted


def test_the_numbers_of_7b():
    """Known by hand: LLaVA-1.5 7B, split 18, K = 1, 576 + 64 tokens."""
    result = measure_flops(shapes.named("7b"), split=18)
    stock, lf, ideal, kv = (result.row(name) for name in ("stock", "LF, K = 1", "ideal", "KV"))
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    layer = 2 * 640 * weights + 4 * 640 * 640 * 4096
    assert [row.total for row in stock.forward.layers] == [layer] * 32
    text = 2 * 64 * weights + 4 * 64 * 64 * 4096
    assert [row.total for row in lf.forward.layers] == [layer] * 18 + [text] * 13 + [layer]
    assert lf.forward.side.total == 2 * 576 * weights + 4 * 576 * 576 * 4096
    assert lf.deep_image / stock.deep_image == 1 / 14  # 13/14 of ideal's saving
    assert ideal.deep_image == 0 < kv.deep_image < stock.deep_image
    assert 0.31 < result.saved(lf) < 0.32 and 0.34 < result.saved(lf, "prefill") < 0.35
    assert lf.cache_bytes / stock.cache_bytes < 0.65
    assert result.summary().startswith(
        "LLaVA-1.5 7b, 576 image and 64 text tokens: LF, K = 1 with split 18 takes 6.2 of"
    )
    assert result.summary().endswith("The DPVR paper gives 25-30 % of forward FLOPs for LLaVA-1.5 7B.")
    assert "paper" not in measure_flops(shapes.named("13b")).summary()


def test_a_result_goes_through_json_and_is_drawn(tmp_path):
    own = (Routing(split=3, fusion_layers=(5, 7)), FastV(2, 0.75))
    result = measure_flops(shapes.named("small"), [Prompt(64), Prompt(128, 64, 2)], own=own)
    paths = result.save(tmp_path)
    assert FlopsResult.from_dict(json.loads(paths[0].read_text())) == result
    assert paths[1].stat().st_size > 10_000
    head, rows = result.table(1)
    assert rows[0][0] == "stock" and rows[-1][0] == "as configured" and all(len(row) == len(head) for row in rows)
    assert result.split == 3 and "lf with split 3 and FastV(2, 0.75)" in result.summary()


def test_prompts_and_splits_are_checked():
    assert [default_split(n) for n in (32, 8)] == [18, 4]
    with pytest.raises(SettingError, match="text = 0: expected an integer from 1 on"):
        Prompt(0)
    with pytest.raises(SettingError, match="tiles = 0: expected an integer from 1 on, or None"):
        Prompt(tiles=0)
    with pytest.raises(SettingError, match="tiles = 5, but image = 0"):
        Prompt(image=0, tiles=5)
    with pytest.raises(SettingError, match=r"split = 40 is outside 0\.\.31: the model has 32 decoder layers"):
        measure_flops(shapes.named("7b"), split=40)
    with pytest.raises(SettingError, match="--shape 70b: expected one of small, 7b, 13b"):
        shapes.named("70b")


def test_a_prompt_without_an_image_costs_the_stock_models():
    shape = shapes.named("small")
    for mode in Mode:
        stock, routed = (
            count_flops(shape, program_of(shape, r, None), Prompt(64, 0), mode) for r in (None, Routing(split=18))
        )
        assert stock == routed and stock.tower == 0


@pytest.mark.parametrize("form", ["full", "adapter", "stock"])
def test_files_alone_say_what_the_model_says(host, form, tmp_path):
    from llava_patch import SkipLinks

    if form == "stock":
        host.model.save_pretrained(tmp_path / "model")
        wanted = shapes.shape_of(host.model, "model")
        assert shapes.read_shape(str(tmp_path / "model")) == (wanted, None, None)
        return
    host.model.save_pretrained(tmp_path / "base")
    host.model.config._name_or_path = host.model.name_or_path = str(tmp_path / "base")
    routing = Routing(split=2)
    with patch(host.model, fusion=SkipLinks(stride=2), routing=routing) as handle:
        handle.save(tmp_path / "model", form)
        wanted = shapes.shape_of(host.model, "model")
    assert shapes.read_shape(str(tmp_path / "model")) == (wanted, routing, None)


def test_the_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from llava_patch.cli.main import app

    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["flops", "--shape", "small", "--text", "32", "--fusion-layers", "20,31"])
    assert run.exit_code == 0, run.output
    assert "LF, K at 20,31" in run.output and "wrote llava_patch_out/flops/small/flops.png" in run.output
    bound = ["flops", "--shape", "small", "--gin-param", "Routing.split = 20", "--tiles", "2", "--output", "here"]
    run = CliRunner().invoke(app, bound)
    assert json.loads((tmp_path / "here/flops.json").read_text())["tables"][0]["prompt"]["tiles"] == 2
    assert "as configured" in run.output and json.loads((tmp_path / "here/flops.json").read_text())["split"] == 20
    for wrong, why in (
        (["--fusion-layers", "a"], "--fusion-layers a: expected a number"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--gin-param", "SkipLinks.stride = 2"], "SkipLinks is bound"),
        (["--gin-param", "Routing.split = 'auto'"], "nothing is measured here"),
    ):
        assert why in str(CliRunner().invoke(app, ["flops", *wrong]).exception)
