"""Import paths of earlier versions: every one that their README and docs showed, and what they cost."""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings

import pytest

from llava_patch.integrations import moved
from tests.support.paths import ROOT

DOCUMENTED = """
from llava_patch.auxiliary import RegionCollator, follow
from llava_patch.convert.command import convert, merge
from llava_patch.diagnostics import compare_reach, follow, make_batches, measure_attention_maps, measure_drift
from llava_patch.diagnostics import measure_flops, measure_fusion_attention, measure_gradients, measure_reach
from llava_patch.diagnostics import measure_saturation, read_examples
from llava_patch.diagnostics.attention_maps import AttentionMaps, measure_attention_maps
from llava_patch.diagnostics.drift import Drift, measure_drift
from llava_patch.diagnostics.examples import read_examples
from llava_patch.diagnostics.flops.count import Prompt
from llava_patch.diagnostics.flops.result import measure_flops
from llava_patch.diagnostics.flops.shape import named, shape_of
from llava_patch.diagnostics.fusion_attention import FusionAttention, measure_fusion_attention
from llava_patch.diagnostics.gradients import Gradients, GradientsResult, decompose, follow
from llava_patch.diagnostics.gradients.measure import make_batches, measure_gradients
from llava_patch.diagnostics.reach.compare import compare_reach
from llava_patch.diagnostics.reach.measure import measure_reach
from llava_patch.diagnostics.reach.settings import Reach
from llava_patch.diagnostics.saturation import Saturation, measure_saturation
from llava_patch.handle import get_handle
from llava_patch.hosts.anatomy import find
from llava_patch.inspection import inspect_checkpoint
from llava_patch.probe.data import read_samples
from llava_patch.probe.fit import run_rprobe
from llava_patch.probe.output import write_run
from llava_patch.probe.subject import load_subject
"""
OF_COPIED_TASKS = """
from llava_patch.evaluation.drift_runs import image, process_results, text
from llava_patch.evaluation.fusion_attention_runs import heads, mass, process_results, ratio
from llava_patch.evaluation.rprobe_runs import fvu, mse, process_results, psnr, steps
from llava_patch.evaluation.saturation_runs import process_results
from llava_patch.evaluation.tasks import DriftTask, FusionAttentionTask, RProbeTask, SaturationTask
"""
"""What the task.py files beside our YAML files had, which users copied for tasks of their own."""


def _lines(text):
    return [line for line in text.splitlines() if line]


@pytest.mark.parametrize("line", _lines(DOCUMENTED))
def test_what_the_documents_of_earlier_releases_showed_is_still_there(line):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        names: dict = {}
        exec(compile(line, __file__, "exec"), names)
    [node] = ast.parse(line).body
    for alias in node.names:
        found = names[alias.name]
        assert found.__name__ == alias.name
        if "anatomy" in line:  # where it always was
            continue
        where = {str(w.message) for w in said if f"{node.module}.{alias.name} has moved" in str(w.message)}
        ours = [w for w in said if w.category is DeprecationWarning and "has moved" in str(w.message)]  # not torch's
        assert {w.filename for w in ours} == {__file__}
        [message] = where  # and what it says is true
        assert getattr(importlib.import_module(message.rpartition(" ")[2]), alias.name) is found


@pytest.mark.parametrize("line", _lines(OF_COPIED_TASKS))
def test_tasks_that_were_copied_still_load(line):
    pytest.importorskip("lmms_eval")
    exec(compile(line, __file__, "exec"), {})


def test_an_old_path_may_be_what_a_process_imports_first():
    code = "from llava_patch.diagnostics.gradients import Gradients, decompose, follow; print(decompose.__module__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["llava_patch.measurements.gradients.decompose"], done.stderr


def test_what_never_was_there_is_not_found():
    for name in ("llava_patch.nothing", "llava_patch.diagnostics.nothing", "llava_patch.probe.nothing"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            importlib.import_module(name)
    with pytest.raises(ImportError, match=r"cannot import name 'nothing' from 'llava_patch\.errors'"):
        from llava_patch.errors import nothing  # noqa: F401
    assert all(importlib.util.find_spec(f"llava_patch.{old}") for old in moved.MOVED)


def test_the_table_is_not_loaded_at_start_and_not_needed_by_the_hook():
    code = (
        "import sys, llava_patch; assert 'llava_patch.integrations.moved' not in sys.modules\n"
        "from llava_patch.errors import SettingError; print(SettingError.__module__)"
    )
    for environment in ({}, {"LLAVA_PATCH_DISABLE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        assert done.stdout.strip() == "llava_patch.core.errors", done.stderr
        assert (
            "DeprecationWarning: llava_patch.errors.SettingError has moved: import it from llava_patch.core.errors"
            in (done.stderr)
        )


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMPORT = re.compile(r"^from llava_patch\S* import [\w, ]+$", re.MULTILINE)
SHOWN = sorted({line for page in PAGES for line in IMPORT.findall(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("line", SHOWN)
def test_what_the_documents_show_now_is_there_and_has_not_moved(line):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has moved")
        exec(compile(line, __file__, "exec"), {})
