"""What `encode_views` says of tokens, against models whose tokens hold their own patch alone."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from llava_patch import DeepStack, SkipLinks, patch
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.probe.sequence import TokenGrid, patchify
from llava_patch.probe.transform import Transform
from llava_patch.probe.view import View, encode_views, make_transform, target_tokens
from tests.support import models
from tests.support.fusions import ALL, randomise
from tests.support.probes import processor, unique_page
from tests.support.views import PATCH, SIDE, changed_cells, noise, short_sighted, square_model, with_block

FUSIONS = {
    "stock": None,
    "skip": SkipLinks(stride=2),
    "merge": SkipLinks(stride=2, merge_size=2),
    "merge-stack": DeepStack(taps=(2, 5), start=0, interval=1, merge_size=2),
    "sti": ALL["sti"],
}


@pytest.fixture(scope="module", params=["hf", "llava"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.set_num_threads(1)
    return square_model(request.param, folder)


def seen(model, image, mode="resize") -> tuple[View, Transform]:
    anatomy = find(model)
    transform = make_transform(anatomy, processor(), mode)
    return encode_views(anatomy, transform, [image])[0], transform


@pytest.mark.parametrize("name", list(FUSIONS))
def test_targets_are_cut_from_under_their_tokens(model, name):
    """Changing one cell's pixels changes that cell's token and no other token that has a cell."""
    with patch(model, fusion=FUSIONS[name]) if FUSIONS[name] else nullcontext() as handle:
        if FUSIONS[name]:
            randomise(handle)
        page = noise(SIDE, SIDE)
        view, transform = seen(model, page)
        own = view.cells >= 0
        assert sorted(view.cells[own].tolist()) == list(range(view.grid.tokens))
        assert torch.equal(view.positions[own], view.grid.positions()[view.cells[own]].float())
        for cell, (row, column) in enumerate(view.grid.positions().tolist()):
            x, y = column * view.grid.cell, row * view.grid.cell
            other = with_block(page, (x + 2, y + 3, x + view.grid.cell - 1, y + view.grid.cell))
            again, _ = seen(model, other)
            assert changed_cells(transform, view, page, other).nonzero().flatten().tolist() == [cell]
            changed = (again.tokens != view.tokens).any(-1)
            assert torch.equal(changed[own], view.cells[own] == cell)


@pytest.mark.parametrize("merge", [1, 2])
def test_pixels_of_a_page_of_unique_colours(model, merge):
    page = unique_page()
    with patch(model, fusion=SkipLinks(stride=2, merge_size=merge)):
        view, transform = seen(model, page)
        boxes = [transform.box((30.0, 14.5, 41.0, 27.0), page.size, "s")]
    target = target_tokens(view, boxes, "s")
    mean, std = transform.statistics()
    cut = patchify(transform.plane(page)[None], view.grid)[0][view.cells[target]]
    colours = ((cut.unflatten(-1, (-1, 3)) * std + mean) * 255).round().to(torch.uint8)
    expected = [(1, 2)] if merge == 1 else [(0, 1)]
    assert view.positions[target].tolist() == [[float(r), float(c)] for r, c in expected]
    side = PATCH * merge
    for found, (row, column) in zip(colours, expected, strict=True):
        under = np.asarray(page)[row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert np.array_equal(found.numpy().reshape(side, side, 3), under)


def test_sti_tokens_sit_at_the_mean_of_what_they_pool(model):
    """They change with any of their eight patches, and have no pixels of their own."""
    with patch(model, fusion=FUSIONS["sti"]) as handle:
        randomise(handle)
        page = noise(SIDE, SIDE)
        view, transform = seen(model, page)
        assert view.cells.tolist() == [*range(16), -1, -1, -1, -1]
        assert view.positions[16:].tolist() == [[0.5, 1.5], [2.5, 1.5]] * 2  # two rows of four; for each tap
        for cell in (0, 7, 8, 15):
            x, y = cell % 4 * PATCH, cell // 4 * PATCH
            again, _ = seen(model, with_block(page, (x, y, x + PATCH, y + PATCH)))
            changed = (again.tokens != view.tokens).any(-1)[16:]
            assert changed.tolist() == [cell < 8, cell >= 8] * 2
    assert not target_tokens(view, [(0.0, 0.0, 56.0, 56.0)], "s")[16:].any()


@pytest.mark.parametrize("host", ["hf", "llava"])
def test_tokens_over_padding_are_context_only(monkeypatch, tmp_path, host):
    """Merging 2 x 2 of 5 x 5 patches: four whole cells, and five tokens that cover padding as well."""
    odd = models.vision_config()
    odd.image_size = 70
    monkeypatch.setattr(models, "vision_config", lambda: odd)
    model = short_sighted(models.hf_model() if host == "hf" else models.llava_model(tmp_path))
    with patch(model, fusion=SkipLinks(layers=(), merge_size=2, merge_padding=True)):
        page, anatomy = noise(70, 70), find(model)
        transform = make_transform(anatomy, processor(70), "resize")
        view, other = encode_views(anatomy, transform, [page, with_block(page, (30, 0, 56, 28))])
        assert view.grid == TokenGrid(2, 2, 28)
        assert view.cells.tolist() == [0, 1, -1, 2, 3, -1, -1, -1, -1]
        assert view.positions.tolist() == [[r, c] for r in range(3) for c in range(3)]
        assert view.text_start == 3
        assert (view.tokens != other.tokens).any(-1).nonzero().tolist() == [[1]]
        assert torch.equal(transform.plane(page), transform.pixel_values([page])[0, :, :56, :56])
        assert transform.box((10, 10, 70, 20), page.size, "s") == (10, 10, 56, 20)
        with pytest.raises(InputError, match=r"s: box .* has no whole cell of 28 pixels \(merge_padding"):
            transform.box((57, 10, 70, 20), page.size, "s")


def test_a_kept_cls_token_is_context_in_the_middle(model):
    anatomy = find(model)
    if anatomy.host == "hf":
        owner, name, kept = anatomy.model.config, "vision_feature_select_strategy", "full"
    else:
        owner, name, kept = anatomy.tower, "select_feature", "cls_patch"
    before = getattr(owner, name)
    setattr(owner, name, kept)
    try:
        page = noise(SIDE, SIDE)
        for fusion in (None, SkipLinks(stride=2), ALL["sti"]):
            with patch(model, fusion=fusion) if fusion else nullcontext():
                view, _ = seen(model, page)
            assert view.cells[:17].tolist() == [-1, *range(16)]
            assert view.positions[0].tolist() == [1.5, 1.5]
    finally:
        setattr(owner, name, before)


def test_hf_drops_the_first_patch_of_a_tower_without_cls():
    """It stays context-less, and a target there has no token."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    from tests.support.models import HF_IMAGE_TOKEN, TEXT

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(**TEXT), image_token_index=HF_IMAGE_TOKEN,
    )  # fmt: skip
    model = short_sighted(LlavaForConditionalGeneration(config).eval())
    page = noise(SIDE, SIDE)
    view, _ = seen(model, page)
    assert view.cells.tolist() == list(range(1, 16))
    again, _ = seen(model, with_block(page, (PATCH, 0, 2 * PATCH, PATCH)))
    assert (again.tokens != view.tokens).any(-1).nonzero().flatten().tolist() == [0]
    with pytest.raises(InputError, match=r"line 3: no visual token has its pixels under .* drops the tokens"):
        target_tokens(view, [(1.0, 1.0, 9.0, 9.0)], "line 3")
    assert target_tokens(view, [(1.0, 1.0, 20.0, 9.0)], "line 3").nonzero().tolist() == [[0]]
    model.config.vision_feature_select_strategy = "full"
    assert seen(model, page)[0].cells.tolist() == list(range(16))


