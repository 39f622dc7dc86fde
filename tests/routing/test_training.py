"""Gradients of a routed model: who gets one, and no autograd where nothing trains."""

import contextlib
import dataclasses

import pytest
import torch

from llava_patch import DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import SettingError
from llava_patch.hosts.compat import layer_output
from tests.support.models import IMAGE, LAYERS, TOKENS
from tests.support.routings import ALL

SAMPLES = [(2, IMAGE, 5), (7,), (3, IMAGE, 4)]


def _loss(host, samples=SAMPLES):
    return host.model(**host.batch(samples, labels=True).inputs, use_cache=False).loss


def _with_gradient(model):
    return [n for n, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "settings",
    [
        {"routing": Routing(split=3)},
        {"routing": Routing(split=2, side_layers=2, fusion_layers=2, freeze="side_and_fusion")},
        {"routing": Routing(split=3, freeze="none")},
        {"routing": Routing(split=0)},
        {"routing": Routing(split=1, fusion_layers=(2, 4), freeze="side_and_fusion")},
        {"routing": Routing(variant="pc", split=3)},
        {"routing": Routing(variant="kv", split=2, side_layers=2)},
        {"routing": Routing(variant="kv", split=2, freeze="none")},
        {"routing": Routing(variant="ideal", split=2)},
        {"routing": Routing(variant="vtw", split=2)},
        {"pruning": FastV(layer=2, ratio=0.5, training=True)},
        {"routing": Routing(split=3), "pruning": FastV(layer=2, ratio=1.0, training=True)},
        {"routing": Routing(variant="pc", split=1), "pruning": FastV(layer=3, ratio=0.5, training=True)},
        {"fusion": SkipLinks(stride=2)},
        {"fusion": SkipLinks(stride=2, train_tower="all")},
        {"fusion": SkipLinks(stride=2, detach=0, train_tower=2)},
        {"fusion": SkipLinks(stride=2), "routing": Routing(split=3)},
        {"fusion": SkipLinks(stride=3, train_tower="all"), "routing": Routing(split=3, freeze="none")},
    ],
    ids=str,
)
def test_a_parameter_has_a_gradient_iff_it_is_listed(host, settings):
    handle = patch(host.model, **settings)
    host.model.train()
    _loss(host).backward()
    assert _with_gradient(host.model) == handle.trainable()
    assert handle.trainable()
    handle.remove()


DECODER_LAYER = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight",
    "post_attention_layernorm.weight",
)  # fmt: skip


@pytest.mark.parametrize(
    ("routing", "parts"),
    [
        (Routing(split=3), ["side_branch.0"]),
        (Routing(split=3, fusion_layers=2), ["side_branch.0"]),
        (Routing(split=2, side_layers=2), ["side_branch.0", "side_branch.1"]),
        (Routing(split=3, freeze="side_and_fusion"), ["side_branch.0", "layers.5"]),
        (
            Routing(split=2, side_layers=2, fusion_layers=2, freeze="side_and_fusion"),
            ["side_branch.0", "side_branch.1", "layers.4", "layers.5"],
        ),
        (Routing(split=1, fusion_layers=(2, 4), freeze="side_and_fusion"), ["side_branch.0", "layers.2", "layers.4"]),
    ],
    ids=str,
)
def test_what_a_freeze_strategy_trains_by_name(host, routing, parts):
    """The head, the norm, the embeddings, projector and tower stay frozen, whatever was set to train before."""
    decoder = "model." if host.name == "llava" else "model.language_model."
    wanted = {f"{decoder}{part}.{name}" for part in parts for name in DECODER_LAYER}
    host.model.requires_grad_(True)
    with patch(host.model, routing=routing) as handle:
        names = dict(host.model.named_parameters())
        assert wanted <= set(names) and "lm_head.weight" in names
        assert {name for name, p in names.items() if p.requires_grad} == wanted
        assert set(handle.trainable()) == wanted
        host.model.train()
        _loss(host).backward()
        assert set(_with_gradient(host.model)) == wanted


def test_the_side_branch_learns_through_one_fusion_layer(host):
    with patch(host.model, routing=Routing(split=3)):
        host.model.train()
        _loss(host).backward()
        assert all(p.grad.abs().sum() > 0 for p in host.decoder.side_branch.parameters())


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_no_graph_below_the_split(host, reentrant):
    """Also when checkpointing and enable_input_require_grads make the embeddings require a gradient."""
    host.model.train()
    host.model.enable_input_require_grads()
    if reentrant is not None:
        host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen = {}
    with patch(host.model, routing=Routing(split=3)):
        hooks = [
            layer.register_forward_hook(lambda m, a, out, i=i: seen.update({i: layer_output(out).requires_grad}))
            for i, layer in enumerate(host.decoder.layers)
        ]
        _loss(host).backward()
        assert [seen[i] for i in range(LAYERS - 1)] == [False] * (LAYERS - 1)
        assert all(p.grad is not None for p in host.decoder.side_branch.parameters())
        for hook in hooks:
            hook.remove()


