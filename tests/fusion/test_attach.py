"""Fusions on whole models of both hosts."""

import pytest
import torch

from llava_patch import DeepStack, DenseConnector, DirectFusion, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError, SettingError
from llava_patch.fusion.features import fuse
from tests.support.fusions import ALL, OTHER_TOKENS, TOKENS, ZERO_START, hidden_states, pixels, randomise
from tests.support.models import IMAGE, close

SAMPLES = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ZERO_START)
def test_zero_start_is_stock(host, dtype, case):
    host.model.to(dtype)
    batch = host.batch(SAMPLES)
    key = "images" if host.name == "llava" else "pixel_values"
    batch.inputs[key] = batch.inputs[key].to(dtype)
    stock = host.logits(batch)
    handle = patch(host.model, fusion=ZERO_START[case])
    assert torch.equal(host.logits(batch), stock)
    randomise(handle)
    assert not torch.equal(host.logits(batch), stock)  # the taps do reach the model
    handle.remove()
    assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in ALL if "stack" not in c])
def test_the_projector_sees_what_it_was_promised(host, case):
    """The projector's input against hidden states of the tower run by hand."""
    pixels = torch.randn(2, 3, 56, 56)
    states = hidden_states(host, pixels)
    seen = []
    with patch(host.model, fusion=ALL[case]) as handle:
        hook = handle.anatomy.projector.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        tokens = handle.anatomy.encode_images(pixels)
        hook.remove()
        expected = fuse(states, handle.taps, 1, (4, 4))[:, 1:]
        assert tokens.shape[1] == TOKENS.get(case, 16) == handle.tokens_per_image
    assert torch.equal(seen[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in OTHER_TOKENS if "stack" not in c])  # see test_deep_stack_decoder
def test_other_numbers_of_tokens_go_through_the_whole_model(host, case):
    """Ragged batches, several images; logits equal a stock decoder that is given these embeddings."""
    host.tokens = TOKENS[case]
    with patch(host.model, fusion=ALL[case]) as handle:
        randomise(handle)
        batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,)])
        logits = host.logits(batch)
        features = iter(handle.anatomy.encode_images(pixels(host, batch)))
        for i, sample in enumerate([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,)]):
            ids = iter(batch.inputs["input_ids"][i])
            parts = []
            for part in sample:
                if part == IMAGE:
                    parts.append(next(features))
                    skipped = [next(ids) for _ in range(1 if host.name == "llava" else host.tokens)]
                    assert len(set(map(int, skipped))) == 1
                else:
                    parts.append(handle.anatomy.embed_tokens(torch.stack([next(ids) for _ in range(part)])))
            embeds = torch.cat(parts)[None]
            alone = handle.anatomy.lm_head(handle.anatomy.decoder(inputs_embeds=embeds).last_hidden_state)
            assert close(logits[i][batch.valid[i]], alone[0])


def _tower_gradients(host, settings):
    torch.manual_seed(0)
    with patch(host.model, fusion=settings) as handle:
        randomise(handle)
        host.tokens = handle.tokens_per_image
        host.model.zero_grad()
        logits = host.model(**host.batch([(2, IMAGE, 5)]).inputs).logits
        logits.square().mean().backward()
        parameters = handle.anatomy.vision_model.named_parameters()
        return logits.detach(), {n: p.grad.clone() for n, p in parameters if p.grad is not None}


def _main_path_gradients(host, settings, monkeypatch):
    """The main path alone: every tap is a constant, from the same hidden states."""
    from llava_patch.fusion import features

    with monkeypatch.context() as changed:
        changed.setattr(features, "tap", lambda states, group: _plain_tap([s.detach() for s in states], group))
        return _tower_gradients(host, settings)[1]


def _plain_tap(states, group):
    states = [states[b] for b in group.blocks]
    return states[0] if len(states) == 1 else torch.stack(states).sum(0) / len(states)


@pytest.mark.parametrize(
    "settings",
    [
        SkipLinks(layers=(2, 4, 6), detach=3), DenseConnector(detach=2),
        DenseConnector(kind="sti", groups=(2, 5), detach=2), DirectFusion(layers="all", detach=2),
        DeepStack(start=1, interval=1, detach=4), SkipLinks(layers=(2, 4, 6), detach=3, merge_size=2),
    ],
    ids=str,
)  # fmt: skip
def test_a_detached_tap_contributes_no_gradient(host, settings, monkeypatch):
    import dataclasses

    settings = dataclasses.replace(settings, train_tower="all")
    logits, detached = _tower_gradients(host, settings)
    main = _main_path_gradients(host, settings, monkeypatch)
    assert detached.keys() == main.keys()
    assert all(torch.equal(detached[n], main[n]) for n in main)
    same_logits, attached = _tower_gradients(host, dataclasses.replace(settings, detach=0))
    assert torch.equal(logits, same_logits)  # the forward output does not depend on detach
    assert any(not torch.allclose(attached[n], main[n], rtol=1e-2) for n in main)


