"""`encode_views` on every known vision tower of both hosts."""

import pytest
import torch

from llava_patch.hosts.anatomy import find
from llava_patch.probe.view import encode_views, make_transform
from tests.support import zoo
from tests.support.probes import processor
from tests.support.views import PATCH, PINPOINTS, SIDE, changed_cells, noise, with_block


def short_sighted(model):
    """Blocks that add nothing: a token holds its own patch alone."""
    with torch.no_grad():
        for parameter in zoo.blocks_of(find(model).vision_model).parameters():
            parameter.zero_()
    return model


def check(model, image_processor, mode, size, box):
    anatomy = find(model)
    transform = make_transform(anatomy, image_processor, mode)
    page = noise(*size)
    other = with_block(page, box)
    view, again = encode_views(anatomy, transform, [page, other])
    own = view.cells >= 0
    changed = (view.tokens != again.tokens).any(-1)
    cells = changed_cells(transform, view, page, other)
    assert torch.equal(changed[own], cells[view.cells[own]])
    assert 0 < cells.sum() < len(cells)
    return view


@pytest.mark.parametrize("name", zoo.NAMES)
def test_on_llava(monkeypatch, tower_folder, name):
    zoo.install_timm_stand_in(monkeypatch)
    model = short_sighted(zoo.llava_model(zoo.folder(tower_folder, name)))
    image_processor = model.get_vision_tower().image_processor
    for mode in ("resize", "crop", "pad"):
        view = check(model, image_processor, mode, (SIDE, SIDE), (PATCH, 2 * PATCH, 2 * PATCH, 3 * PATCH))
        assert view.cells.tolist() == list(range(16))
    model.config.image_aspect_ratio, model.config.image_grid_pinpoints = "anyres", PINPOINTS
    model.model.image_newline = torch.nn.Parameter(torch.randn(64))
    for merge_type in ("spatial_unpad", "flat"):
        model.config.mm_patch_merge_type = merge_type
        view = check(model, image_processor, "anyres", (80, 110), (20, 60, 40, 80))
        assert (view.cells >= 0).sum() == (64 if merge_type == "flat" else 48)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("name", zoo.ON_HF)
def test_on_hf(name, strategy):
    model = short_sighted(zoo.hf_model(name, strategy=strategy))
    view = check(model, processor(), "resize", (SIDE, SIDE), (PATCH, 2 * PATCH, 2 * PATCH, 3 * PATCH))
    kept = {("default", 1): range(16), ("full", 1): range(-1, 16), ("default", 0): range(1, 16)}
    assert view.cells.tolist() == list(kept.get((strategy, zoo.PREFIX[name]), range(16)))
