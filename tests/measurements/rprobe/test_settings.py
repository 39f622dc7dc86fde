import subprocess
import sys

import pytest

from llava_patch.core.errors import SettingError
from llava_patch.measurements.rprobe.settings import RProbe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 2.0),
        ("train_pages", True),
        ("heldout_pages", -1),
        ("max_text_tokens", 0),
        ("seed", -1),
        ("examples", None),
        ("lr", 0.0),
        ("minutes", 0.0),
        ("clip", float("nan")),
        ("threshold", "low"),
        ("weight_decay", -0.1),
        ("warmup", 1.0),
        ("heldout_share", 0.0),
        ("rope", "1d"),
        ("image_mode", "square"),
        ("text_height", 0),
        ("text_height", float("inf")),
        ("text_height", True),
        ("masked", 1),
        ("text", "no"),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(SettingError, match=rf"RProbe\.{field} = {value!r}"):
        RProbe(**{field: value})


def test_learning_rate_falls_with_width():
    assert RProbe().learning_rate(64) == RProbe().learning_rate(128) == 3e-3
    assert RProbe().learning_rate(4096) == pytest.approx(3e-3 / 32)
    assert RProbe(lr=0.5).learning_rate(4096) == 0.5


def test_settings_import_no_torch():
    code = "import sys, llava_patch.measurements.rprobe.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_height_of_text_that_nothing_would_use_is_refused():
    for mode in ("resize", "crop", "pad", "anyres"):
        with pytest.raises(
            SettingError, match=rf'RProbe.text_height = 2: expected image_mode = "window".*not "{mode}"'
        ):
            RProbe(image_mode=mode, text_height=2)
        with pytest.raises(SettingError, match=rf'RProbe.page = True: expected image_mode = "window".*not "{mode}"'):
            RProbe(image_mode=mode, page=True)
    assert RProbe(image_mode="window", text_height=2).text_height == 2
