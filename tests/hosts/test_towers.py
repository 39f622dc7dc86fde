"""Every known class of vision tower: its description against the running model, and Detached Skip-Links on it."""

import inspect

import pytest
import torch
from torch import nn

from llava_patch import DeepStack, DenseConnector, DirectFusion, SkipLinks, patch
from llava_patch.core.errors import HostError, SettingError
from llava_patch.fusion.training import distances
from llava_patch.hosts import anatomy
from llava_patch.hosts.towers import layout as towers
from tests.support import models, zoo
from tests.support.models import IMAGE

CASES = [("hf", n) for n in zoo.ON_HF] + [("llava", n) for n in zoo.NAMES]


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    zoo.install_timm_stand_in(monkeypatch)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


def make(host, name, folders, layer=-2):
    if host == "hf":
        return zoo.Case(models.Host("hf", zoo.hf_model(name, layer)), name)
    return zoo.Case(models.Host("llava", zoo.llava_model(zoo.folder(folders, name), layer)), name)


@pytest.fixture(params=CASES, ids="-".join)
def case(request, folders):
    return make(*request.param, folders)


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.NAMES)
def test_hidden_states_are_the_blocks_outputs(name):
    vision = zoo.ours(name)
    outputs = []
    for block in zoo.blocks_of(vision):
        block.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o))
    result = vision(torch.randn(2, 3, 56, 56), output_hidden_states=True)
    states, tower = result.hidden_states, towers.describe(vision)
    assert len(states) == zoo.BLOCKS + 1 == len(outputs) + 1  # N + 1 states, and each block ran once
    assert all(torch.equal(states[i + 1], outputs[i]) for i in range(zoo.BLOCKS - 1))
    assert torch.equal(states[-1], outputs[-1]) == (not tower.last_is_normed)
    if tower.last_is_normed:
        assert torch.equal(states[-1], tower.final_norm(zoo.BLOCKS)[0](outputs[-1]))
    assert states[0].shape == (2, tower.prefix_tokens + 16, zoo.WIDTH)
    assert "hidden_states" not in vision(torch.randn(1, 3, 56, 56))  # only when asked


@pytest.mark.parametrize("name", zoo.NAMES)
def test_description(name):
    vision = zoo.stock(name)
    tower = towers.describe(vision)
    assert list(tower.blocks) == list(zoo.blocks_of(vision))
    assert (tower.prefix_tokens, tower.grid) == (zoo.PREFIX[name], (4, 4))
    parts = {id(p) for m in (*tower.before, tower.blocks, *tower.after) for p in m.parameters()}
    parts |= {id(p) for p in tower.own}
    assert parts == {id(p) for p in vision.parameters()}  # nothing forgotten
    shape = towers.shape_of(vision.config)
    assert (shape.n_blocks, shape.width, shape.patch_size, shape.grid) == (8, 32, 14, (4, 4))
    assert towers.prefix_tokens_of(vision.config) == zoo.PREFIX[name]


def test_anatomy_before_and_after_loading(folders):
    for name in zoo.NAMES:
        model = zoo.llava_model(zoo.folder(folders, name), loaded=False)
        assert not model.get_vision_tower().is_loaded
        for _ in range(2):
            found = anatomy.find(model)
            assert (found.n_blocks, found.patch_size, found.grid) == (8, 14, (4, 4))
            assert (found.main_block, found.vision_width) == (7, 32)
            assert found.drops_cls == (zoo.PREFIX[name] == 1) and not found.drops_patch
            model.get_vision_tower().load_model()


@pytest.mark.parametrize(
    ("name", "strategy", "cls", "first"),
    [("clip", "default", True, False), ("clip", "full", False, False), ("siglip", "full", False, False),
     ("siglip", "default", False, True), ("aimv2", "default", False, True)],
)  # fmt: skip
def test_hf_says_what_it_drops(name, strategy, cls, first):
    found = anatomy.find(zoo.hf_model(name, strategy=strategy))
    assert (found.drops_cls, found.drops_patch) == (cls, first)


