"""The table of probes: its arms, the blur, and the numbers; the whole is `scripts/rprobe_table.sh`."""

import dataclasses
import json

import pytest
import torch
from rprobe_table import arms, table

from llava_patch import RProbe
from llava_patch.hosts.anatomy import find
from tests.support.probes import tiny_model
from tests.support.results import made_up_result


def test_arms_are_the_ablation_and_one_blurred_model():
    settings = {arm.name: dataclasses.replace(RProbe(), **arm.settings) for arm in arms.ARMS}
    cells = {(s.masked, s.text) for name, s in settings.items() if name != "blurred"}
    assert len(cells) == 4 and settings["blurred"] == settings["full"] == RProbe()
    assert [arm.name for arm in arms.ARMS if arm.blurred] == ["blurred"]
    assert {name for _, *pair in arms.DIFFERENCES for name in pair} == set(settings)


def test_blur_takes_the_mean_of_neighbours_and_is_undone():
    anatomy = find(tiny_model())
    pixels = torch.randn(2, 3, 56, 56)
    seen = []
    watch = anatomy.projector.linear_1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    before = anatomy.encode_images(pixels)
    with arms.blur(anatomy.model):
        blurred = anatomy.encode_images(pixels)
    assert torch.equal(anatomy.encode_images(pixels), before) and not torch.equal(blurred, before)
    watch.remove()
    sharp, smooth = (tokens.unflatten(1, (4, 4)) for tokens in seen[:2])
    assert torch.allclose(smooth[:, 1, 2], sharp[:, 0:3, 1:4].mean((1, 2)), atol=1e-6)  # another order of sums
    assert torch.allclose(smooth[:, 0, 0], sharp[:, :2, :2].mean((1, 2)), atol=1e-6)


def test_every_number_of_the_table_is_a_results(tmp_path):
    found = {
        arm.name: [made_up_result(shift=0.1 * i + 0.01 * seed).to_dict() for seed in range(2)]
        for i, arm in enumerate(arms.ARMS)
    }
    record = table.collect(found, [4, 5], {"exact_match": 0.5, "versions": []})
    assert [row["mse"] for row in record["arms"]] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8])
    assert record["differences"][0]["by_seed"][1] == pytest.approx((0.2, 0.2, 0.2))
    text = table.markdown(record)
    assert "| region seen, without text | 0.5000 | 0.3000 to 0.7000 | 0.500 | 20.0 | never | 0.5000, 0.5100 |" in text
    assert "| blurring the features | +0.4000 (+0.4000 to +0.4000) | +0.4000 (+0.4000 to +0.4000) |" in text
    paths = table.write(record, tmp_path)
    assert json.loads(paths[0].read_text())["setting"]["seeds"] == [4, 5] and paths[2].stat().st_size > 5000
