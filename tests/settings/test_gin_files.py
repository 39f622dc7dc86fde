"""Every shipped gin file gives what its name says, for the model that its name says."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from llava_patch.core.paths import gin_dir
from llava_patch.fusion.base import choose_taps
from llava_patch.settings import gin_config as config
from llava_patch.settings.methods import (
    LEARNING_VARIANTS,
    AuxiliaryProbe,
    DeepStack,
    DenseConnector,
    DirectFusion,
    FastV,
    PruMerge,
    PyramidDrop,
    Routing,
    SkipLinks,
    SparseVLM,
    VisionZip,
)
from llava_patch.tools.sweep.plan import make_plan, read_sweep

LAYERS = {"7b": 32, "13b": 40, "small": 8}
WIDTHS = {"7b": (4096, 11008), "13b": (5120, 13824)}  # hidden and intermediate size of Llama 1 and 2
BLOCKS, MAIN = 24, 23  # of LLaVA-1.5's tower
STAGE2 = {
    "skiplinks": SkipLinks(stride=6, train_tower="all"),
    "denseconnector": DenseConnector(kind="dci", detach=(0,), train_tower="all"),
    "directfusion": DirectFusion(layers="3-18", detach=(1,), train_tower="all"),
    "deepstack": DeepStack(taps=(6, 12, 18, 23), start=4, interval=2, train_tower="all"),
}
UNSIZED = {
    "dpvr_lf_small", "paper_dpvr", "paper_stage1", "paper_stage2", "skiplinks_448_stage1", "skiplinks_448_stage2",
    "skiplinks_aimv2", "skiplinks_siglip2",
}  # fmt: skip
FILES = sorted(path.stem for path in gin_dir().glob("*.gin"))


def _names(pattern):
    return [name for name in FILES if re.fullmatch(pattern, name)]


def _fits(routing, layers):
    fused = routing.fusion_layers
    return routing.split + routing.side_layers <= layers and routing.split <= layers - fused


def test_the_set_is_complete():
    expected = {f"dpvr_{v}_{z}" for v in ("lf", "pc", "kv", "ideal", "vtw") for z in WIDTHS}
    prunings = ("fastv", "pyramid_drop", "sparse_vlm", "vision_zip", "pru_merge")
    expected |= {f"{name}_{z}" for name in (*prunings, "lora_r16", "lora_r64", "full") for z in WIDTHS}
    expected |= {f"sweep_{key}_{z}" for key in ("split", "fusion", "side") for z in WIDTHS}
    expected |= {f"{name}_{z}" for name in ("skiplinks", "skiplinks_stage1", "sweep_skiplinks") for z in WIDTHS}
    expected |= {f"{name}_stage2_{z}" for name in STAGE2 for z in WIDTHS}
    expected |= {f"rprobe_aux_stage2_{z}" for z in WIDTHS}
    expected |= {f"{name}_{z}" for name in ("gradients_skiplinks", "gradients_lr") for z in WIDTHS}
    assert expected <= set(FILES)
    assert set(FILES) - expected == UNSIZED | {"sweep_split_pc_13b"}


@pytest.mark.parametrize("name", FILES)
def test_opens_with_claim_cost_and_command(name):
    lines = (gin_dir() / f"{name}.gin").read_text().splitlines()
    assert len(lines[0]) > 30 and lines[1].startswith("# Cost: ")
    assert any(line.startswith("# Use:  ") for line in lines)
    assert max(map(len, lines)) <= 120
    if name == "dpvr_lf_small":
        return
    assert any(line.startswith("# Expect") for line in lines) and f"{name}.gin" in " ".join(lines)
    if name not in UNSIZED:
        size = name.rsplit("_", 1)[1]
        assert size.upper() in lines[0]
        for other in set(WIDTHS) - {size}:  # a copy for the other size, with a name forgotten
            assert not any(
                re.search(rf"(links|connector|fusion|stack)(_stage\d)?_{other}\.gin", line) for line in lines
            )
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


DPVR_FLAGS = {"optim": "adamw_torch", "weight_decay": 0.0, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine",
              "bf16": True, "gradient_checkpointing": True, "num_train_epochs": 1, "per_device_train_batch_size": 4,
              "gradient_accumulation_steps": 1}  # fmt: skip


def test_the_dpvr_papers_recipe_beside_each_file_that_trains():
    """One GPU, so that four samples make a step; method and learning rate stay those of the variant's file."""
    assert config.read(["paper_dpvr.gin"], []).flags == DPVR_FLAGS
    recipe = (gin_dir() / "paper_dpvr.gin").read_text()
    assert "localhost:0" in recipe and "Not known here" in recipe and "learning_rate" not in recipe
    assert (round(665_000 / 4, -3), round(665_000 / 128, -2)) == (166_000, 5_200) and 128 // 4 == 32
    assert "about 166,000 steps" in recipe and "128 a step makes 5,200" in recipe
    for variant in ("lf", "pc", "kv"):
        for size in WIDTHS:
            name = f"dpvr_{variant}_{size}.gin"
            alone, read = config.read([name], []), config.read([name, "paper_dpvr.gin"], [])
            assert read.routing == alone.routing and read.flags == {**alone.flags, **DPVR_FLAGS}
            text = (gin_dir() / name).read_text()
            assert "--gin_file paper_dpvr.gin" in text and "32 times fewer steps" in text
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(DPVR_FLAGS) - {"warmup_ratio"} <= known  # which newer transformers call warmup_steps
    for name in _names(r"sweep_(split|fusion|side)\w*"):
        assert "(paper_dpvr.gin)" in (gin_dir() / f"{name}.gin").read_text()


