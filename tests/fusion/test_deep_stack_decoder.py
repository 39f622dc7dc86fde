"""DeepStack in the decoder, against a stock decoder whose layers get the taps added by hand, position by position."""

import copy
import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file

import llava_patch
from llava_patch import DeepStack, FastV, Routing, SkipLinks, get_handle, patch
from llava_patch.core.errors import InputError, SettingError
from llava_patch.fusion import attach
from llava_patch.hosts import anatomy, call_context
from tests.support import decoders
from tests.support.fusions import hidden_states, pixels, randomise
from tests.support.models import (
    HF_IMAGE_TOKEN,
    HF_VIDEO_TOKEN,
    IMAGE,
    VIDEO,
    close,
    needs_cpu,
    set_attention,
)
from tests.support.routings import again

RAGGED = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,), (1, IMAGE, 9)]
STACK = DeepStack(taps=(2, 5, 7), start=1, interval=2, detach=(0,))
SHARED = dataclasses.replace(STACK, projector="shared")
LAYERS = (1, 3, 5)


def _features(host, handle, images):
    """Each tap of each image through a copy of the projector that takes it: {layer: [images, 16, hidden]}."""
    anatomy, shared = handle.anatomy, handle.fusion.projector == "shared"
    projector = copy.deepcopy(anatomy.projector if shared else getattr(anatomy.projector_owner, anatomy.stack_name))
    states = hidden_states(host, images)
    taps = [group.blocks[0] for group in handle.taps.groups]
    return {layer: projector(states[tap][:, 1:]) for layer, tap in zip(handle.program().injections, taps, strict=True)}


def _by_hand(host, batch, features):
    """The stock model, with the features added at the image positions before each layer of `features`."""
    at = [(i, t) for i in range(len(batch.image)) for t in batch.image[i].nonzero()[:, 0].tolist()]
    order = list(range(len(at)))
    if host.name == "llava":  # a sample without an image brings an empty one
        order, image = [], 0
        for row in batch.image:
            n = int(row.sum()) // 16
            order += [16 * image + k for k in range(16 * n)]
            image += max(1, n)

    def adding(layer):
        def hook(module, args):
            hidden = args[0].clone()
            if hidden.shape[1] > 1:
                flat = features[layer].flatten(0, 1)
                for (i, t), row in zip(at, order, strict=True):
                    hidden[i, t] += flat[row]
            return (hidden, *args[1:])

        return hook

    hooks = [host.decoder.layers[n].register_forward_pre_hook(adding(n)) for n in features]
    try:
        return host.logits(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stack", [STACK, SHARED], ids=["own", "shared"])
def test_taps_are_added_at_the_image_positions(host, attention, padding, stack):
    set_attention(host.model, attention)
    batch = host.batch(RAGGED, padding)
    if stack is SHARED:  # a fresh projector gives features so small that they would hardly show
        for parameter in anatomy.find(host.model).projector.parameters():
            parameter.mul_(3)
    with patch(host.model, fusion=stack) as handle:
        if stack is STACK:
            randomise(handle)
        assert handle.program().injections == LAYERS
        features = _features(host, handle, pixels(host, batch))
        logits = host.logits(batch, use_cache=False)
    expected = _by_hand(host, batch, features)
    assert close(logits[batch.valid], expected[batch.valid])
    assert not close(host.logits(batch)[batch.valid], expected[batch.valid])


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, {"pruning": FastV(layer=2, ratio=0.5)}, {"routing": Routing(split=4)},
    {"routing": Routing(variant="kv", split=4), "pruning": FastV(layer=3, ratio=0.5)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("projector", ["own", "shared"])
def test_nothing_is_added_twice_under_a_cache(host, changes, projector):
    """Decoding step by step equals the whole conversation at once; the stock layers see the image once."""
    stack = DeepStack(taps=(2, 5), start=1, interval=2, projector=projector)
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)], "left")
    tokens = torch.randint(3, 90, (2, 3), generator=torch.Generator().manual_seed(5))
    with patch(host.model, fusion=stack, **changes) as handle:
        randomise(handle)
        positions = (
            (lambda mask: {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
            if host.name == "hf"
            else (lambda mask: {})
        )
        out = host.model(**batch.inputs, use_cache=True, **positions(batch.valid.long()))
        kept = out.past_key_values
        mask = batch.valid.long()
        for step in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            ids = {k: v[:, -1:] for k, v in positions(mask).items()}
            out = host.model(
                input_ids=tokens[:, step : step + 1], attention_mask=mask, past_key_values=kept, use_cache=True, **ids
            )
        whole = dict(batch.inputs)
        whole["input_ids"] = torch.cat([whole["input_ids"], tokens], 1)
        whole["attention_mask"] = torch.cat([whole["attention_mask"], torch.ones_like(tokens)], 1)
        with again(handle, kept):
            recomputed = host.model(**whole, use_cache=False, **positions(mask)).logits
        assert close(out.logits[:, -1], recomputed[:, -1])
        generated = host.model.generate(
            *([whole["input_ids"]] if host.name == "llava" else []),
            **{k: v for k, v in whole.items() if host.name == "hf" or k != "input_ids"},
            max_new_tokens=4, do_sample=False, num_beams=2,
        )  # fmt: skip
        assert generated.shape[0] == 2


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_recomputation(host, use_cache, beams):
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 4)], "left", seed=3)
    with patch(host.model, fusion=STACK) as handle:
        randomise(handle)
        inputs = dict(batch.inputs)
        ids = inputs.pop("input_ids")
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [HF_IMAGE_TOKEN]}
        answer = host.model.generate(ids, **inputs, **options, num_beams=beams, use_cache=use_cache)[:, -3:]
        other = host.model.generate(ids, **inputs, **options, num_beams=beams, use_cache=not use_cache)[:, -3:]
        assert torch.equal(answer, other)
        if beams > 1:
            return
        tokens = torch.empty(2, 0, dtype=torch.long)
        for _ in range(3):
            whole = {**inputs, "input_ids": torch.cat([ids, tokens], 1)}
            whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
            logits = host.model(**whole, use_cache=False).logits[:, -1]
            logits[:, [2, HF_IMAGE_TOKEN]] = -torch.inf  # min_new_tokens forbids the end token
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(answer, tokens)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_start_generates_the_stock_models_logits(host, dtype):
    """Bit for bit, prefill and every decoded token."""
    host.model.to(dtype)
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 4)], "left")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
    ids = inputs.pop("input_ids")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    stock = host.model.generate(ids, **inputs, **options, output_scores=True).scores
    with patch(host.model, fusion=STACK):
        patched = host.model.generate(ids, **inputs, **options, output_scores=True).scores
    assert all(torch.equal(a, b) for a, b in zip(patched, stock, strict=True)) and len(stock) == 4