def test_several_boxes_are_the_union_of_their_tokens(model):
    view, _ = seen(model, noise(SIDE, SIDE))
    boxes = [(3.0, 3.0, 20.0, 10.0), (15.0, 5.0, 30.0, 40.0), (50.0, 50.0, 50.5, 50.5)]
    one_by_one = [target_tokens(view, [box], "s") for box in boxes]
    assert torch.equal(target_tokens(view, boxes, "s"), torch.stack(one_by_one).any(0))
    assert len({tuple(t.tolist()) for t in one_by_one}) == 3


def test_views_of_a_batch_are_those_of_each_image(model):
    pages = [noise(70, 40, 1), noise(33, 90, 2)]
    anatomy = find(model)
    transform = make_transform(anatomy, processor(), "pad")
    for page, view in zip(pages, encode_views(anatomy, transform, pages), strict=True):
        alone = encode_views(anatomy, transform, [page])[0]
        torch.testing.assert_close(alone.tokens, view.tokens)  # other kernel shapes reorder sums


def test_refusals(model):
    anatomy = find(model)
    anatomy.tower.s2_scales = [1, 2]
    with pytest.raises(HostError, match="multi-scale"):
        make_transform(anatomy, processor(), "resize")
    del anatomy.tower.s2_scales
    with pytest.raises(SettingError, match=r'image_mode = "anyres": this model does not cut images into tiles'):
        make_transform(anatomy, processor(), "anyres")
    transform = make_transform(anatomy, processor(), "resize")
    encode = anatomy.encode_images
    owner = anatomy.model if anatomy.host == "llava" else anatomy.wrapper
    name = "encode_images" if anatomy.host == "llava" else "get_image_features"
    for change, error, message in [
        (lambda t: t[:, :13], InputError, "13 visual tokens do not tile a grid of 4 x 4"),
        (lambda t: t * float("nan"), HostError, "visual tokens are not finite"),
    ]:
        tokens = encode(transform.pixel_values([noise(SIDE, SIDE)]))
        setattr(owner, name, lambda *a, change=change, tokens=tokens, **k: change(tokens))
        try:
            with pytest.raises(error, match=message):
                encode_views(anatomy, transform, [noise(SIDE, SIDE)])
        finally:
            delattr(owner, name)