@pytest.mark.parametrize("size", WIDTHS)
def test_variants_of_one_size_differ_in_the_variant_alone(size):
    splits = {v: config.read([f"dpvr_{v}_{size}.gin"], []).routing.split for v in ("lf", "pc", "kv", "ideal", "vtw")}
    assert len(set(splits.values())) == 1
    rates = {v: config.read([f"dpvr_{v}_{size}.gin"], []).flags["learning_rate"] for v in ("lf", "pc", "kv")}
    assert rates["lf"] == pytest.approx(5 * rates["pc"]) and rates["pc"] == rates["kv"]


@pytest.mark.parametrize("size", WIDTHS)
def test_other_baselines(size):
    assert config.read([f"fastv_{size}.gin"], []).pruning == FastV(layer=2, ratio=0.5)
    assert config.read([f"vision_zip_{size}.gin"], []).pruning == VisionZip(dominant=54, contextual=10)
    assert config.read([f"pru_merge_{size}.gin"], []).pruning == PruMerge()
    for name, method in (("pyramid_drop", PyramidDrop), ("sparse_vlm", SparseVLM)):
        read, default = config.read([f"{name}_{size}.gin"], []).pruning, method()
        assert read.keep == default.keep
        depths = [layer / LAYERS[size] for layer in read.layers]
        assert depths == pytest.approx([layer / LAYERS["7b"] for layer in default.layers], abs=0.01)
    for rank in (16, 64):
        read = config.read([f"lora_r{rank}_{size}.gin"], [])
        assert not read.patches
        assert (read.flags["lora_enable"], read.flags["lora_r"]) == (True, rank)
        assert f"Flags.lora_r = {rank}" in read.operative
    full = config.read([f"full_{size}.gin"], [])
    assert not full.patches and full.flags["lora_enable"] is False and full.flags["freeze_backbone"] is False
    read = config.read([f"skiplinks_{size}.gin"], [])
    assert read.fusion == SkipLinks(stride=6) and not read.flags


RECIPE = {"weight_decay": 0.05, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "bf16": True,
          "deepspeed": "./scripts/zero3.json", "model_max_length": 2048}  # fmt: skip
STAGE1_FLAGS = {**RECIPE, "learning_rate": 2e-5, "tune_mm_mlp_adapter": True}
STAGE2_FLAGS = {**RECIPE, "learning_rate": 1e-5, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
                "freeze_backbone": False, "lora_enable": False}  # fmt: skip


def _is_recipe(flags, stage, **more):
    flags = dict(flags)
    assert 8 * flags.pop("per_device_train_batch_size") * flags.pop("gradient_accumulation_steps") == 256
    assert flags == {**(STAGE1_FLAGS if stage == 1 else STAGE2_FLAGS), **more}