def test_a_shared_projector_adds_nothing_to_the_model_and_learns_from_its_taps(host, caplog):
    """Its gradient is that of the stock model whose layers get its own output of the taps added by hand."""
    model, batch = host.model, host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)], labels=True)
    projector, names = anatomy.find(model).projector, list(model.state_dict())
    projector_names = [n for n in dict(model.named_parameters()) if "projector" in n]
    assert projector_names

    def gradients():
        model.zero_grad()
        model(**batch.inputs, use_cache=False).loss.backward()
        return [p.grad.clone() for p in projector.parameters()]

    stock = gradients()
    attach._warn_shared.cache_clear()
    with caplog.at_level(logging.WARNING, "llava_patch"), patch(model, fusion=SHARED) as handle:
        assert list(model.state_dict()) == names
        assert handle.adapter_parameters() == list(projector.parameters())
        assert set(projector_names) <= set(handle.trainable()) and handle.silent_fusion() is None
        assert not any("stack" in name for name in handle.trainable())
        patched = gradients()
        states = hidden_states(host, pixels(host, batch))
        layers = dict(zip(handle.program().injections, (2, 5, 7), strict=True))
    assert 'DeepStack.projector = "shared"' in caplog.text and "not the stock model's" in caplog.text
    rows = batch.image.nonzero()

    def adding(tap):
        def hook(module, args):
            added = projector(states[tap][:, 1:].detach()).flatten(0, 1)
            return (args[0].index_put(tuple(rows.T), added, accumulate=True), *args[1:])

        return hook

    hooks = [host.decoder.layers[n].register_forward_pre_hook(adding(tap)) for n, tap in layers.items()]
    by_hand = gradients()
    for hook in hooks:
        hook.remove()
    assert all(close(a, b) for a, b in zip(patched, by_hand, strict=True))
    assert not any(close(a, b) for a, b in zip(patched, stock, strict=True))


@torch.no_grad()
def test_taps_through_a_shared_projector_are_not_taken_for_images(host, monkeypatch):
    """What is watched on its way to the decoder is what the projector made of the images, each once."""
    seen, check = [], call_context._check_routed

    def noting(call, *args, **kwargs):
        seen.extend(list(images.rows) for images in call.images)
        return check(call, *args, **kwargs)

    monkeypatch.setattr(call_context, "_check_routed", noting)
    for stack in (STACK, SHARED):
        with patch(host.model, fusion=stack):
            host.logits(host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)]))
    assert len(seen) >= 2 and all(rows == [3 * 16] for rows in seen)


