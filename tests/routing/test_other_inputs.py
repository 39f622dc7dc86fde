"""Other decoders and other shapes of image input: grouped-query attention, sliding windows, anyres tiles, cut spans."""

import pytest
import torch
from models import HF_IMAGE_TOKEN, IMAGE, TEXT, Host, close, vision_config

from llava_patch import patch
from llava_patch.errors import InputError, SettingError

from .cases import ALL, RAGGED, again, embeddings, extend, places
from .naive import naive

SOME = ["lf", "lf-k2", "lf-sparse", "pc", "kv", "ideal", "vtw", "fastv", "lf+fastv", "kv+fastv-deep"]
# Grouped-query attention, and a window of less than one image.
MISTRAL = {**TEXT, "num_key_value_heads": 2, "sliding_window": 12, "head_dim": 16}


def _mistral(name, tower_folder):
    torch.manual_seed(0)
    if name == "hf":
        from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

        config = LlavaConfig(
            vision_config=vision_config(), text_config=MistralConfig(**MISTRAL), image_token_index=HF_IMAGE_TOKEN,
            image_seq_length=16,
        )  # fmt: skip
        return Host("hf", LlavaForConditionalGeneration(config).eval())
    import models

    models.llava_model(tower_folder)  # writes the tower's folder
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

    torch.manual_seed(0)
    config = LlavaMistralConfig(
        **MISTRAL, mm_vision_tower=str(tower_folder / "clip"), mm_hidden_size=32, mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2, mm_vision_select_feature="patch", tune_mm_mlp_adapter=False,
    )  # fmt: skip
    model = LlavaMistralForCausalLM(config)
    model.get_vision_tower().load_model()
    return Host("llava", model.float().eval())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["hf", "llava"])
