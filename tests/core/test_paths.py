"""What results' folders are called."""

import pytest

from llava_patch.core.paths import default_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("run", "run"),
        ("run/checkpoint-3", "run__checkpoint-3"),
        ("run/llava_patch_adapter", "run__llava_patch_adapter"),
        ("run/checkpoint-3/llava_patch_adapter", "run__checkpoint-3__llava_patch_adapter"),
    ],
)
def test_what_every_run_calls_the_same_has_the_runs_name_too(path, name, tmp_path):
    (tmp_path / path).mkdir(parents=True)
    assert default_name(str(tmp_path / path)) == name


def test_a_name_of_the_hub_is_its_last_part():
    assert default_name("me/llava-lf") == "llava-lf"
