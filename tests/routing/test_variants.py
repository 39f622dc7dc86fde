"""Every variant against its definition and its identity partners, whatever the weights."""

import pytest
import torch

from llava_patch import FastV, Routing, SkipLinks, patch
from llava_patch.routing.reference import final_states
from tests.support.models import IMAGE, LAYERS, close, set_attention, silence_side_branch
from tests.support.routings import ALL, PRUNED, RAGGED, VARIANTS, alone, embeddings

EDGES = [(IMAGE, 4), (3, IMAGE), (2, IMAGE, IMAGE, 3), (5,), (1, IMAGE, 1, IMAGE)]


def _text(batch):
    return batch.valid & ~batch.image


@torch.no_grad()
@pytest.mark.parametrize("samples", [RAGGED, EDGES], ids=["ragged", "edges"])
@pytest.mark.parametrize("case", ALL)
def test_a_variant_is_what_its_definition_says(host, case, samples):
    """Also images at the very start and end, and two with no text between them."""
    batch = host.batch(samples, "right")
    embeds = embeddings(host, batch)
    with patch(host.model, **ALL[case]):
        _assert_as_defined(host, batch, embeds, ALL[case])


def _assert_as_defined(host, batch, embeds, settings):
    logits = host.logits(batch, use_cache=False)
    for i in range(len(batch.valid)):
        keep = batch.valid[i]
        states = final_states(host.decoder, embeds[i][keep], batch.image[i][keep], **settings)
        assert close(logits[i][keep], host.model.lm_head(states)), i


@torch.no_grad()
@pytest.mark.parametrize("case", ["lf", "kv", "vtw", "lf+fastv", "lf+pyramid"])
def test_routing_takes_what_a_fusion_of_vision_layers_gives(host, case):
    batch = host.batch(RAGGED, "right")
    stock = embeddings(host, batch)
    with patch(host.model, fusion=SkipLinks(stride=2), zero_start=False, **ALL[case]):
        embeds = embeddings(host, batch)
        assert not close(embeds[batch.image], stock[batch.image])
        _assert_as_defined(host, batch, embeds, ALL[case])


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("case", ALL)
def test_a_padded_batch_gives_each_sample_what_it_gets_alone(host, case, padding):
    with patch(host.model, **ALL[case]):
        batch = host.batch(RAGGED, padding)
        together = host.logits(batch)
        for i in range(len(RAGGED)):
            assert close(together[i][batch.valid[i]], host.logits(alone(host, RAGGED, i))[0]), i


@torch.no_grad()
@pytest.mark.parametrize("case", ALL)
def test_a_batch_without_image_is_stock(host, case):
    batch = host.batch([(9,), (4,)])
    stock = host.logits(batch)
    ragged = host.logits(host.batch(RAGGED))
    with patch(host.model, **ALL[case]):
        assert torch.equal(host.logits(batch), stock)
        assert not torch.equal(host.logits(host.batch(RAGGED)), ragged)
    assert torch.equal(host.logits(host.batch(RAGGED)), ragged)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lf", "pc", "kv", "ideal", "vtw"])
def test_split_at_the_end_is_stock(host, variant):
    batch = host.batch(RAGGED)
    stock = host.logits(batch)
    before = set(vars(host.decoder))
    with patch(host.model, routing=Routing(variant=variant, split=LAYERS), pruning=FastV(layer=1, ratio=0)):
        # Its forward is the stock one, which torch.compile follows; and it refuses to be copied.
        assert set(vars(host.decoder)) - {"forward", "__reduce_ex__"} == before
        assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pc", "kv"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_silent_side_branch_at_the_last_layer_is_stock(host, variant, padding):
    batch = host.batch(RAGGED, padding)
    stock = host.logits(batch)
    with patch(host.model, routing=Routing(variant=variant, split=LAYERS - 1)):
        assert not close(host.logits(batch)[batch.valid], stock[batch.valid])
        silence_side_branch(host.decoder)
        assert close(host.logits(batch)[batch.valid], stock[batch.valid])


