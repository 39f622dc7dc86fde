"""Every decoder that routing is available on, on both hosts: the identities hold on each of them."""

import pytest
import torch

from llava_patch import DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.routing.reference import final_states
from tests.support import decoders
from tests.support.models import IMAGE, LAYERS, TOKENS, VIDEO, close, set_attention
from tests.support.routings import ALL, RAGGED, again, embeddings, extend, places

VIDEOS = [(2, IMAGE, 5), (1, VIDEO, 4), (3, IMAGE, 1, VIDEO, 2, IMAGE, 4), (7,)]
SOME = ["lf", "lf-k2", "lf-sparse", "pc", "kv", "ideal", "vtw", "fastv", "lf+fastv", "kv+fastv-deep"]


@pytest.fixture(params=decoders.BOTH_HOSTS, ids="-".join)
def host(request, tower_folder):
    return decoders.build(*request.param, tower_folder)


@pytest.fixture
def samples(host):
    """What the host takes: videos too, beside images, alone, and in one sample with them."""
    return VIDEOS if getattr(host, "takes_videos", False) else RAGGED


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(split=LAYERS - 1),
        Routing(split=LAYERS - 2, fusion_layers=2),
        Routing(variant="pc", split=LAYERS - 1),
        Routing(variant="kv", split=LAYERS - 1),
    ],
    ids=["lf", "lf-k2", "pc", "kv"],
)
def test_a_silent_side_branch_is_stock(host, samples, routing, padding):
    batch = host.batch(samples, padding)
    stock = host.logits(batch)
    with patch(host.model, routing=routing):
        assert not close(host.logits(batch)[batch.valid], stock[batch.valid])
        decoders.silence(host.decoder)
        assert close(host.logits(batch)[batch.valid], stock[batch.valid])
    assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"pruning": FastV(layer=2, ratio=0.0)},
        {"routing": Routing(variant="vtw", split=LAYERS)},
        {"routing": Routing(split=LAYERS)},
        {"fusion": DeepStack(start=1, interval=1)},
        {"fusion": SkipLinks(stride=2)},
    ],
    ids=["fastv-0", "vtw-L", "lf-L", "stack", "skip"],
)
def test_what_leaves_nothing_out_is_stock(host, samples, settings):
    batch = host.batch(samples, "left")
    stock = host.logits(batch)
    with patch(host.model, **settings):
        assert torch.equal(host.logits(batch)[batch.valid], stock[batch.valid])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_variant_is_its_definition_and_its_own_cache(host, samples, attention):
    """A window counts positions of the whole sequence, also where a layer sees a part of it."""
    set_attention(host.model, attention)
    left, right = host.batch(samples, "left"), host.batch(samples, "right")  # llava pads as the last one was made
    embeds = embeddings(host, right)
    tokens = torch.randint(3, 90, (len(samples), 3), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([left.valid.long(), torch.ones_like(tokens)], 1)

    def ids(mask, last=0):
        return {"position_ids": places(mask)[:, -last:]} if host.name == "hf" else {}

    for case in SOME:
        with patch(host.model, **ALL[case]) as handle:
            host.batch(samples, "right")
            logits = host.logits(right, use_cache=False)
            for i in range(len(samples)):
                keep = right.valid[i]
                states = final_states(host.decoder, embeds[i][keep], right.image[i][keep], **ALL[case])
                assert close(logits[i][keep], host.model.lm_head(states)), (case, i)
            host.batch(samples, "left")
            out = host.model(**left.inputs, use_cache=True, **ids(left.valid))
            for step in range(3):
                seen = mask[:, : left.valid.shape[1] + step + 1]
                out = host.model(
                    input_ids=tokens[:, step : step + 1], attention_mask=seen, past_key_values=out.past_key_values,
                    use_cache=True, **ids(seen, 1),
                )  # fmt: skip
            with again(handle, out.past_key_values):
                whole = host.model(**extend(left, tokens), use_cache=False, **ids(mask)).logits
            assert close(out.logits[:, -1], whole[:, -1]), case


@torch.no_grad()
def test_lean_generation_reads_what_a_plain_forward_gives(host):
    batch = host.batch([(2, IMAGE, 5), (1, IMAGE, 9), (4, IMAGE)], "left")
    if "image_sizes" in batch.inputs and host.name == "llava":  # LLaVA-NeXT's Mistral generates for one sample alone
        batch = host.batch([(4, IMAGE)])
    inputs = dict(batch.inputs)
    prompt = inputs.pop("input_ids")
    extra = {"position_ids": places(batch.valid)} if host.name == "hf" else {}
    for case in SOME:
        with patch(host.model, **ALL[case]):
            out = host.model.generate(
                prompt, **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            whole = host.model(**batch.inputs, **extra, use_cache=False).logits[:, -1]
        assert close(out.scores[0], whole), case


@torch.no_grad()
@pytest.mark.parametrize("host", decoders.ONE_TILE, indirect=True, ids="-".join)
def test_deepstack_is_the_stock_decoder_with_the_taps_added_by_hand(host):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, fusion=DeepStack(taps=(2, 5), start=1, interval=2)) as handle:
        own = getattr(handle.anatomy.projector_owner, handle.anatomy.stack_name)
        for parameter in own.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        logits = host.logits(batch, use_cache=False)
        states = handle.anatomy.vision_model(next(v for v in batch.inputs.values() if v.ndim == 4),
                                             output_hidden_states=True).hidden_states  # fmt: skip
        taps = {1: own(states[2][:, 1:]), 3: own(states[5][:, 1:])}

    def adding(tap):
        def hook(module, args):
            hidden = args[0].clone()
            hidden[:, 2 : 2 + TOKENS] += tap
            return (hidden, *args[1:])

        return hook

    for number, tap in taps.items():
        host.decoder.layers[number].register_forward_pre_hook(adding(tap))
    assert close(logits, host.logits(batch, use_cache=False))


@pytest.mark.parametrize("case", ["lf", "kv"])
def test_the_side_branch_learns_and_nothing_else(host, case):
    handle = patch(host.model, **ALL[case])
    host.model.train()
    batch = host.batch([(2, IMAGE, 5), (7,), (3, IMAGE, 4)], labels=True)
    host.model(**batch.inputs, use_cache=False).loss.backward()
    assert [n for n, p in host.model.named_parameters() if p.grad is not None] == handle.trainable()
    biases = [p.grad for n, p in host.decoder.side_branch.named_parameters() if n.endswith("v_proj.bias")]
    assert all(g.any() for g in biases)
    handle.remove()
