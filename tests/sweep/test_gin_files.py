"""Every shipped gin file gives what its name says, for the model that its name says."""

import re

import pytest

from llava_patch import config
from llava_patch.resources import gin_dir
from llava_patch.settings import LEARNING_VARIANTS, FastV, Routing, SkipLinks
from llava_patch.sweep.plan import make_plan, read_sweep

LAYERS = {"7b": 32, "13b": 40, "small": 8}
WIDTHS = {"7b": (4096, 11008), "13b": (5120, 13824)}  # hidden and intermediate size of Llama 1 and 2
FILES = sorted(path.stem for path in gin_dir().glob("*.gin"))


def _names(pattern):
    return [name for name in FILES if re.fullmatch(pattern, name)]


def _fits(routing, layers):
    fused = routing.fusion_layers
    return routing.split + routing.side_layers <= layers and routing.split <= layers - fused


def test_the_set_is_complete():
    expected = {f"dpvr_{v}_{z}" for v in ("lf", "pc", "kv", "ideal", "vtw") for z in WIDTHS}
    expected |= {f"{name}_{z}" for name in ("fastv", "lora_r16", "lora_r64", "full") for z in WIDTHS}
    expected |= {f"sweep_{key}_{z}" for key in ("split", "fusion", "side") for z in WIDTHS}
    assert expected <= set(FILES)
    assert set(FILES) - expected == {"dpvr_lf_small", "skiplinks_7b", "sweep_split_pc_13b"}


@pytest.mark.parametrize("name", FILES)
def test_opens_with_claim_cost_and_command(name):
    lines = (gin_dir() / f"{name}.gin").read_text().splitlines()
    assert len(lines[0]) > 30 and lines[1].startswith("# Cost: ")
    assert any(line.startswith("# Use:  ") for line in lines)
    assert max(map(len, lines)) <= 120
    if name not in ("dpvr_lf_small", "skiplinks_7b"):
        size = name.rsplit("_", 1)[1]
        assert size.upper() in lines[0] and any(line.startswith("# Expect") for line in lines)
        assert f"{name}.gin" in " ".join(lines)
        for other in set(WIDTHS) - {size}:
            assert f"llava-v1.5-{other}" not in " ".join(lines)


@pytest.mark.parametrize("name", _names(r"dpvr_\w+"))
def test_routing_variants(name):
    _, variant, size = name.split("_")
    read = config.read([f"{name}.gin"], [])
    assert (read.fusion, read.pruning, read.sweep) == (None, None, None)
    assert read.routing.variant == variant and _fits(read.routing, LAYERS[size])
    if size == "7b":
        assert read.routing == Routing(variant=variant, split=18)
    learns = variant in LEARNING_VARIANTS
    assert read.routing.freeze == ("all_but_single" if learns else "none")
    if size != "small":
        assert set(read.flags) == ({"learning_rate"} if learns else set())


@pytest.mark.parametrize("size", WIDTHS)
def test_variants_of_one_size_differ_in_the_variant_alone(size):
    splits = {v: config.read([f"dpvr_{v}_{size}.gin"], []).routing.split for v in ("lf", "pc", "kv", "ideal", "vtw")}
    assert len(set(splits.values())) == 1
    rates = {v: config.read([f"dpvr_{v}_{size}.gin"], []).flags["learning_rate"] for v in ("lf", "pc", "kv")}
    assert rates["lf"] == pytest.approx(5 * rates["pc"]) and rates["pc"] == rates["kv"]


@pytest.mark.parametrize("size", WIDTHS)
def test_other_baselines(size):
    assert config.read([f"fastv_{size}.gin"], []).pruning == FastV(layer=2, ratio=0.5)
    for rank in (16, 64):
        read = config.read([f"lora_r{rank}_{size}.gin"], [])
        assert not read.patches
        assert (read.flags["lora_enable"], read.flags["lora_r"]) == (True, rank)
        assert f"Flags.lora_r = {rank}" in read.operative
    full = config.read([f"full_{size}.gin"], [])
    assert not full.patches and full.flags["lora_enable"] is False and full.flags["freeze_backbone"] is False
    assert config.read(["skiplinks_7b.gin"], []).fusion == SkipLinks(stride=6)


@pytest.mark.parametrize("name", _names(r"sweep_\w+"))
def test_every_point_of_a_sweep_fits_its_model(name, tmp_path):
    sweep = read_sweep(f"{name}.gin")
    size = name.rsplit("_", 1)[1]
    assert sweep.seeds == (1, 2, 3)
    assert all(file.endswith(f"_{size}.gin") for file in sweep.gin_files)
    key = {"split": "split", "fusion": "fusion_layers", "side": "side_layers"}[name.split("_")[1]]
    assert list(sweep.grid) == [f"Routing.{key}"]
    base = config.read(sweep.gin_files, sweep.gin_params).routing
    assert getattr(base, key) in sweep.grid[f"Routing.{key}"]  # the main setting is one of the points
    for point in sweep.points():
        read = config.read(sweep.gin_files, [f"{k} = {v!r}" for k, v in point.items()])
        assert _fits(read.routing, LAYERS[size])
    assert len(make_plan(sweep, sweep.seeds, tmp_path, ["true"])) == 3 * len(sweep.points())


@pytest.mark.parametrize("size", WIDTHS)
def test_parameter_numbers_in_the_comments(size):
    width, inner = WIDTHS[size]
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    whole = LAYERS[size] * layer + 2 * 32000 * width + width
    projector = 1024 * width + width + width**2 + width

    def text(name):
        return (gin_dir() / f"{name}_{size}.gin").read_text()

    for variant in ("lf", "pc", "kv"):
        assert f"one trainable layer, {layer / 1e6:.0f} M parameters" in text(f"dpvr_{variant}")
    assert f"{layer / 1e6:.0f}, {2 * layer / 1e6:.0f} and {3 * layer / 1e6:.0f} M" in text("sweep_side")
    assert f"{whole / 1e9:.2f} B parameters" in text("full") and f"{projector / 1e6:.1f} M train" in text("full")
    for rank in (16, 64):
        added = LAYERS[size] * rank * (4 * 2 * width + 3 * (width + inner))
        assert f"{added / 1e6:.1f} M parameters" in text(f"lora_r{rank}")
        assert f"projector's {projector / 1e6:.1f} M" in text(f"lora_r{rank}")