@torch.no_grad()
def test_an_adapter_brings_a_shared_projector_back(host, tmp_path):
    """The projector itself is in it, though no tensor was added and nothing trains."""
    host.model.requires_grad_(False)
    batch = host.batch(RAGGED)
    host.model.config._name_or_path = "some/base"
    weights = [p.clone() for p in anatomy.find(host.model).projector.parameters()]
    with patch(host.model, fusion=SHARED) as handle:
        for parameter in handle.adapter_parameters():
            parameter.mul_(2)
        expected = host.logits(batch)
        handle.save(tmp_path)
    tensors = load_file(tmp_path / "llava_patch.safetensors")
    assert len(tensors) == len(weights) and not any("stack" in name for name in tensors)
    for parameter, stock in zip(anatomy.find(host.model).projector.parameters(), weights, strict=True):
        parameter.copy_(stock)
    loaded = llava_patch.load(host.model, tmp_path)
    assert loaded.fusion == SHARED and torch.equal(host.logits(batch), expected)
    loaded.remove()
    with pytest.raises(SettingError, match=r"already carries .*projector='own'"), patch(host.model, fusion=STACK):
        llava_patch.load(host.model, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("merge_size", [1, 2])
def test_taps_are_the_tokens_that_the_host_keeps(host, merge_size):
    """With its CLS token kept, and with patches merged."""
    stack = DeepStack(taps=(2, 5), start=1, interval=2, merge_size=merge_size)
    first, tokens = 1, 4
    if merge_size == 1:
        first, tokens = 0, 17
        if host.name == "llava":
            host.model.get_vision_tower().select_feature = "cls_patch"
        else:
            host.model.config.vision_feature_select_strategy = "full"
    host.tokens = tokens
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)])
    with patch(host.model, fusion=stack) as handle:
        randomise(handle)
        states = hidden_states(host, pixels(host, batch))
        projector = getattr(handle.anatomy.projector_owner, handle.anatomy.stack_name)
        logits = host.logits(batch, use_cache=False)
        for layer, tap in ((1, 2), (3, 5)):
            taken = states[tap][:, first:]
            if merge_size == 2:
                taken = torch.stack([taken[:, [p, p + 1, p + 4, p + 5]].flatten(1) for p in (0, 2, 8, 10)], 1)
            flat = projector(taken).flatten(0, 1)

            def add(module, args, flat=flat):
                hidden = args[0].clone()
                hidden[batch.image] += flat
                return (hidden, *args[1:])

            host.decoder.layers[layer].register_forward_pre_hook(add)
        for parameter in projector.parameters():
            parameter.zero_()  # now the hooks alone add
        assert close(logits[batch.valid], host.logits(batch, use_cache=False)[batch.valid])


@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_text_alone_in_half_precision(host):
    """What is added for nothing must be nothing, also where a sum over features would overflow."""
    needs_cpu(torch.float16)
    host.model.half()
    with patch(host.model, fusion=STACK) as handle:
        for parameter in handle.anatomy.projector_owner.mm_projector_stack.parameters():
            parameter.data.fill_(1.0)
        batch = host.batch([(4,), (6,)], labels=True).inputs
        batch["images"] = batch["images"].half()
        host.model.train()
        assert torch.isfinite(host.model(**batch).loss)
        host.model.eval()


@torch.no_grad()
def test_a_prompt_cut_by_the_length_limit_keeps_its_rows(host):
    if host.name == "hf":
        pytest.skip("HF does not cut prompts")
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)])
    with patch(host.model, fusion=STACK) as handle:
        randomise(handle)
        whole = host.logits(batch)
        host.model.config.tokenizer_model_max_length = 27  # inside the second image
        cut = host.logits(batch)
    assert close(cut[0, :23], whole[0, :23]) and close(cut[1], whole[1, :27])