@torch.no_grad()
def test_zero_start_is_stock(case):
    batch = case.host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)])
    stock = case.host.logits(batch)
    with patch(case.host.model, fusion=SkipLinks(stride=2)) as handle:
        assert torch.equal(case.host.logits(batch), stock)
        handle.anatomy.first_linear()[2].weight[:, zoo.WIDTH :].normal_()
        assert not torch.equal(case.host.logits(batch), stock)
    assert torch.equal(case.host.logits(batch), stock)


@torch.no_grad()
@pytest.mark.parametrize("fusion", [
    DenseConnector(), DirectFusion(layers="all"), DeepStack(start=0, interval=1), SkipLinks(stride=3, merge_size=2),
    DenseConnector(kind="sti", groups=(2, 5)), DeepStack(taps=(2, 5), start=0, merge_size=2),
], ids=str)  # fmt: skip
def test_every_fusion_on_every_tower(case, fusion):
    """Tokens by the number of patches, prefix or not; zero-start where the number stays."""
    batch = case.host.batch([(2, IMAGE, 5)])
    stock = case.host.logits(batch)
    pixels = torch.randn(2, 3, 56, 56)
    states = anatomy.find(case.host.model).vision_model(pixels, output_hidden_states=True).hidden_states
    with patch(case.host.model, fusion=fusion) as handle:
        features = handle.anatomy.encode_images(pixels)
        tokens = 4 if fusion.merge_size == 2 else 16 if handle.taps.keeps_tokens else 20
        assert features.shape[1] == handle.tokens_per_image == tokens
        if handle.taps.keeps_tokens:
            assert torch.equal(case.host.logits(batch), stock)
        if fusion.merge_size == 2 and handle.taps.columns > 1:  # a tap's columns belong to its squares of patches
            linear = handle.anatomy.first_linear()[2]
            linear.weight[:, linear.main_features :].normal_()
            seen = []
            linear.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
            handle.anatomy.encode_images(pixels)
            tap = states[handle.taps.groups[0].blocks[0]][:, case.prefix :]
            square = torch.cat([tap[:, i] for i in (0, 1, 4, 5)], -1)  # the grid's first 2 x 2 patches
            d = linear.main_features
            assert torch.equal(seen[0][:, 0, d : 2 * d], square)
        case.host.tokens = handle.tokens_per_image
        assert torch.isfinite(case.host.logits(case.host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)]))).all()


def test_a_host_that_drops_a_patch_cannot_merge():
    model = zoo.hf_model("siglip", strategy="default")
    for fusion in (SkipLinks(stride=3, merge_size=2), DenseConnector(kind="sti", groups=(2, 5))):
        with pytest.raises(SettingError, match="needs every patch, but the host drops the first token"):
            patch(model, fusion=fusion)


@torch.no_grad()
def test_the_projector_sees_main_and_taps(case):
    pixels, seen = torch.randn(2, 3, 56, 56), []
    vision = anatomy.find(case.host.model).vision_model
    states = vision(pixels, output_hidden_states=True).hidden_states
    with patch(case.host.model, fusion=SkipLinks(stride=3, detach=1)) as handle:
        handle.anatomy.first_linear()[2].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        handle.anatomy.encode_images(pixels)
    assert torch.equal(seen[0], torch.cat([states[7], states[6], states[3]], -1)[:, case.prefix :])
    assert not torch.equal(states[6], states[3])