@pytest.mark.parametrize("case", ALL)
def test_the_tower_runs_once(host, case):
    calls = []
    host.tokens = TOKENS.get(case, 16)
    with patch(host.model, fusion=ALL[case]) as handle:
        hook = handle.anatomy.vision_model.register_forward_hook(lambda *a: calls.append(1))
        host.model(**host.batch([(2, IMAGE, 5)]).inputs)
        hook.remove()
    assert len(calls) == 1


class _Saved:
    """Bytes that autograd keeps for the backward pass, weights apart."""

    def __init__(self, model):
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.storages = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self):
        return sum(s.nbytes() for s in self.storages.values())


@pytest.mark.parametrize("case", ["skip", "dci", "direct-all"])
def test_a_frozen_tower_costs_the_memory_of_its_taps(host, case):
    """What a training step keeps beyond the stock step: each tap once, as the projector's input."""
    from llava_patch.hosts import anatomy

    def kept():
        anatomy.find(host.model).vision_model.requires_grad_(False)
        saved = _Saved(host.model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            features = anatomy.find(host.model).encode_images(torch.randn(3, 3, 56, 56))
        assert features.requires_grad
        return saved.bytes

    stock = kept()
    with patch(host.model, fusion=ZERO_START[case]) as handle:
        randomise(handle)
        taps = len(handle.taps.groups) * 3 * 16 * 32 * 4
        assert kept() == stock + taps


def test_no_grad_is_lifted_only_while_the_tower_trains(host):
    if host.name == "hf":
        pytest.skip("HF runs its tower with gradients")
    pixels = torch.randn(1, 3, 56, 56)
    with patch(host.model, fusion=SkipLinks(stride=2)):
        assert not host.model.get_vision_tower()(pixels).requires_grad
    with patch(host.model, fusion=SkipLinks(stride=2, train_tower=1)) as handle:
        assert host.model.get_vision_tower()(pixels).requires_grad
        handle.anatomy.vision_model.requires_grad_(False)
        assert not host.model.get_vision_tower()(pixels).requires_grad
    assert "forward" not in vars(host.model.get_vision_tower())


def test_a_tower_that_is_loaded_later_is_tapped_then(tower_folder):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    from tests.support import models

    model = models.llava_model(tower_folder)
    late = LlavaLlamaForCausalLM(model.config)
    late.load_state_dict(model.state_dict(), strict=False)
    assert not late.get_vision_tower().is_loaded
    handle = patch(late.eval(), fusion=SkipLinks(stride=2))
    late.get_vision_tower().load_model()
    host = models.Host("llava", late)
    with torch.no_grad():
        batch = host.batch(SAMPLES)
        assert torch.equal(host.logits(batch), models.Host("llava", model).logits(batch))
    handle.remove()
    assert "load_model" not in vars(late.get_vision_tower())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": SkipLinks(layers=(3, 9))}, "block 9 is outside"),
        ({"fusion": SkipLinks(stride=2, train_tower=8)}, "only 7 blocks"),
        ({"fusion": (SkipLinks(), SkipLinks(stride=3))}, "one fusion"),
        ({"fusion": SkipLinks(train_tower="all", stride=2), "routing": Routing(split=2)}, "contradicts Routing.freeze"),
        ({"fusion": Routing(split=2)}, "expected SkipLinks"),
        ({"fusion": DirectFusion(layers=(7,))}, "no tap left"),
        ({"fusion": DeepStack(start=3)}, "layers 3, 5, 7, 9, but this model has layers 0..5"),
        (
            {"fusion": DeepStack(start=0, interval=1), "routing": Routing(split=3)},
            "leave the decoder at Routing.split = 3",
        ),
    ],
)
def test_refused_before_anything_changes(host, arguments, message):
    keys, attributes = list(host.model.state_dict()), dict(vars(host.model))
    with pytest.raises(SettingError, match=message):
        patch(host.model, **arguments)
    assert list(host.model.state_dict()) == keys
    assert vars(host.model).keys() == attributes.keys()


def test_two_fusions_are_refused(host):
    with patch(host.model, fusion=SkipLinks(stride=2)):
        with pytest.raises(SettingError, match="already carries fusion"):
            patch(host.model, fusion=SkipLinks(stride=3))
        assert patch(host.model, fusion=SkipLinks(stride=2)).fusion == SkipLinks(stride=2)


def test_the_hosts_own_layer_fusion_is_not_fused_again(host):
    if host.name == "llava":
        pytest.skip("llava selects one layer")
    host.model.config.vision_feature_layer = [-2, 3]
    with pytest.raises(HostError, match="already fuses several layers"):
        patch(host.model, fusion=SkipLinks(stride=2))