def test_flags_of_the_papers_recipe_by_themselves():
    for stage in (1, 2):
        read = config.read([f"paper_stage{stage}.gin"], [])
        assert not read.patches
        _is_recipe(read.flags, stage)
        assert "which stays" in (gin_dir() / f"paper_stage{stage}.gin").read_text()  # why 2048


@pytest.mark.parametrize("size", WIDTHS)
def test_fusions_with_the_papers_recipe(size):
    read = config.read([f"skiplinks_stage1_{size}.gin"], [])
    assert read.fusion == SkipLinks(stride=6)  # the tower is frozen
    _is_recipe(read.flags, 1)
    for name, fusion in STAGE2.items():
        read = config.read([f"{name}_stage2_{size}.gin"], [])
        assert read.methods() == {"fusion": fusion, "routing": None, "pruning": None, "probe": None}
        _is_recipe(read.flags, 2)


@pytest.mark.parametrize("size", WIDTHS)
def test_the_auxiliary_loss_on_the_papers_recipe(size):
    read = config.read([f"rprobe_aux_stage2_{size}.gin"], [])
    assert read.fusion == SkipLinks(layers=(), train_tower="all") and read.routing is read.pruning is None
    assert read.probe == AuxiliaryProbe(weight=0.1) and "AuxiliaryProbe.share = 1.0" in read.operative
    _is_recipe(read.flags, 2)
    hidden, inner = WIDTHS[size]
    layers = LAYERS[size] // 4
    head = layers * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden
    head += 2 * hidden * (hidden + 1) + 588 * (2 * hidden + 1)
    text = (gin_dir() / f"rprobe_aux_stage2_{size}.gin").read_text()
    assert f"head of {head / 1e9:.2f} B parameters ({layers} of the {LAYERS[size]} decoder layers)" in text


def test_the_papers_448_pixel_models_and_their_baseline():
    for stage in (1, 2):
        tower = "all" if stage == 2 else "frozen"
        read = config.read([f"skiplinks_448_stage{stage}.gin"], [])
        assert read.fusion == SkipLinks(stride=6, merge_size=2, train_tower=tower)
        _is_recipe(read.flags, stage, mm_vision_select_layer=-1)
        taps = choose_taps(read.fusion, 24, 24)
        assert (taps.blocks, taps.detached) == ((6, 12, 18, 23), 2)  # section 3.2
        baseline = config.read([f"skiplinks_448_stage{stage}.gin"], ["SkipLinks.layers = ()"])
        assert baseline.fusion == SkipLinks(stride=6, layers=(), merge_size=2, train_tower=tower)


def test_other_towers():
    read = config.read(["skiplinks_siglip2.gin"], [])
    assert read.fusion == SkipLinks(stride=6, merge_size=2, merge_padding=True) and not read.flags
    taps = choose_taps(read.fusion, 27, 26)
    assert (taps.blocks, taps.detached) == ((6, 12, 18, 24), 2)
    assert config.read(["skiplinks_aimv2.gin"], []).fusion == SkipLinks(stride=6)


@pytest.mark.parametrize("size", WIDTHS)
def test_the_grid_of_stride_and_detached_taps(size, tmp_path):
    sweep = read_sweep(f"sweep_skiplinks_{size}.gin")
    assert sweep.gin_files == (f"skiplinks_stage2_{size}.gin",) and sweep.seeds == (42,)
    points = sweep.points()
    assert points[0] == {"SkipLinks.layers": ()}
    wanted = set()
    for stride in (3, 4, 6, 12):
        taps = len(choose_taps(SkipLinks(stride=stride), BLOCKS, MAIN).blocks)
        wanted |= {(stride, detach) for detach in range(taps + 1)}
    found = [(point["SkipLinks.stride"], point["SkipLinks.detach"]) for point in points[1:]]
    assert set(found) == wanted and len(found) == len(wanted) == 20
    assert (6, 2) in found  # the main setting is one of the points
    text = (gin_dir() / f"sweep_skiplinks_{size}.gin").read_text()
    assert list(sweep.scores) == ["OCR", "average"]  # figure 6
    for metric in {metric for metrics in sweep.scores.values() for metric in metrics}:
        assert metric.split("/")[0] in re.search(r"--tasks (\S+)", text)[1].split(",")  # the command measures it
    runs = make_plan(sweep, sweep.seeds, tmp_path, ["true"])
    assert len(runs) == 21 and f"{len(runs)} full trainings" in text
    for run in runs:
        read = config.read([f"skiplinks_stage2_{size}.gin"], [f"{k} = {v!r}" for k, v in run.point.items()])
        assert (read.fusion.layers == ()) == run.baseline and read.fusion.train_tower == "all"
        assert read.flags["learning_rate"] == 1e-5
        assert choose_taps(read.fusion, BLOCKS, MAIN).detached == run.point.get("SkipLinks.detach", 0)