@torch.no_grad()
@pytest.mark.parametrize("split", [0, 2, 4])
@pytest.mark.parametrize("pair", [("pc", "kv"), ("ideal", "vtw")], ids="=".join)
def test_partners_agree_at_text_positions(host, pair, split):
    batch = host.batch(RAGGED, "left")
    first, second = (_logits(host, batch, Routing(variant=v, split=split)) for v in pair)
    text = _text(batch)
    assert close(first[text], second[text])
    assert not close(first[text], _logits(host, batch, Routing(split=split))[text])
    if pair == ("pc", "kv"):  # also at the image positions, whose last layer is a full one
        assert close(first[batch.valid], second[batch.valid])


def _logits(host, batch, routing):
    with patch(host.model, routing=routing):
        return host.logits(batch)


@torch.no_grad()
def test_sparse_fusion_over_the_last_layers_is_the_count(host):
    batch = host.batch(RAGGED, "left")
    count = _logits(host, batch, Routing(split=2, fusion_layers=2))
    named = _logits(host, batch, Routing(split=2, fusion_layers=(LAYERS - 2, LAYERS - 1)))
    assert torch.equal(count, named)


@torch.no_grad()
@pytest.mark.parametrize("case", VARIANTS)
def test_layers_below_the_split_are_stock(host, case):
    batch = host.batch(RAGGED)
    split = VARIANTS[case]["routing"].split
    stock = host.model(**batch.inputs, output_hidden_states=True).hidden_states
    with patch(host.model, **VARIANTS[case]):
        routed = host.model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(routed) == len(stock) == LAYERS + 1
    for layer in range(split + 1):
        assert torch.equal(routed[layer], stock[layer])
    assert not torch.equal(routed[split + 1][_text(batch)], stock[split + 1][_text(batch)])


@torch.no_grad()
@pytest.mark.parametrize("case", ["ideal", "kv", "pc", "lf+fastv", "fastv"])
def test_hidden_states_are_nan_exactly_where_a_position_is_absent(host, case):
    batch = host.batch(RAGGED)
    with patch(host.model, **ALL[case]) as handle:
        program = handle.program()
        states = host.model(**batch.inputs, output_hidden_states=True).hidden_states
        logits = host.logits(batch)
    for layer in range(LAYERS - 1):
        seen = states[layer + 1]
        assert not seen[_text(batch)].isnan().any()
        absent = seen[batch.image].isnan().all(-1)
        if program.modes[layer].name in ("TEXT", "KEYS"):
            assert absent.all()
        elif program.prune_at is not None and layer >= program.prune_at:
            kept = torch.tensor([4.0, 8, 4] if case == "lf+fastv" else [8.0, 16, 8])
            assert (~seen[..., 0].isnan() & batch.image).sum(1).float()[[0, 1, 3]].equal(kept)
        else:
            assert not absent.any()
    assert not states[LAYERS][batch.valid].isnan().any()
    assert torch.equal(host.model.lm_head(states[LAYERS])[batch.valid], logits[batch.valid])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", [*VARIANTS, "lf+fastv", "kv+fastv-deep"])
def test_attention_backends_agree(host, case, attention):
    batch = host.batch(RAGGED, "left")
    with patch(host.model, **ALL[case]):
        set_attention(host.model, "eager")
        eager = host.logits(batch)
        set_attention(host.model, attention)
        assert close(host.logits(batch)[batch.valid], eager[batch.valid])


@torch.no_grad()
@pytest.mark.parametrize("host", ["hf"], indirect=True)  # llava's forward has no logits_to_keep; its generate is below
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("samples", [RAGGED, EDGES, [(2, IMAGE, 5), (2, IMAGE, 5)]], ids=["ragged", "edges", "even"])
@pytest.mark.parametrize("case", ALL)
def test_the_last_positions_alone_are_those_of_the_whole(host, case, samples, padding):
    """Lean fusion: what is read is what a plain forward gives, whatever is left out for it."""
    batch = host.batch(samples, padding)
    with patch(host.model, **ALL[case]):
        for keep in (1, 3):
            if padding == "right" and "fastv" in case:
                continue  # another last token
            whole = host.logits(batch, use_cache=False)[:, -keep:]
            lean = host.logits(batch, logits_to_keep=keep)
            assert lean.shape[1] == keep
            valid = batch.valid[:, -keep:]
            if "fastv" in case and keep == 3:
                valid = valid & ~batch.image[:, -keep:]  # a plain forward protects the last position only
            assert close(lean[valid], whole[valid])