def test_a_projector_of_another_width_is_refused(host):
    from llava_patch.hosts import anatomy

    parent, name, linear = anatomy.find(host.model).first_linear()
    setattr(parent, name, torch.nn.Linear(64, linear.out_features))
    with pytest.raises(SettingError, match="takes 64 channels, but this tower gives 32"):
        patch(host.model, fusion=SkipLinks(stride=2))


@pytest.mark.parametrize("fusion", [SkipLinks(stride=2), DeepStack(taps=(2, 4), start=0)], ids=str)
def test_a_fusion_that_stays_at_zero_is_reported(host, fusion):
    handle = patch(host.model, fusion=fusion, routing=Routing(split=3))
    assert f"{type(fusion).__name__} does nothing: its new weights are zero and frozen" in handle.report()
    randomise(handle)
    assert "does nothing" not in handle.report()  # frozen, but no longer zero
    handle.remove()
    handle = patch(host.model, fusion=fusion, routing=Routing(split=3))
    for parameter in handle.adapter_parameters():
        parameter.requires_grad_(True)
    assert "does nothing" not in handle.report()
    handle.remove()
    assert repr(handle).endswith("(removed)>")


@pytest.mark.parametrize("case", OTHER_TOKENS)
def test_other_tokens_need_a_host_that_does_not_count_them(host, case):
    if host.name == "llava":
        host.model.config.mm_patch_merge_type = "spatial_unpad"
    else:
        host.model.model.pack_image_features = None  # as LlavaNext has it
    with pytest.raises(SettingError, match=r"changes the number of tokens of an image, but this model cuts images"):
        patch(host.model, fusion=ALL[case])


def test_patches_are_merged_only_where_the_class_token_is_dropped(host):
    if host.name == "llava":
        host.model.get_vision_tower().select_feature = "cls_patch"
    else:
        host.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(SettingError, match=r"merge_size = 2 joins patches, but the host keeps the tower's CLS token"):
        patch(host.model, fusion=SkipLinks(stride=2, merge_size=2))
    with patch(host.model, fusion=DenseConnector(kind="sti", groups=(2, 5))) as handle:
        assert handle.anatomy.encode_images(torch.zeros(1, 3, 56, 56)).shape[1] == 1 + 16 + 4


def test_weights_that_nothing_brings_in_cannot_grow(host):
    from llava_patch.hosts import anatomy

    anatomy.find(host.model).projector.to("meta")
    for fusion in (SkipLinks(stride=2), DeepStack(taps=(2, 4), start=0)):
        with pytest.raises(SettingError, match="projector's weights are on the meta device"):
            patch(host.model, fusion=fusion)


def test_a_refused_patch_leaves_no_mark_of_training(host):
    with pytest.raises(SettingError, match="only 7 blocks"):
        patch(host.model, fusion=SkipLinks(stride=2, train_tower=8))
    outer = patch(host.model, fusion=SkipLinks(stride=2))
    with pytest.raises(SettingError, match="only 7 blocks"):
        patch(host.model, fusion=SkipLinks(stride=2, train_tower=8))
    assert "trained_tower" not in outer.settings() and outer.fusion.train_tower == "frozen"
    with patch(host.model, fusion=SkipLinks(stride=2, train_tower=1)):
        assert outer.settings()["trained_tower"]
    assert "trained_tower" not in outer.settings()
    outer.remove()


def test_a_tower_loaded_inside_a_block_stays_tapped_after_it(tower_folder):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    from tests.support import models

    model = models.llava_model(tower_folder)
    late = LlavaLlamaForCausalLM(model.config)
    late.load_state_dict(model.state_dict(), strict=False)
    handle = patch(late.eval(), fusion=SkipLinks(stride=2))
    with patch(late, routing=Routing(split=3)):
        late.get_vision_tower().load_model()
    batch = models.Host("llava", late).batch(SAMPLES)
    with torch.no_grad():
        assert torch.equal(models.Host("llava", late).logits(batch), models.Host("llava", model).logits(batch))
    handle.remove()


def test_too_few_tokens_to_average(host):
    with pytest.raises(SettingError, match="averages 8 neighbouring tokens, but an image of this tower has 4"):
        patch(host.model, fusion=DenseConnector(kind="sti", groups=(2, 5), merge_size=2))


def test_a_baseline_without_taps_trains_the_tower(host):
    """Stock output, and the gradients of the main path."""
    batch = host.batch(SAMPLES, labels=True)
    stock = host.logits(batch)
    with patch(host.model, fusion=SkipLinks(layers=(), train_tower="all")) as handle:
        assert torch.equal(host.logits(batch), stock)
        host.model(**batch.inputs).loss.backward()
        tower = {n for n, p in handle.anatomy.vision_model.named_parameters() if p.grad is not None}
        assert len(tower) == len([n for n in handle.trainable() if "vision_tower" in n]) > 50
    with pytest.raises(SettingError, match=r"SkipLinks\.layers = \(\)"):
        SkipLinks(layers=())