def test_a_gradient_that_is_wanted_below_the_split_is_kept(host):
    for parameter in host.model.parameters():
        parameter.requires_grad_(False)
    with patch(host.model, routing=Routing(split=3)):
        host.model.train()
        host.decoder.layers[0].mlp.down_proj.weight.requires_grad_(True)
        _loss(host).backward()
        assert host.decoder.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("freeze", ["all_but_single", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["lf-k2", "lf-sparse", "pc", "kv", "ideal", "vtw", "fastv", "kv+fastv"])
def test_checkpointing_gives_the_same_gradients(host, case, freeze, reentrant):
    settings = dict(ALL[case])
    if "routing" in settings and freeze != "none" and settings["routing"].variant in ("ideal", "vtw"):
        pytest.skip("refused: nothing to train")
    if "routing" in settings:
        settings["routing"] = dataclasses.replace(settings["routing"], freeze=freeze)
    if "pruning" in settings:
        settings["pruning"] = dataclasses.replace(settings["pruning"], training=True)
    handle = patch(host.model, **settings)
    host.model.train()
    _loss(host).backward()
    plain = {n: p.grad.clone() for n, p in host.model.named_parameters() if p.grad is not None}
    host.model.zero_grad()
    host.model.enable_input_require_grads()
    host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _loss(host).backward()
    again = {n: p.grad for n, p in host.model.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, rtol=1e-4, atol=1e-7), name
    handle.remove()


@pytest.mark.parametrize("variant", ["lf", "pc", "kv"])
def test_a_batch_without_image_is_stock_and_gives_zero_gradients_not_none(host, variant):
    host.model.train()
    samples, passes = [(7,), (4,)], []
    for routing in (None, Routing(variant=variant, split=2, freeze="none")):
        with patch(host.model, routing=routing) if routing else contextlib.nullcontext():
            host.model.zero_grad()
            loss = _loss(host, samples)
            loss.backward()
            passes.append((loss, {n: p.grad for n, p in host.model.named_parameters() if "side_branch" not in n}))
            for parameter in host.decoder.side_branch.parameters() if routing else ():
                assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    (stock, expected), (loss, gradients) = passes
    assert torch.equal(loss, stock)
    for name, gradient in gradients.items():
        assert expected[name] is None if gradient is None else torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("variant", ["lf", "pc", "kv"])
def test_frozen_parameters_do_not_move(host, variant):
    handle = patch(host.model, routing=Routing(variant=variant, split=3))
    host.model.train()
    before = {n: p.detach().clone() for n, p in host.model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in host.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(host).backward()
        optimizer.step()
    trained = set(handle.trainable())
    for name, parameter in host.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    handle.remove()


def _order(host, backward):
    """The names of the parameters in the order in which `backward` gives them a gradient."""
    seen, hooks = [], []
    for name, parameter in host.model.named_parameters():
        if parameter.requires_grad and not (host.name == "hf" and ("projector" in name or "vision" in name)):
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name)))
    host.model.zero_grad()
    backward()
    for hook in hooks:
        hook.remove()
    return seen


ORDERED = {
    **{case: ALL[case] for case in ("lf", "lf-split0", "lf-sparse", "pc", "kv", "vtw", "ideal", "lf+fastv")},
    "kv+fastv-deep": ALL["kv+fastv-deep"],
    "lf, all pruned": {"routing": Routing(split=2), "pruning": FastV(layer=2, ratio=1.0)},
    "kv, all pruned": {"routing": Routing(variant="kv", split=2), "pruning": FastV(layer=2, ratio=1.0)},
    "kv, all pruned later": {"routing": Routing(variant="kv", split=2), "pruning": FastV(layer=4, ratio=1.0)},
    "pc, all pruned": {"routing": Routing(variant="pc", split=2), "pruning": FastV(layer=2, ratio=1.0)},
    "lf, deep stack": {"routing": Routing(split=4), "fusion": DeepStack(start=0, interval=1)},
    "skip links": {"fusion": SkipLinks(stride=2, train_tower="all")},
}