@torch.no_grad()
@pytest.mark.parametrize(
    "samples",
    [
        [(2, VIDEO, 1, VIDEO, 5), (3, VIDEO, 4)],
        [(2, VIDEO, 1, VIDEO, 5), (9,)],  # as many as samples, of one
        [(2, IMAGE, 1, IMAGE, 5), (3, IMAGE, 4)],
        [(4, IMAGE, 2, VIDEO, 5), (3, VIDEO, 6, IMAGE, 1, IMAGE, 2)],
    ],
    ids=["videos", "videos of one", "images", "both"],
)
def test_beams_take_their_own_samples_images_and_videos(samples, tower_folder):
    """As the stock model's, whose `generate` encodes them before it repeats samples (transformers 5.1x on)."""
    host = decoders.build("onevision", "llama", tower_folder)
    batch = host.batch(samples, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "output_scores": True}

    def scores():
        return host.model.generate(**batch.inputs, **options, return_dict_in_generate=True).sequences_scores

    stock = scores()
    with patch(host.model, fusion=STACK):  # which starts at zero
        assert close(scores(), stock)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_anyres_tiles_and_frames_on_hf(kind, tower_folder):
    """Tiles are joined, cut and shrunk, frames pooled; line ends and the end of a video take no tap."""
    host = decoders.build(kind, "llama", tower_folder)
    model, videos = host.model, kind == "onevision"
    batch = host.batch([(2, IMAGE, 5), (3, VIDEO, 1, IMAGE, 4), (1, IMAGE, 2)] if videos else RAGGED, "left")
    with patch(model, fusion=STACK) as handle:
        randomise(handle)
        taken, added, newline = handle.anatomy.dropped_tokens, {}, model.model.image_newline
        projector = model.model.multi_modal_projector_stack
        tiles, sizes = batch.inputs["pixel_values"], batch.inputs["image_sizes"]
        counts = [3, 3, 5] if videos else [3, 3, 5, 3]
        states = hidden_states(host, torch.cat([t[:n] for t, n in zip(tiles, counts, strict=True)]))
        given = {"vision_aspect_ratio": "anyres_max_1"} if videos else {"vision_feature_select_strategy": "default"}
        for layer, tap in zip(LAYERS, (2, 5, 7), strict=True):
            features = projector(states[tap][:, taken:]).split(counts)
            packed = model.model.pack_image_features(features, sizes, image_newline=torch.zeros(64), **given)[0]
            added[layer] = torch.zeros(*batch.image.shape, 64)
            added[layer][batch.inputs["input_ids"] == HF_IMAGE_TOKEN] = torch.cat(list(packed))
        for layer, tap in zip(LAYERS, (2, 5, 7), strict=True) if videos else ():
            frames = projector(hidden_states(host, batch.inputs["pixel_values_videos"][0])[tap])
            pooled = frames.view(3, 2, 2, 2, 2, 64).mean((2, 4)).flatten(0, 2)  # halving a grid of 4 is its mean
            added[layer][batch.inputs["input_ids"] == HF_VIDEO_TOKEN] = torch.cat([pooled, torch.zeros(1, 64)])
        assert model.model.image_newline is newline
        logits = host.logits(batch)
    for layer in LAYERS:
        host.decoder.layers[layer].register_forward_pre_hook(
            lambda m, args, values=added[layer]: (args[0] + values, *args[1:])
        )
    assert close(logits[batch.valid], host.logits(batch)[batch.valid])


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_anyres_tiles_on_llava(host):
    config = host.model.config
    config.image_aspect_ratio, config.mm_patch_merge_type = "anyres", "spatial_unpad"
    config.image_grid_pinpoints = [[56, 112], [112, 56], [112, 112]]
    newline = torch.randn(64, generator=torch.Generator().manual_seed(2))
    newline[:2] = torch.tensor([3.0, 2.0])  # could pass for the number of a row
    host.decoder.embed_tokens.weight[5, :2] = torch.tensor([4.0, -4.0])
    host.decoder.image_newline = torch.nn.Parameter(newline.clone())
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, 3, 56, 56, generator=generator), torch.randn(5, 3, 56, 56, generator=generator)]
    inputs = {
        "input_ids": torch.tensor([[3, 4, -200, 5, 6, 7], [8, -200, 9, 10, 11, 12]]),
        "attention_mask": torch.ones(2, 6, dtype=torch.long), "images": images, "image_sizes": [(112, 56), (112, 100)],
    }  # fmt: skip
    with patch(host.model, fusion=STACK) as handle:
        randomise(handle)
        features = _features(host, handle, torch.cat(images))
        logits = host.model(**inputs).logits
    # The host lays out the taps as it does the image, with a newline of zeros; text is recognised by its zeros too.
    encode, embed = host.model.encode_images, host.decoder.embed_tokens.weight.clone()
    added = {}
    for layer, feature in features.items():
        host.model.encode_images = lambda images, feature=feature: feature
        host.decoder.image_newline.zero_()
        host.decoder.embed_tokens.weight.zero_()
        arguments = (inputs["input_ids"], None, inputs["attention_mask"], None, None, images, inputs["image_sizes"])
        added[layer] = host.model.prepare_inputs_labels_for_multimodal(*arguments)[4]
    host.model.encode_images = encode
    host.decoder.image_newline.copy_(newline)
    host.decoder.embed_tokens.weight.copy_(embed)
    for layer, values in added.items():
        host.decoder.layers[layer].register_forward_pre_hook(
            lambda m, args, values=values: (args[0] + values, *args[1:])
        )
    valid = host.model.prepare_inputs_labels_for_multimodal(*arguments)[2].bool()
    assert close(logits[valid], host.model(**inputs).logits[valid])


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_gradients_reach_projector_and_tower_through_checkpoints(host, checkpointing):
    """Also with reentrant checkpoints, which lose what a layer takes from elsewhere."""
    gradients = {}
    for on in (False, checkpointing):
        with patch(host.model, fusion=DeepStack(taps=(2, 5), start=1, interval=2, train_tower="all")) as handle:
            randomise(handle)
            host.model.train()
            if on:
                host.model.gradient_checkpointing_enable({"use_reentrant": on == "reentrant"})
                host.model.enable_input_require_grads()
            host.model.zero_grad()
            host.model(**host.batch(RAGGED, labels=True).inputs).loss.backward()
            gradients[on] = {n: p.grad.clone() for n, p in host.model.named_parameters() if p.grad is not None}
            assert set(handle.trainable()) == set(gradients[on])
            host.model.gradient_checkpointing_disable()
            host.model.eval()
    assert any("_stack" in n for n in gradients[False])
    assert gradients[False].keys() == gradients[checkpointing].keys()
    for name, gradient in gradients[False].items():
        assert close(gradients[checkpointing][name], gradient), name


