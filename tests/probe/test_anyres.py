"""Tiles of anyres on both hosts: what `encode_views` and `Transform` say, against the hosts' own code."""

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, LlavaOnevisionImageProcessor

from llava_patch import DeepStack, DenseConnector, SkipLinks, patch
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.probe.sequence import patchify
from llava_patch.probe.view import encode_views, make_transform, target_tokens
from tests.support.fusions import randomise
from tests.support.models import features_of
from tests.support.probes import processor, unique_page
from tests.support.views import SIDE, anyres_model, changed_cells, encode, noise, paper_with_rectangle, with_block

SIZES = [(56, 56), (61, 100), (130, 40), (112, 112), (200, 96), (40, 250)]


@pytest.fixture(scope="module", params=["hf", "llava"])
def case(request, tmp_path_factory):
    return anyres_model(request.param, tmp_path_factory.mktemp("tower"))


def merge_types(model):
    if find(model).host == "hf":
        yield None
        return
    for name in ("spatial_unpad", "spatial", "flat"):
        model.config.mm_patch_merge_type = name
        yield name
    model.config.mm_patch_merge_type = "spatial_unpad"


def block_in(size, left=0.45, top=0.4, right=0.7, bottom=0.6):
    width, height = size
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


@pytest.mark.parametrize("size", SIZES)
def test_targets_are_cut_from_under_their_tokens(case, size):
    """Of two pages that differ in a block, exactly those tokens differ whose cells' pixels do."""
    model, image_processor = case
    anatomy = find(model)
    transform = make_transform(anatomy, image_processor, "anyres")
    page, box = noise(*size), block_in(size)
    other = with_block(page, box)
    for _ in merge_types(model):
        view, again = encode_views(anatomy, transform, [page, other])
        own = view.cells >= 0
        assert own.sum() == len(view.cells[own].unique())
        assert torch.equal(view.positions[own], view.grid.positions()[view.cells[own]].float())
        changed = (view.tokens != again.tokens).any(-1)
        cells = changed_cells(transform, view, page, other)
        assert 0 < changed[own].sum() < own.sum() or size == (56, 56)
        assert torch.equal(changed[own], cells[view.cells[own]])
        # The overview's tokens that see the block lie where the block does.
        assert torch.equal(own, torch.arange(len(own)) >= 16) or find(model).model.config.mm_patch_merge_type == "flat"
        there, here = view.positions[~own & changed].mean(0), view.positions[own & changed].mean(0)
        one_token = torch.tensor([view.grid.rows, view.grid.columns]) / 4
        assert ((there - here).abs() <= one_token).all()


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_the_hosts_without_line_ends(case, size):
    model, image_processor = case
    anatomy = find(model)
    transform = make_transform(anatomy, image_processor, "anyres")
    page = noise(*size)
    for _ in merge_types(model):
        view = encode_views(anatomy, transform, [page])[0]
        tiles = transform.tiling.cut(image_processor, page)
        with torch.no_grad():
            if anatomy.host == "hf":
                sizes = torch.tensor([size[::-1]])
                given = features_of(model.model.get_image_features(tiles[None], sizes))[0]
                newline = model.model.image_newline
            else:
                ids = torch.tensor([[7, -200]])
                given = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [tiles], [size])[4]
                given, newline = given[0, 1:], model.model.image_newline
        ends = (given == newline).all(-1)
        assert torch.equal(view.tokens, given[~ends])


def test_what_the_host_cuts_off_has_no_token(case):
    model, image_processor = case
    anatomy = find(model)
    transform = make_transform(anatomy, image_processor, "anyres")
    counts = {}
    for name in merge_types(model):
        view = encode_views(anatomy, transform, [noise(61, 100)])[0]
        counts[name] = int((view.cells >= 0).sum())
        # The image is 69 of 112 pixels wide, from 21 on; the host keeps columns 2 to 5, pixels 28 to 84.
        box = transform.box((0.0, 10.0, 5.0, 20.0), (61, 100), "s")
        assert box[0] == pytest.approx(21)
        if counts[name] == 64:
            target_tokens(view, [box], "s")
            continue
        with pytest.raises(InputError, match="drops the tokens that would cover it"):
            target_tokens(view, [box], "s")
    assert counts == ({None: 32} if anatomy.host == "hf" else {"spatial_unpad": 32, "spatial": 64, "flat": 64})