def test_sliding_window_and_grouped_queries(name, attention, tower_folder):
    """The window counts positions of the whole sequence, also where a layer sees a part of it."""
    host = _mistral(name, tower_folder)
    host.model.set_attn_implementation(attention)
    left, right = host.batch(RAGGED, "left"), host.batch(RAGGED, "right")  # llava pads as the last one was made
    embeds = embeddings(host, right)
    tokens = torch.randint(3, 90, (len(RAGGED), 3), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([left.valid.long(), torch.ones_like(tokens)], 1)
    for case in SOME:
        with patch(host.model, **ALL[case]) as handle:
            host.batch(RAGGED, "right")
            logits = host.logits(right, use_cache=False)
            for i in range(len(RAGGED)):
                keep = right.valid[i]
                states = naive(host.decoder, embeds[i][keep], right.image[i][keep], **ALL[case])
                assert close(logits[i][keep], host.model.lm_head(states)), (case, i)
            host.batch(RAGGED, "left")
            extra = {"position_ids": places(mask)} if name == "hf" else {}
            first = {"position_ids": places(left.valid)} if name == "hf" else {}
            out = host.model(**left.inputs, use_cache=True, **first)
            for step in range(3):
                n = left.valid.shape[1] + step + 1
                ids = {"position_ids": places(mask[:, :n])[:, -1:]} if name == "hf" else {}
                out = host.model(
                    input_ids=tokens[:, step : step + 1], attention_mask=mask[:, :n],
                    past_key_values=out.past_key_values, use_cache=True, **ids,
                )  # fmt: skip
            with again(handle, out.past_key_values):
                whole = host.model(**extend(left, tokens), use_cache=False, **extra).logits
            assert close(out.logits[:, -1], whole[:, -1]), case


@torch.no_grad()
def test_a_cache_that_has_dropped_positions_is_refused(tower_folder):
    host = _mistral("hf", tower_folder)
    cache = host.model(**host.batch([(20,)]).inputs, use_cache=True).past_key_values
    turn = {k: v for k, v in host.batch([(2, IMAGE, 3)]).inputs.items() if k != "attention_mask"}
    with patch(host.model, **ALL["lf"]), pytest.raises(InputError, match="outside its sliding window"):
        host.model(**turn, past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("case", SOME)
def test_anyres_tiles_on_hf(case):
    """Several tiles an image, with newline features between their rows: all of them are image positions."""
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=vision_config(), text_config=LlamaConfig(**TEXT), image_token_index=HF_IMAGE_TOKEN,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    pixels, sizes = torch.randn(2, 3, 3, 56, 56, generator=generator), torch.tensor([[56, 112], [112, 50]])
    counts = [len(f) for f in model.model.get_image_features(pixels, sizes)]
    assert counts[0] != counts[1]
    rows = [torch.tensor([3, 4] + [HF_IMAGE_TOKEN] * n + [5, 6, 7]) for n in counts]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(r) for r in rows]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": sizes}
    embeds = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, a, kw: embeds.update(x=kw["inputs_embeds"]), with_kwargs=True
    )
    stock = model(**inputs, position_ids=places(mask)).logits
    hook.remove()
    with patch(model, **ALL[case]) as handle:
        logits = model(**inputs, position_ids=places(mask)).logits
        for i in range(2):
            keep = mask[i].bool()
            states = naive(handle.anatomy.decoder, embeds["x"][i][keep], ids[i][keep] == HF_IMAGE_TOKEN, **ALL[case])
            assert close(logits[i][keep], model.lm_head(states))
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == longest + 3
    assert not close(logits[mask.bool()], stock[mask.bool()])
    assert torch.equal(model(**inputs, position_ids=places(mask)).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava"], indirect=True)
@pytest.mark.parametrize("case", SOME)
def test_anyres_tiles_on_llava(host, case):
    """image_aspect_ratio=anyres with spatial_unpad: tiles are joined, unpadded, and rows end in a newline feature."""
    config = host.model.config
    config.image_aspect_ratio, config.mm_patch_merge_type = "anyres", "spatial_unpad"
    config.image_grid_pinpoints = [[56, 112], [112, 56], [112, 112]]
    host.decoder.image_newline = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(2)))
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, 3, 56, 56, generator=generator), torch.randn(5, 3, 56, 56, generator=generator)]
    inputs = {
        "input_ids": torch.tensor([[3, 4, -200, 5, 6, 7], [8, -200, 9, 10, 11, 12]]),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
        "images": images,
        "image_sizes": [(112, 56), (112, 100)],
    }
    prepared = host.model.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"], None, inputs["attention_mask"].bool(), None, inputs["input_ids"], images,
        inputs["image_sizes"],
    )  # fmt: skip
    mask, embeds, labels = prepared[2], prepared[4], prepared[5]
    image = mask & (labels == -100)
    assert image.sum(1).tolist() != [16, 16]
    with patch(host.model, **ALL[case]):
        logits = host.model(**inputs).logits
        for i in range(2):
            states = naive(host.decoder, embeds[i][mask[i]], image[i][mask[i]], **ALL[case])
            assert close(logits[i][mask[i]], host.model.lm_head(states))


@torch.no_grad()
@pytest.mark.parametrize("host", ["llava"], indirect=True)
@pytest.mark.parametrize("limit", [12, 18, 20])
@pytest.mark.parametrize("case", SOME)
def test_an_image_span_cut_by_the_length_limit(host, case, limit):
    host.model.config.tokenizer_model_max_length = limit
    samples = [(2, IMAGE, 5), (9,), (1, IMAGE, 2, IMAGE)]
    batch = host.batch(samples)
    embeds = embeddings(host, batch)
    assert embeds.shape[1] == limit
    with patch(host.model, **ALL[case]):
        logits = host.logits(batch)
        for i in range(len(samples)):
            keep = batch.valid[i][:limit]
            states = naive(host.decoder, embeds[i][keep], batch.image[i][:limit][keep], **ALL[case])
            assert close(logits[i][keep], host.model.lm_head(states))


@torch.no_grad()
def test_unknown_backends_and_tensor_parallelism_are_refused(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, **ALL["lf"]):
        host.decoder.config._attn_implementation = "flex_attention"
        with pytest.raises(InputError, match='attn_implementation = "flex_attention" is not available with routing'):
            host.logits(batch)
    host.decoder.config._attn_implementation = "sdpa"
    host.model._tp_size = 2
    with pytest.raises(SettingError, match="tensor parallel"):
        patch(host.model, **ALL["lf"])
