"""Other shapes of image input: anyres tiles, spans cut by the length limit, caches that a window has cut."""

import pytest
import torch

from llava_patch import patch
from llava_patch.core.errors import InputError, SettingError
from llava_patch.routing.reference import final_states
from tests.support import decoders
from tests.support.models import HF_IMAGE_TOKEN, IMAGE, TOKENS, close, features_of, hf_model, hf_next_model
from tests.support.routings import ALL, embeddings, places

SOME = ["lf", "lf-k2", "lf-sparse", "pc", "kv", "ideal", "vtw", "fastv", "lf+fastv", "kv+fastv-deep"]


@torch.no_grad()
def test_a_cache_that_has_dropped_positions_is_refused(tower_folder):
    host = decoders.build("hf", "mistral", tower_folder)
    cache = host.model(**host.batch([(20,)]).inputs, use_cache=True).past_key_values
    turn = {k: v for k, v in host.batch([(2, IMAGE, 3)]).inputs.items() if k != "attention_mask"}
    with patch(host.model, **ALL["lf"]), pytest.raises(InputError, match="outside its sliding window"):
        host.model(**turn, past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("case", SOME)
def test_anyres_tiles_on_hf(case):
    """Several tiles an image, with newline features between their rows: all of them are image positions."""
    model = hf_next_model()
    generator = torch.Generator().manual_seed(1)
    pixels, sizes = torch.randn(2, 3, 3, 56, 56, generator=generator), torch.tensor([[56, 112], [112, 50]])
    counts = [len(f) for f in features_of(model.model.get_image_features(pixels, sizes))]
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
            states = final_states(
                handle.anatomy.decoder, embeds["x"][i][keep], ids[i][keep] == HF_IMAGE_TOKEN, **ALL[case]
            )
            assert close(logits[i][keep], model.lm_head(states))
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == longest + 3
    assert not close(logits[mask.bool()], stock[mask.bool()])
    assert torch.equal(model(**inputs, position_ids=places(mask)).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
@pytest.mark.parametrize("make", [hf_model, hf_next_model])
def test_copies_of_a_sample_get_the_images_that_the_stock_model_gives_them(make, options):
    """Several images in a sample: transformers from 5.2x on takes them all along, earlier ones mix them up."""
    model = make()
    generator = torch.Generator().manual_seed(1)
    if make is hf_model:
        inputs = {"pixel_values": torch.randn(3, 3, 56, 56, generator=generator)}
        counts = [TOKENS] * 3
    else:
        pixels, sizes = torch.randn(3, 3, 3, 56, 56, generator=generator), torch.tensor([[56, 112], [112, 50], [56, 9]])
        inputs = {"pixel_values": pixels, "image_sizes": sizes}
        counts = [len(f) for f in features_of(model.model.get_image_features(**inputs))]
    one, two, three = ([HF_IMAGE_TOKEN] * n for n in counts)
    rows = [torch.tensor([3, *one, 4, *two, 5]), torch.tensor([6, 7]), torch.tensor([8, *three, 9])]
    longest = max(map(len, rows))
    inputs["input_ids"] = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
    inputs["attention_mask"] = torch.stack([torch.arange(longest) >= longest - len(r) for r in rows]).long()

    def prefill():
        seen = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda m, a, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True
        )
        model.generate(**inputs, max_new_tokens=2, suppress_tokens=[HF_IMAGE_TOKEN], **options)
        hook.remove()
        return seen[0]

    stock = prefill()
    assert len(stock) == 9
    for case in SOME:
        with patch(model, **ALL[case]):
            assert torch.equal(prefill(), stock)


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
            states = final_states(host.decoder, embeds[i][mask[i]], image[i][mask[i]], **ALL[case])
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
            states = final_states(host.decoder, embeds[i][keep], batch.image[i][:limit][keep], **ALL[case])
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