@pytest.mark.parametrize("name", [name for name in _names(r"sweep_\w+") if "skiplinks" not in name])
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

    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024  # attention, MLP, two norms
    before = 1024 + 3 * 14 * 14 * 1024 + (24 * 24 + 1) * 1024 + 2 * 1024  # class, patches, positions, norm

    def text(name):
        return (gin_dir() / f"{name}_{size}.gin").read_text()

    def fused(taps):
        return (1 + taps) * 1024 * width + width + width**2 + width

    used = f"{(MAIN * block + before) / 1e6:.1f} M of the tower"
    assert f"({3 * 1024 * width / 1e6:.1f} M parameters)" in text("skiplinks")
    assert f"{fused(3) / 1e6:.1f} M parameters train, {3 * 1024 * width / 1e6:.1f} M of them" in text(
        "skiplinks_stage1"
    )
    assert f"{whole / 1e9:.2f} B parameters" in text("skiplinks_stage2")
    assert f"projector's {fused(3) / 1e6:.1f} M" in text("skiplinks_stage2")
    assert f"second projector of {projector / 1e6:.1f} M" in text("deepstack_stage2")
    assert all(used in text(f"{name}_stage2") for name in STAGE2)
    for name in ("denseconnector", "directfusion"):
        assert f"{2 * 1024 * width / 1e6:.1f} M more parameters" in text(f"{name}_stage2")

    for variant in ("lf", "pc", "kv"):
        assert f"one trainable layer, {layer / 1e6:.0f} M parameters" in text(f"dpvr_{variant}")
    assert f"{layer / 1e6:.0f}, {2 * layer / 1e6:.0f} and {3 * layer / 1e6:.0f} M" in text("sweep_side")
    assert f"{whole / 1e9:.2f} B parameters" in text("full") and f"{projector / 1e6:.1f} M train" in text("full")
    for rank in (16, 64):
        added = LAYERS[size] * rank * (4 * 2 * width + 3 * (width + inner))
        assert f"{added / 1e6:.1f} M parameters" in text(f"lora_r{rank}")
        assert f"projector's {projector / 1e6:.1f} M" in text(f"lora_r{rank}")


@pytest.mark.parametrize("size", WIDTHS)
def test_the_gradient_statistics_of_the_paper(size, tmp_path):
    name = f"gradients_skiplinks_{size}.gin"
    read = config.read([name], [])
    assert read.fusion == SkipLinks(stride=6, detach=0, train_tower="all")
    settings = read.measurements["Gradients"]
    assert (settings.block, settings.full, settings.steps, settings.stop) == (6, "run", 1300, None)
    assert 8 * read.flags["per_device_train_batch_size"] * read.flags["gradient_accumulation_steps"] == 128
    assert read.flags["learning_rate"] == 1e-5 and read.flags["deepspeed"].endswith("zero2.json")
    assert choose_taps(read.fusion, BLOCKS, MAIN).blocks[0] == settings.block  # the first tapped block
    assert "50 is this project's choice" in (gin_dir() / name).read_text() and settings.window == 50
    sweep = read_sweep(f"gradients_lr_{size}.gin")
    assert sweep.gin_files == (name,) and sweep.seeds == (42,)
    assert sweep.grid == {"Flags.learning_rate": (8e-5, 2e-5, 5e-6)}  # table 3
    assert len(make_plan(sweep, sweep.seeds, tmp_path, ["true"])) == 3
    point = config.read([name], [*sweep.gin_params, "Flags.learning_rate = 5e-06"])
    assert point.measurements["Gradients"].stop == settings.steps and point.flags["learning_rate"] == 5e-6
    assert not {"max_steps", "num_train_epochs"} & set(point.flags)  # the schedule is that of the whole run