@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_a_batch_without_an_image_still_gives_every_parameter_a_gradient(host):
    """Or other ranks would wait for it: a gradient of zero."""
    with patch(host.model, fusion=STACK) as handle:
        host.model.train()
        host.model(**host.batch([(4,), (6,)], labels=True).inputs).loss.backward()
        stack = dict(host.decoder.mm_projector_stack.named_parameters())
        assert all(p.grad is not None and not p.grad.any() for p in stack.values())
        assert handle.active
        host.model.eval()


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava"], indirect=True)
def test_embeddings_that_the_host_has_prepared_bring_their_taps(host):
    batch = host.batch(RAGGED).inputs
    with patch(host.model, fusion=STACK) as handle:
        randomise(handle)
        expected = host.model(**batch).logits
        prepared = host.model.prepare_inputs_labels_for_multimodal(
            batch["input_ids"], None, batch["attention_mask"], None, None, batch["images"]
        )
        logits = host.model(inputs_embeds=prepared[4], attention_mask=prepared[2]).logits
    assert torch.equal(logits, expected)


def test_embeddings_without_pixels_are_refused(host):
    batch = host.batch([(2, IMAGE, 5)])
    embeds = torch.randn(1, 23, 64)
    with patch(host.model, fusion=STACK) as handle:
        with pytest.raises(InputError, match="cannot know where images are"):
            host.model(inputs_embeds=embeds)
        with pytest.raises(InputError, match="embeddings without its pixels"), handle.image_positions(batch.image):
            host.model(inputs_embeds=embeds)
        with handle.image_positions(torch.zeros_like(batch.image)):
            patched = host.model(inputs_embeds=embeds).logits
    assert torch.equal(patched, host.model(inputs_embeds=embeds).logits)


def test_undo_leaves_nothing(host):
    keys, attributes = list(host.model.state_dict()), set(vars(host.model))
    inner = set(vars(anatomy.find(host.model).wrapper))
    handle = patch(host.model, fusion=STACK)
    assert any("_stack" in name for name in host.model.state_dict())
    handle.remove()
    assert list(host.model.state_dict()) == keys and set(vars(host.model)) == attributes
    assert set(vars(anatomy.find(host.model).wrapper)) == inner
    assert get_handle(host.model) is None


def test_routing_added_later_respects_the_injections(host):
    with patch(host.model, fusion=STACK):
        with pytest.raises(SettingError, match=r"leave the decoder at Routing\.split = 4"):
            patch(host.model, routing=Routing(split=4))
        assert get_handle(host.model).routing is None
    with patch(host.model, routing=Routing(split=4)):
        with pytest.raises(SettingError, match=r"leave the decoder at Routing\.split = 4"):
            patch(host.model, fusion=STACK)
        with pytest.raises(SettingError, match="already carries fusion"):
            patch(host.model, fusion=SkipLinks(stride=2))
            patch(host.model, fusion=STACK)
