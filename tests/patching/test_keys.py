"""What a model is: every tensor counts, precision and what is there for training alone do not."""

import copy

import pytest
import torch

from llava_patch import AuxiliaryProbe, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError
from llava_patch.hosts.anatomy import find
from llava_patch.patching.keys import base_fingerprint, model_digest, patch_name, tensors_of, weights_digest
from tests.support import models


@pytest.fixture(params=["hf", "llava"])
def model(request, tmp_path):
    return models.hf_model() if request.param == "hf" else models.llava_model(tmp_path)


def test_norms_biases_and_buffers_count_as_matrices_do(model):
    before = model_digest(find(model))
    vectors = [(n, t) for n, t in tensors_of(find(model)) if t.ndim == 1 and t.is_floating_point()]
    assert len(vectors) > 30 and any(n.endswith("norm.weight") for n, _ in vectors)
    for wanted in ("post_attention_layernorm.weight", "layer_norm1.bias", "inv_freq"):
        tensor = next(t for n, t in vectors if n.endswith(wanted))
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor[len(tensor) // 2] += 0.5
            assert model_digest(find(model)) != before, wanted
            tensor.copy_(kept)
    assert model_digest(find(model)) == before


def test_the_towers_weights_count_once(model):
    names = [name for name, _ in tensors_of(find(model))]
    assert len({id(t) for _, t in tensors_of(find(model))}) == len(names)
    tower = dict(find(model).tower.named_parameters())
    before = model_digest(find(model))
    with torch.no_grad():
        next(iter(tower.values())).add_(0.5)
    assert model_digest(find(model)) != before


def test_precision_does_not_count():
    model = models.hf_model()
    assert model_digest(find(copy.deepcopy(model).bfloat16())) == model_digest(find(model))


def test_the_head_of_the_auxiliary_loss_is_no_part_of_the_model():
    model = models.hf_model()
    handle = patch(model, fusion=SkipLinks(stride=2), probe=AuxiliaryProbe(weight=0.1))
    heads = {n for n, p in model.named_parameters() if any(p is q for q in handle.auxiliary.parameters())}
    assert heads and not heads & {n for n, _ in tensors_of(handle.anatomy)}
    assert not heads & set(base_fingerprint(model, set()))
    names = patch_name(model), model_digest(handle.anatomy)
    with torch.no_grad():
        for parameter in handle.auxiliary.parameters():
            parameter.add_(1.0)
    assert (patch_name(model), model_digest(handle.anatomy)) == names


def test_a_patch_has_a_name_that_its_settings_and_weights_decide():
    model = models.hf_model()
    assert patch_name(model) == ""
    names = set()
    for split in (2, 3):
        with patch(model, routing=Routing(split=split)) as handle:
            names.add(patch_name(model))
            with torch.no_grad():
                handle.methods["routing"].parameters()[-1].add_(0.5)  # a norm
            names.add(patch_name(model))
    assert len(names) == 4 and all(len(name) == 16 for name in names)


def test_whole_digests_see_one_bit_and_the_dtype():
    tensor = torch.arange(10_000.0)
    whole, sampled = weights_digest([("t", tensor)]), weights_digest([("t", tensor)], 64)
    tensor[4321] = torch.nextafter(tensor[4321], torch.tensor(0.0))
    assert weights_digest([("t", tensor)]) != whole and weights_digest([("t", tensor)], 64) == sampled
    assert weights_digest([("t", torch.zeros(4))]) != weights_digest([("t", torch.zeros(4).half())])
    assert weights_digest([("t", torch.zeros(0))]) != weights_digest([("t", torch.zeros(0, 2))])
    assert weights_digest([("t", torch.zeros(2, 3))], 64) != weights_digest([("t", torch.zeros(3, 2))], 64)


def test_a_tensor_outside_memory_is_named():
    with pytest.raises(HostError, match="t lies outside memory"):
        weights_digest([("t", torch.zeros(2, device="meta"))])