def test_pixels_of_a_page_of_unique_colours(case):
    """At the size of a plane nothing is resized: each target's pixels are the page's own."""
    model, image_processor = case
    anatomy = find(model)
    transform = make_transform(anatomy, image_processor, "anyres")
    page = unique_page(112, 112)
    view = encode_views(anatomy, transform, [page])[0]
    target = target_tokens(view, [transform.box((50, 20, 75, 30), page.size, "s")], "s")
    assert view.positions[target].tolist() == [[r, c] for r in (1, 2) for c in (3, 4, 5)]  # across two tiles
    mean, std = transform.statistics()
    cut = patchify(transform.plane(page)[None], view.grid)[0][view.cells[target]]
    colours = ((cut.unflatten(-1, (-1, 3)) * std + mean) * 255).round().to(torch.uint8)
    for found, (row, column) in zip(colours, view.positions[target].int().tolist(), strict=True):
        under = np.asarray(page)[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        assert np.array_equal(found.numpy().reshape(14, 14, 3), under)


@pytest.mark.parametrize("size", [*SIZES, (131, 257), (500, 333), (37, 300)])
def test_a_box_lands_on_the_same_content(case, size):
    model, image_processor = case
    transform = make_transform(find(model), image_processor, "anyres")
    box = block_in(size)
    mean, std = transform.statistics()
    plane = transform.plane(paper_with_rectangle(size, box))
    assert plane.dtype == torch.float32
    assert tuple(plane.shape[1:]) == transform.plane_size(size)
    red = ((plane[0] * std[0] + mean[0]) - 122 / 255) / (1 - 122 / 255)
    rows, columns = (red > 0.5).nonzero(as_tuple=True)
    x0, y0, x1, y1 = transform.box(box, size, "s")
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    # Half of the colour's rise lies at the box's edge.
    assert all(abs(float(a) - b) <= 1 for a, b in zip(found, (x0, y0, x1, y1), strict=True))


def test_square_modes_show_the_overview_alone(case):
    model, image_processor = case
    anatomy = find(model)
    page = noise(100, 60)
    transform = make_transform(anatomy, image_processor, "resize")
    view = encode_views(anatomy, transform, [page])[0]
    assert view.cells.tolist() == list(range(16))
    tiles = make_transform(anatomy, image_processor, "anyres").tiling.cut(image_processor, page)
    torch.testing.assert_close(transform.pixel_values([page])[0], tiles[0], atol=0.02, rtol=0)  # rounding to 8 bits
    assert torch.equal(view.tokens, encode(anatomy, transform.pixel_values([page]))[0])
    pad = make_transform(anatomy, image_processor, "pad")
    assert pad.box((10, 10, 20, 20), (100, 60), "s") == pytest.approx((5.6, 16.8, 11.2, 22.4))
    red = (pad.plane(paper_with_rectangle((100, 60), (20, 20, 60, 40)))[0] > 0.97).nonzero()  # half of its red
    assert red.min(0).values.tolist() == [22, 11]  # rows 22.4 to 33.6, columns 11.2 to 33.6
    assert red.max(0).values.tolist() == [33, 33]


def test_deep_stack_on_tiles(monkeypatch, case):
    """Every token gets the tap of its own tile and place, as in a call of the patched model."""
    from llava_patch.routing import routed_pass

    model, image_processor = case
    page = noise(61, 100)
    with patch(model, fusion=DeepStack(taps=(2, 5, 7), start=0, interval=1)) as handle:
        randomise(handle)
        anatomy = handle.anatomy
        transform = make_transform(anatomy, image_processor, "anyres")
        view = encode_views(anatomy, transform, [page])[0]
        tiles = transform.tiling.cut(image_processor, page)
        added = []
        monkeypatch.setattr(routed_pass.deep_stack_decoder, "add", lambda h, f, r: added.append((f, r)) or h)
        with torch.no_grad():
            if anatomy.host == "llava":
                model(input_ids=torch.tensor([[1, -200, 5]]), images=[tiles], image_sizes=[page.size])
            else:
                sizes = torch.tensor([page.size[::-1]])
                count = len(features_of(model.model.get_image_features(tiles[None], sizes))[0])
                ids = torch.tensor([[1, *[95] * count, 5]])
                model(input_ids=ids, pixel_values=tiles[None], image_sizes=sizes)
        assert view.injections.shape == (2, len(view.cells), 64)
        assert not torch.equal(*view.injections)
        for mine, (features, rows) in zip(view.injections, added, strict=False):
            theirs = features[rows[rows > 0] - 1]
            assert torch.equal(mine, theirs[theirs.any(-1)])  # line ends, which R-Probe leaves out, take nothing


def test_other_tokens_on_flat_tiles(tmp_path):
    """llava's flat layout counts nothing, so merged patches and STI work on tiles too."""
    model, image_processor = anyres_model("llava", tmp_path, "flat")
    anatomy = find(model)
    page = noise(112, 56)
    other = with_block(page, (60, 30, 80, 50))  # in the right one of two tiles
    for fusion, tokens in (
        (SkipLinks(stride=2, merge_size=2), 4),
        (DenseConnector(kind="sti", groups=(2, 5)), 20),
    ):
        with patch(model, fusion=fusion) as handle:
            randomise(handle)
            transform = make_transform(anatomy, image_processor, "anyres")
            view, again = encode_views(anatomy, transform, [page, other])
        assert len(view.cells) == 3 * tokens
        own = view.cells >= 0
        changed = (view.tokens != again.tokens).any(-1)
        assert torch.equal(changed[own], changed_cells(transform, view, page, other)[view.cells[own]])
        assert not changed[tokens : 2 * tokens].any()
        assert changed[2 * tokens :].any()
        if tokens == 20:
            assert view.positions[36:40].tolist() == [[0.5, 1.5], [2.5, 1.5]] * 2
            assert view.positions[56:60].tolist() == [[0.5, 5.5], [2.5, 5.5]] * 2


def test_no_limit_of_the_prompt_cuts_the_image(case):
    model, image_processor = case
    anatomy = find(model)
    transform = make_transform(anatomy, image_processor, "anyres")
    whole = encode_views(anatomy, transform, [noise(112, 112)])[0]
    model.config.tokenizer_model_max_length = 20
    before = dict(vars(model.config)), set(vars(model))
    cut = encode_views(anatomy, transform, [noise(112, 112)])[0]
    assert torch.equal(whole.tokens, cut.tokens)
    assert (dict(vars(model.config)), set(vars(model))) == before
    del model.config.tokenizer_model_max_length


@pytest.mark.parametrize("host", ["hf", "llava"])
def test_half_precision(host, tmp_path):
    """Tokens keep the model's precision, and the order of tokens does not suffer from it."""
    model, image_processor = anyres_model(host, tmp_path)
    page = noise(200, 96)
    transform = make_transform(find(model), image_processor, "anyres")
    expected = encode_views(find(model), transform, [page])[0]
    with torch.inference_mode():
        found = encode_views(find(model.bfloat16()), transform, [page])[0]
    assert found.tokens.dtype == torch.bfloat16
    assert torch.equal(found.cells, expected.cells)
    assert torch.equal(found.positions, expected.positions)
    torch.testing.assert_close(found.tokens.float(), expected.tokens, atol=0.1, rtol=0.1)  # eight bits of mantissa


def test_refusals(case, tmp_path):
    model, image_processor = case
    anatomy = find(model)
    hf = anatomy.host == "hf"
    other = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    with pytest.raises(HostError, match="LlavaNextImageProcessor" if hf else "size = 28, crop_size = 28 is not the"):
        make_transform(anatomy, other, "anyres")
    if hf:
        with pytest.raises(HostError, match="LlavaNextImageProcessor"):
            make_transform(anatomy, processor(), "anyres")
        with pytest.raises(SettingError, match=r'image_mode = "crop": LlavaNextImageProcessor\w* has no centre crop'):
            make_transform(anatomy, image_processor, "crop")
        image_processor.image_grid_pinpoints = [[56, 112]]
        with pytest.raises(HostError, match=r"image_grid_pinpoints of the image processor .* differ"):
            make_transform(anatomy, image_processor, "anyres")
        image_processor.image_grid_pinpoints = model.config.image_grid_pinpoints
        model.config.vision_feature_select_strategy = "full"
    else:
        model.config.image_grid_pinpoints, given = "[[56, 100]]", model.config.image_grid_pinpoints
        with pytest.raises(HostError, match="56 x 100 pixels are no multiple of the vision tower's 56"):
            make_transform(anatomy, image_processor, "anyres")
        model.config.image_grid_pinpoints = given
        anatomy.tower.select_feature = "cls_patch"
    transform = make_transform(anatomy, image_processor, "anyres")
    with pytest.raises(InputError, match="cuts an image into tiles: use plane"):
        transform.pixel_values([noise(SIDE, SIDE)])
    try:
        with pytest.raises(InputError, match="a tile has 17 visual tokens, the host lays out 4 x 4"):
            encode_views(anatomy, transform, [noise(SIDE, SIDE)])
    finally:
        if hf:
            model.config.vision_feature_select_strategy = "default"
        else:
            anatomy.tower.select_feature = "patch"


def test_tiles_whose_patches_the_host_mixes_are_shown_whole(tmp_path):
    """LLaVA-OneVision's anyres_max shrinks them; as one square an image is what it is on every model."""
    from tests.support import decoders

    anatomy = find(decoders.build("onevision", "llama", tmp_path).model)
    processor = LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112]])
    with pytest.raises(HostError, match=r'anyres_max_1 says.*"anyres" is known for plain anyres'):
        make_transform(anatomy, processor, "anyres")
    view = encode_views(anatomy, make_transform(anatomy, processor, "resize"), [noise(61, 100)])[0]
    assert view.tokens.shape == (16, 64) and view.cells.tolist() == list(range(16))