@pytest.mark.parametrize("projector", ["own", "shared"])
def test_deep_stack_brings_what_the_decoder_would_add(monkeypatch, model, projector):
    """The features that the patched model adds to its image positions in a call, of the layers that the probe has."""
    from llava_patch.routing import routed_pass

    page = noise(SIDE, SIDE)
    # Six layers: the probe has 0 and 1.
    with patch(model, fusion=DeepStack(taps=(2, 5, 7), start=0, interval=1, projector=projector)) as handle:
        randomise(handle)
        view, transform = seen(model, page)
        added = []
        monkeypatch.setattr(routed_pass.deep_stack_decoder, "add", lambda h, f, r: added.append((f, r)) or h)
        pixels = transform.pixel_values([page])
        with torch.no_grad():
            if handle.anatomy.host == "llava":
                model(input_ids=torch.tensor([[1, -200, 5]]), images=pixels)
            else:
                model(input_ids=torch.tensor([[1, *[95] * 16, 5]]), pixel_values=pixels)
        assert view.injections.shape == (2, 16, 64)
        assert len(added) == 3
        for mine, (features, rows) in zip(view.injections, added, strict=False):
            assert torch.equal(mine, features[rows[rows > 0] - 1])
        assert not torch.equal(*view.injections)
    assert seen(model, page)[0].injections is None


@pytest.mark.parametrize("mode", ["resize", "pad"])
def test_a_processor_that_pads_by_itself(model, mode):
    """The probe's own modes are what they say, whatever the processor does when left alone."""
    from transformers import LlavaImageProcessor

    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    anatomy = find(model)
    pads, stays = (make_transform(anatomy, LlavaImageProcessor(**size, do_pad=p), mode) for p in (True, False))
    page = noise(2 * SIDE, SIDE)
    assert torch.equal(pads.plane(page), stays.plane(page))
    box = (3.0, 4.0, 20.0, 30.0)
    assert pads.box(box, page.size, "here") == stays.box(box, page.size, "here")


def test_crop_is_refused_where_the_processor_pads(model):
    from transformers import LlavaImageProcessor

    with pytest.raises(SettingError, match=r'LlavaImageProcessor\w* has do_pad = True.*RProbe.image_mode = "pad"'):
        make_transform(find(model), LlavaImageProcessor(do_pad=True), "crop")
    other = processor()
    other.do_pad = True
    with pytest.raises(SettingError, match=r"CLIPImageProcessor\w* has do_pad = True, and where it pads is not known"):
        make_transform(find(model), other, "crop")