@pytest.mark.parametrize("layer", [-2, -1])
def test_what_trains_is_what_gets_a_gradient(case, folders, layer):
    """Blocks above the deepest used one, final norm and head never; the norm does when the last state is read."""
    if layer == -1:
        case = make(case.host.name, case.name, folders, layer)
    vision = anatomy.find(case.host.model).vision_model
    with patch(case.host.model, fusion=SkipLinks(layers=(2, 5), detach=1, train_tower="all")) as handle:
        handle.anatomy.first_linear()[2].weight.data.normal_(std=0.1)
        names = {n for n, p in case.host.model.named_parameters() if any(p is q for q in vision.parameters())}
        for everything in (True, False):  # also when a script has switched on what nothing reads
            vision.requires_grad_(True) if everything else handle.apply_freeze()
            listed = set(handle.trainable())
            case.host.model.zero_grad()
            case.host.logits(case.host.batch([(2, IMAGE, 5)])).square().mean().backward()
            given = {n for n, p in case.host.model.named_parameters() if p.grad is not None}
            assert listed & names == given & names
        tower = handle.anatomy.vision_parts()
        ids = {id(p) for n, p in case.host.model.named_parameters() if n in listed}
        assert all(id(p) in ids for p in tower.blocks[6].parameters())
        assert any(id(p) in ids for p in tower.blocks[7].parameters()) == (layer == -1)
        normed = layer == -1 and tower.last_is_normed
        assert [id(p) in ids for p in tower.after[0].parameters()] == [normed] * len(list(tower.after[0].parameters()))
        assert not any(id(p) in ids for m in tower.after[1:] for p in m.parameters())
        assert not any(p.requires_grad for p in tower.idle)
        used = [p for m in (*tower.before, *tower.blocks[: handle.taps.deepest]) for p in m.parameters()]
        used += [*tower.own, *(p for m in tower.final_norm(handle.taps.deepest) for p in m.parameters())]
        everything = {id(p) for p in used} - {id(p) for p in tower.idle}
        assert ids & {id(p) for p in vision.parameters()} == everything
        assert everything <= set(distances(tower, handle.taps.deepest))  # each has a learning rate of the tower's


def test_internvl_reports_its_mask_token_as_idle():
    tower = towers.describe(zoo.stock("internvl"))
    assert [p.shape for p in tower.idle] == [(1, 1, zoo.WIDTH)]


@pytest.mark.parametrize("name", ["siglip2", "internvl", "timm"])
def test_hf_refuses_a_tower_that_it_cannot_run(name):
    model = zoo.hf_model("clip")
    model.model.vision_tower = zoo.stock(name)
    if name == "internvl" and "kwargs" in inspect.signature(type(model.model.vision_tower).forward).parameters:
        pytest.skip("this version's InternVL reports its hidden states")
    with pytest.raises(HostError, match=rf"{type(model.model.vision_tower).__name__} cannot be the tower of this host"):
        patch(model, fusion=SkipLinks(stride=2))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])


def body(vision):
    return getattr(vision, "vision_model", vision)  # there up to transformers 4


def test_unknown_towers_say_what_is_missing():
    with pytest.raises(HostError, match=r"encoder.layers, encoder.layer and blocks, but Unknown has stem, layers"):
        towers.describe(Unknown())
    vision = zoo.stock("siglip")
    body(vision).encoder.extra = nn.Linear(2, 2)
    with pytest.raises(HostError, match="encoder holds more weights than its blocks'"):
        towers.describe(vision)
    vision = zoo.stock("siglip")
    body(vision).embeddings.position_embedding = nn.Embedding(17, zoo.WIDTH)
    with pytest.raises(HostError, match="positions for 17 tokens, but 0 before a grid of 4 x 4 patches make 16"):
        towers.describe(vision)
    vision = zoo.stock("clip")
    body(vision).embeddings.register_tokens = nn.Parameter(torch.zeros(1, 4, zoo.WIDTH))
    with pytest.raises(HostError, match="register tokens"):
        towers.describe(vision)
    config = type("SiglipVisionConfig", (), {"num_hidden_layers": 2, "hidden_size": 32, "image_size": 56})()
    with pytest.raises(HostError, match="SiglipVisionConfig is not known: it has no patch_size"):
        towers.shape_of(config)
    config = zoo.config("siglip2")
    config.num_patches = 15
    with pytest.raises(HostError, match="15 is no square"):
        towers.shape_of(config)


def test_a_timm_tower_without_timm_is_an_error(monkeypatch):
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    def missing(*args):
        raise ImportError("no timm here")

    monkeypatch.setattr(wrapper, "requires_backends", missing)
    with pytest.raises(HostError, match="needs the timm package"):
        towers.shape_of(zoo.config("timm"))