@torch.no_grad()
@pytest.mark.parametrize("case", ALL)
def test_the_first_generated_token_comes_from_the_whole_forward(host, case):
    batch = host.batch([(2, IMAGE, 5), (1, IMAGE, 9), (4, IMAGE)], "left")
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    with patch(host.model, **ALL[case]):
        out = host.model.generate(
            ids, **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        position_ids = {"position_ids": (batch.valid.long().cumsum(-1) - 1).clamp(min=0)} if host.name == "hf" else {}
        whole = host.model(**batch.inputs, **position_ids, use_cache=False).logits[:, -1]
    assert close(out.scores[0], whole)


def test_lean_calls_ask_only_where_somebody_reads(host):
    """What the last layer's MLP computes: every position on a plain forward, one a sample in generation."""
    batch = host.batch([(2, IMAGE, 5), (1, IMAGE, 6)], "left")
    seen = []
    hook = host.decoder.layers[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    plain = {"lf": 23, "lf-k2": 23, "lf-sparse-last": 23, "pc": 23, "kv": 23, "vtw": 7, "lf-sparse": 7, "fastv": 15}
    for case, whole in plain.items():
        with patch(host.model, **ALL[case]), torch.no_grad():
            seen.clear()
            host.model(**batch.inputs)
            assert seen == [whole], case
            seen.clear()
            host.model.generate(ids, **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            assert seen == [1, 1], case
    hook.remove()


def test_the_last_of_sparse_fusion_layers_asks_for_text_alone(host):
    """Nobody reads its image output once generation has said that it samples from text."""
    batch = host.batch([(2, IMAGE, 5), (1, IMAGE, 6)], "left")
    seen = {2: [], 4: []}
    for number, counts in seen.items():
        mlp = host.decoder.layers[number].mlp
        mlp.register_forward_pre_hook(lambda module, args, counts=counts: counts.append(args[0].shape[1]))
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    with patch(host.model, routing=Routing(split=1, fusion_layers=(2, 4))):
        host.model.generate(ids, **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == {2: [23, 1], 4: [7, 1]}


LEFT = {  # of two images of 16 tokens in the longest sample: before, and after each stage
    "fastv": (32, 16), "fastv-last": (32, 10), "lf+fastv": (32, 8), "lf+fastv-at-split": (32, 16),
    "pc+fastv": (32, 16), "pc+fastv-deep": (32, 16), "kv+fastv": (32, 4), "kv+fastv-deep": (32, 16),
    "ideal+fastv": (32, 16), "vtw+fastv": (32, 16), "fastv-all": (32, 0), "lf+fastv-all": (32, 0),
    "pyramid": (32, 24, 16, 4), "lf+pyramid": (32, 16, 8), "kv+pyramid-deep": (32, 25, 9),
    "sparse": (32, 12, 9, 3), "lf+sparse": (32, 16, 8),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", PRUNED)
def test_pruning_leaves_the_counts_that_it_promises(host, case):
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)], "left")
    pruning = PRUNED[case]["pruning"]
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, kw, i=i: seen.update({i: a[0].shape[1]}), with_kwargs=True)
        for i, layer in enumerate(host.decoder.layers)
    ]
    with patch(host.model, **PRUNED[case]) as handle:
        host.model(**batch.inputs)
        program = handle.program()
    for hook in hooks:
        hook.remove()
    for layer, tokens in seen.items():
        if program.modes[layer].name == "TEXT" or (program.modes[layer].name == "KEYS" and layer < LAYERS - 1):
            assert tokens == 8
        else:
            assert tokens == 8 + LEFT[case][sum(k <= layer for k in pruning.stages)]
