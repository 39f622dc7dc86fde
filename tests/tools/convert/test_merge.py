"""Merging a patch into a plain checkpoint: the same logits without llava_patch, or an error that says why not."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from llava_patch import DeepStack, DenseConnector, DirectFusion, FastV, Routing, SkipLinks, get_handle, patch
from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.hosts.compat import one_tensor
from llava_patch.settings.methods import to_dict
from llava_patch.tools.convert.command import convert, merge
from llava_patch.tools.convert.plain import spread
from tests.support.checkpoints import batch, config, edited, load, logits, same_bits, tensors, trained
from tests.support.models import close

FUSION = SkipLinks(stride=2)  # taps 2, 4, 6 beside the main block 7
HOSTS = ("hf", "llava")

PLAIN_PROCESS = """
import sys, torch
host, path, inputs, out = sys.argv[1:]
batch = torch.load(inputs, weights_only=True)
if host == "hf":
    from transformers import LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(path)
else:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    model = LlavaLlamaForCausalLM.from_pretrained(path)
    model.get_vision_tower().load_model()
assert not {m for m in sys.modules if m.startswith("llava_patch.")} - {"llava_patch.integrations.import_hook"}
with torch.no_grad():
    torch.save(model.float().eval()(**batch).logits, out)
"""


def without_llava_patch(name, path, tmp_path):
    torch.save(batch(name), tmp_path / "in.pt")
    command = [sys.executable, "-c", PLAIN_PROCESS, name, str(path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLAVA_PATCH_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "out.pt", weights_only=True)[..., :512]


def is_plain(folder):
    stock = get_handle(load(folder)) is None
    return stock and "llava_patch" not in config(folder) and not list(folder.glob("llava_patch*"))


@pytest.fixture(scope="module")
def learnt(files, tmp_path_factory):
    """A fused model of each host whose new columns have learnt: folders of both forms, and its logits."""
    made = {}
    for name in HOSTS:
        model = load(getattr(files, name))
        stock = logits(model)
        handle = patch(model, fusion=FUSION)
        trained(handle.anatomy.projector)
        root = tmp_path_factory.mktemp(name)
        handle.save(root / "full", form="full")
        handle.save(root / "adapter")
        expected = logits(model)
        assert not torch.allclose(expected, stock, atol=1e-2)
        made[name] = (root, expected)
    return made


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_channels_merge_on_hf(learnt, form, tmp_path):
    root, expected = learnt["hf"]
    merge(root / form, tmp_path / "plain")
    assert config(tmp_path / "plain")["vision_feature_layer"] == [-2, 6, 4, 2]
    assert is_plain(tmp_path / "plain")
    # One wide product instead of the sum of two: another order of additions.
    assert close(logits(load(tmp_path / "plain")), expected)
    if form == "full":  # an adapter's base keeps its own precision
        same_bits(tensors(tmp_path / "plain"), tensors(root / "full"))
    with pytest.raises(CheckpointError, match="takes one layer"):
        convert(tmp_path / "plain", tmp_path / "x", "llava")


@pytest.mark.parametrize(
    ("fusion", "layers"),
    [
        (SkipLinks(layers=(8, 1)), [8, 1]),
        (DenseConnector(groups=((0, 1, 2, 3), (4, 5, 6))), [0, 1, 2, 3, 4, 5, 6]),
        (DenseConnector(kind="sci", groups=(5, 2)), [5, 2]),
        (DirectFusion(layers="all"), [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
    ids=str,
)
def test_every_fusion_on_channels_merges(files, fusion, layers, tmp_path):
    model = load(files.hf)
    stock = logits(model)
    handle = patch(model, fusion=fusion)
    trained(handle.anatomy.projector)
    expected = logits(model)
    assert not torch.allclose(expected, stock, atol=1e-2)
    merge(handle.save(tmp_path / "full", form="full"), tmp_path / "plain")
    assert config(tmp_path / "plain")["vision_feature_layer"] == [-2, *layers]
    assert is_plain(tmp_path / "plain")
    assert close(logits(load(tmp_path / "plain")), expected)


def test_a_deep_stack_that_has_not_learnt_merges_and_one_that_has_converts(files, tmp_path):
    model = load(files.llava)
    stock = logits(model)
    handle = patch(model, fusion=DeepStack(start=0, interval=1))
    full = handle.save(tmp_path / "full", form="full")
    merge(full, tmp_path / "plain")
    assert is_plain(tmp_path / "plain") and torch.equal(logits(load(tmp_path / "plain")), stock)
    trained(handle.anatomy.model.model.mm_projector_stack)
    expected = logits(model)
    assert not torch.allclose(expected, stock, atol=1e-2)
    full = handle.save(tmp_path / "learnt", form="full")
    with pytest.raises(CheckpointError, match="its DeepStack has learnt"):
        merge(full, tmp_path / "x")
    convert(full, tmp_path / "hf", "hf")
    assert close(logits(load(tmp_path / "hf")), expected)


def test_a_converted_processor_counts_the_fused_tokens(files, tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    model = load(files.llava)
    handle = patch(model, fusion=DenseConnector(kind="sti", groups=(2, 5)))
    convert(handle.save(tmp_path / "full", form="full"), tmp_path / "hf", "hf")
    inputs = AutoProcessor.from_pretrained(tmp_path / "hf")(
        images=Image.new("RGB", (56, 56)), text="<image> read", return_tensors="pt"
    )
    converted = load(tmp_path / "hf")
    assert int((inputs["input_ids"] == converted.config.image_token_id).sum()) == handle.tokens_per_image == 20
    assert torch.isfinite(converted(**inputs).logits).all()


def test_a_merged_folder_needs_nothing_of_ours(learnt, tmp_path):
    root, expected = learnt["hf"]
    merge(root / "full", tmp_path / "plain")
    assert close(without_llava_patch("hf", tmp_path / "plain", tmp_path), expected)
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(tmp_path / "plain")


def test_llava_cannot_take_several_layers_but_hf_can(learnt, tmp_path):
    root, expected = learnt["llava"]
    for out, target in ((root / "full", None), (root / "adapter", "llava")):
        with pytest.raises(CheckpointError, match=r"takes one vision layer only: merge it with --to hf"):
            merge(out, tmp_path / "x", target)
    with pytest.raises(CheckpointError, match="--to hf"):
        merge(learnt["hf"][0] / "full", tmp_path / "x", "llava")
    assert not (tmp_path / "x").exists()
    merge(root / "adapter", tmp_path / "plain", "hf")
    assert is_plain(tmp_path / "plain")
    assert close(logits(load(tmp_path / "plain")), expected)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_cls_is_dropped_from_every_layer(files, strategy, tmp_path):
    source = edited(files.hf, tmp_path / "in", config_values={"vision_feature_select_strategy": strategy})
    model = load(source)
    handle = patch(model, fusion=FUSION)
    trained(handle.anatomy.projector)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = handle.anatomy.encode_images(pixels)
    assert expected.shape[1] == (16 if strategy == "default" else 17)
    merge(handle.save(tmp_path / "full", form="full"), tmp_path / "plain")
    with torch.no_grad():
        made = one_tensor(load(tmp_path / "plain").get_image_features(pixel_values=pixels))
    assert close(made, expected)


@pytest.mark.parametrize("layer", [7, -2, -1, 5])
def test_index_conventions(files, layer, tmp_path):
    source = edited(files.hf, tmp_path / "in", config_values={"vision_feature_layer": layer})
    model = load(source)
    handle = patch(model, fusion=FUSION)
    trained(handle.anatomy.projector)
    expected = logits(model)
    merge(handle.save(tmp_path / "full", form="full"), tmp_path / "plain")
    assert config(tmp_path / "plain")["vision_feature_layer"][0] == layer
    assert close(logits(load(tmp_path / "plain")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_becomes_columns_of_its_blocks(dtype):
    torch.manual_seed(0)
    groups, width = [(0, 1, 2), (5,), (3, 4)], 8
    states = [torch.randn(4, width) for _ in range(7)]
    weight = torch.randn(6, (1 + len(groups)) * width).to(dtype)
    means = [torch.stack([states[b] for b in blocks]).mean(0) for blocks in groups]
    expected = torch.cat([states[6], *means], -1) @ weight.float().T
    merged = spread(weight, width, groups)
    assert merged.dtype == dtype and merged.shape == (6, (1 + 6) * width)
    blocks = [states[b] for group in groups for b in group]
    # Division by 3 rounds each column to the weight's precision, by 1 and 2 it is exact.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * width
    assert torch.allclose(torch.cat([states[6], *blocks], -1) @ merged.float().T, expected, atol=tolerance)
    assert torch.equal(merged[:, width * 4 : width * 5], weight[:, 2 * width : 3 * width])
    assert torch.equal(merged[:, width * 5 : width * 6] * 2, weight[:, 3 * width :])


def test_groups_are_merged_in_the_order_of_their_columns(learnt, tmp_path, monkeypatch):
    """The layers that the config names follow what the patch says of its columns."""
    from llava_patch.tools.convert import plain

    root, _ = learnt["hf"]
    monkeypatch.setattr(plain, "columns", lambda handle: [(1, 2, 3, 4), (0,), (5, 6)])
    merge(root / "full", tmp_path / "plain")
    assert config(tmp_path / "plain")["vision_feature_layer"] == [-2, 1, 2, 3, 4, 0, 5, 6]
    assert load(tmp_path / "plain").model.multi_modal_projector.linear_1.in_features == 8 * 32
    monkeypatch.setattr(plain, "columns", lambda handle: [(1,)])
    with pytest.raises(CheckpointError, match=r"takes 128 channels, .* makes 64"):
        merge(root / "full", tmp_path / "x")


@pytest.mark.parametrize("name", HOSTS)
def test_zero_columns_are_left_out(name, files, tmp_path):
    model = load(getattr(files, name))
    handle = patch(model, fusion=FUSION)
    first = handle.anatomy.first_linear()[2]
    trained(handle.anatomy.projector)
    with torch.no_grad():
        first.weight[:, 32:] = 0
    expected = logits(model)
    merge(handle.save(tmp_path / "adapter"), tmp_path / "plain")
    assert is_plain(tmp_path / "plain")
    # Zero columns add exactly nothing to the stock product.
    assert torch.equal(logits(load(tmp_path / "plain")), expected)
    if name == "llava":  # HF's has a test of its own above
        assert torch.equal(without_llava_patch(name, tmp_path / "plain", tmp_path), expected)


@pytest.mark.parametrize(
    "settings", [{"routing": Routing(split=4)}, {"pruning": FastV(2, 0.0)}], ids=["routing", "fastv"]
)
@pytest.mark.parametrize("name", HOSTS)
def test_what_does_nothing_is_left_out(name, settings, files, tmp_path):
    model = load(getattr(files, name))
    handle = patch(model, **settings)
    merge(handle.save(tmp_path / "full", form="full"), tmp_path / "plain")
    assert is_plain(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(load(getattr(files, name))))


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("name", HOSTS)
def test_a_trained_tower_is_part_of_the_checkpoint(name, form, files, tmp_path):
    model = load(getattr(files, name))
    handle = patch(model, fusion=SkipLinks(stride=2, train_tower=2))
    trained(handle.anatomy.vision_parts().blocks[-2])
    expected = logits(model)
    assert not torch.allclose(expected, logits(load(getattr(files, name))), atol=1e-3)
    merge(handle.save(tmp_path / "saved", form=form), tmp_path / "plain")
    assert is_plain(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), expected)


def _stack(scale):
    def change(held):
        for i, kind in ((1, "weight"), (1, "bias"), (2, "weight"), (2, "bias")):
            factor = 1 if i == 1 else scale
            held[f"multi_modal_projector_stack.linear_{i}.{kind}"] = (
                held[f"multi_modal_projector.linear_{i}.{kind}"] * factor
            )

    return change


def test_deepstack(files, tmp_path):
    record = {"fusion": to_dict(DeepStack(start=0, interval=1))}
    zero = edited(files.hf, tmp_path / "zero", settings=record, change=_stack(0))
    merge(zero, tmp_path / "plain")
    assert config(tmp_path / "plain") == config(files.hf)
    same_bits(tensors(tmp_path / "plain"), tensors(files.hf))
    taught = edited(files.hf, tmp_path / "learnt", settings=record, change=_stack(1))
    with pytest.raises(CheckpointError, match="its DeepStack has learnt"):
        merge(taught, tmp_path / "x")
    record = {"fusion": to_dict(DeepStack(start=0, interval=1, projector="shared"))}
    shared = edited(files.hf, tmp_path / "shared", settings=record)
    with pytest.raises(CheckpointError, match=r'DeepStack\.projector = "shared" adds features .* keep it patched'):
        merge(shared, tmp_path / "y")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": Routing(variant="vtw", split=2)}, r"Routing\(variant='vtw'.* sends image tokens around"),
        ({"pruning": FastV(1, 0.5)}, r"FastV\(layer=1.* takes image tokens out"),
        ({"fusion": SkipLinks(stride=2, merge_size=2)}, r"merge_size = 2 joins neighbouring patches"),
        ({"fusion": DenseConnector(kind="sti")}, r'kind = "sti" appends visual tokens'),
    ],
    ids=["vtw", "fastv", "merge_size", "sti"],
)
def test_what_has_no_plain_form(files, settings, message, tmp_path):
    source = edited(files.hf, tmp_path / "in", settings={k: to_dict(v) for k, v in settings.items()})
    with pytest.raises(CheckpointError, match=message + r".*(keep it patched)"):
        merge(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_a_side_branch_has_no_plain_form(files, tmp_path):
    handle = patch(load(files.llava), routing=Routing(split=2))
    with pytest.raises(CheckpointError, match="sends image tokens around decoder layers"):
        merge(handle.save(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_there_is_nothing_to_merge_of(files, learnt, tmp_path):
    with pytest.raises(CheckpointError, match="carries no patch"):
        merge(files.hf, tmp_path / "out")
    handle = patch(load(files.llava), fusion=FUSION)
    handle.save(tmp_path / "full", form="full")
    with pytest.raises(SettingError, match="--vision-tower"):
        merge(tmp_path / "full", tmp_path / "out", vision_tower=str(files.tower))
    with pytest.raises(CheckpointError, match="is the input itself"):
        merge(learnt["hf"][0] / "full", learnt["hf"][0] / "full")
    with pytest.raises(CheckpointError, match="is the input itself"):  # nor over an adapter's base
        merge(learnt["hf"][0] / "adapter", files.hf)


def test_the_command(learnt, tmp_path):
    done = CliRunner().invoke(
        app, ["merge", str(learnt["llava"][0] / "full"), "--output", str(tmp_path / "out"), "--to", "hf"]
    )
    assert done.exit_code == 0, done.output
    assert config(tmp_path / "out")["vision_feature_layer"] == [-2, 6, 4, 2]