@pytest.mark.parametrize(("reentrant", "freeze"), [(None, None), (None, "none"), (True, "none")])
@pytest.mark.parametrize("case", ORDERED)
def test_a_batch_with_images_in_some_ranks_only(host, case, reentrant, freeze):
    """The same parameters get a gradient with and without an image, in the same order.

    No rank waits for another, and ZeRO-2's buckets, flat and filled as gradients come, hold the same ones on all.
    """
    settings = dict(ORDERED[case])
    if "pruning" in settings:
        settings["pruning"] = dataclasses.replace(settings["pruning"], training=True)
    if "routing" in settings:
        settings["routing"] = dataclasses.replace(settings["routing"], freeze=freeze)
    with patch(host.model, **settings):
        host.model.train()
        if reentrant is not None:
            host.model.enable_input_require_grads()
            host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        batches = [(7,), (4,)], SAMPLES, [(2, IMAGE, 5)]
        orders = []
        for samples in batches:
            batch = host.batch(samples, labels=True)
            batch.inputs["labels"][:, :-2] = -100  # as in a prompt: what pruning drops is not read
            orders.append(_order(host, lambda batch=batch: host.model(**batch.inputs, use_cache=False).loss.backward()))
        assert orders[0] and orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("host", ["hf"], indirect=True)
def test_a_training_pass_that_reads_only_the_end_keeps_the_order_too(host):
    """Not every rank may spare the last layer the other positions: one has padding at the end."""
    with patch(host.model, routing=Routing(split=3, freeze="none")):
        host.model.train()
        orders = []
        for samples in ([(2, IMAGE, 5)], [(2, IMAGE, 5), (7,)], [(7,)]):
            batch = host.batch(samples)
            orders.append(_order(host, lambda batch=batch: host.logits(batch, logits_to_keep=2).sum().backward()))
        assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("split", [0, 3])
def test_ideal_teaches_the_side_branch_nothing(host, split):
    """No text position sees its output; where an image position is read, it does learn."""
    with patch(host.model, routing=Routing(variant="ideal", split=split)):
        host.model.train()
        batch = host.batch([(2, IMAGE, 5), (7,)], labels=True)
        start = 1 if host.name == "llava" else TOKENS
        batch.inputs["labels"][0, 2 + start] = -100  # the label behind the image is read from the image's last position
        host.model(**batch.inputs, use_cache=False).loss.backward()
        for parameter in host.decoder.side_branch.parameters():
            assert parameter.grad is None or not parameter.grad.any()
        _loss(host).backward()
        assert any(p.grad.any() for p in host.decoder.side_branch.parameters())


@pytest.mark.parametrize("variant", ["ideal", "vtw"])
def test_nothing_to_train_is_refused(variant):
    for freeze in ("all_but_single", "side_and_fusion"):
        with pytest.raises(SettingError, match=f'Routing.freeze = "{freeze}" leaves nothing to train: {variant}'):
            Routing(variant=variant, freeze=freeze)


@pytest.mark.parametrize("case", ["lf", "kv", "ideal", "vtw", "fastv", "lf+fastv"])
def test_a_caption_right_behind_an_image_is_read_from_its_last_position(host, case):
    """Stage 1's captions: the first label belongs to the image's last position, which no saving may lose."""
    settings = dict(ALL[case])
    if "pruning" in settings:
        settings["pruning"] = FastV(layer=settings["pruning"].layer, ratio=1.0, training=True)
    batch = host.batch([(1, IMAGE, 3)], labels=True)
    batch.inputs["labels"][:, :1] = -100
    batch.inputs["labels"][:, -2:] = -100  # only the label right behind the image is left
    with patch(host.model, **settings):
        host.model.train()
        states = host.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        loss = host.model(**batch.inputs, use_cache=False).loss
        if "fastv" in case:
            survivors = ~states[LAYERS - 1][..., 0].isnan() & batch.image
            if case == "fastv":
                assert survivors.nonzero().tolist() == [[0, TOKENS]]
        logits = host.model.lm_head(states[-1])[0, TOKENS]
        label = batch.inputs["labels"][batch.inputs["labels"] != -100]
        assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits[None], label), rtol=1e-5)


def test_pruning_is_off_in_training_unless_asked(host):
    batch = host.batch(SAMPLES, labels=True)
    host.model.train()
    stock = host.model(**batch.inputs, use_cache=False).logits
    with patch(host.model, pruning=FastV(layer=2, ratio=0.5)):
        assert torch.equal(host.model(**batch.inputs, use_cache=False).logits, stock)
        host.model.eval()
        assert not torch.equal(host.model(**batch.inputs, use_cache=False).logits, stock)
        host.model.train()
    with patch(host.model, pruning=FastV(layer=2, ratio=0.5, training=True)):
        assert not torch.equal(host.model(**batch.inputs, use_cache=False).logits, stock)
