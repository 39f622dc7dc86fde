"""What a wheel holds, and that it shadows nothing."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CHECK = """
import sys
import llava_patch, gin, gin.config
from llava_patch.integrations import import_hook as autostart
from llava_patch.core.paths import eval_tasks_dir, gin_dir
assert "site-packages" in llava_patch.__file__, llava_patch.__file__
assert autostart.installed()
assert hasattr(gin, "parse_config"), gin.__file__
print(*sorted(p.name for p in gin_dir().glob("*.gin")))
print(*sorted(p.parent.name + "/" + p.name for p in eval_tasks_dir().glob("*/*.yaml")))
"""


@pytest.mark.timeout(300)
def test_the_wheel_in_an_empty_environment(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("llava_patch-*.whl"))
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    # gin-config is the one dependency that a package of our own could shadow
    shutil.copytree(Path(importlib.util.find_spec("gin").origin).parent, site / "gin")
    assert not (site / "gin" / "dpvr_lf_7b.gin").exists()
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gin_files, tasks = done.stdout.splitlines()
    assert gin_files.split() == sorted(p.name for p in (ROOT / "gin").glob("*.gin"))
    ours = ("rprobe/rprobe.yaml", "saturation/saturation.yaml", "drift/drift.yaml")
    assert {*ours, "fusion_attention/fusion_attention.yaml"} <= set(tasks.split())
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True).stdout
    assert " eval_tasks" not in names and "\ngin/" not in names
    assert "llava_patch/tools/report/report.html.j2" in names


@pytest.mark.timeout(300)
def test_an_editable_install_starts_with_python(tmp_path, monkeypatch):
    """The wheel that `pip install -e` makes holds the start-up line and points here."""
    import zipfile

    from hatchling import build

    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_editable(str(tmp_path))) as wheel:
        names = wheel.namelist()
        assert "llava_patch" in wheel.read("llava_patch.pth").decode()
        paths = [wheel.read(n).decode() for n in names if n.endswith(".pth") and n != "llava_patch.pth"]
    assert str(ROOT) in paths[0]
    # site reads .pth files in sorted order: the path must be there before the line that imports
    assert sorted(n for n in names if n.endswith(".pth"))[-1] == "llava_patch.pth"


def test_no_package_of_ours_is_called_gin():
    assert not (ROOT / "gin" / "__init__.py").exists()
    import gin

    assert hasattr(gin, "parse_config")


@pytest.mark.parametrize("package", ["llava_patch", "llava_patch.measurements", "llava_patch.tools.inspect"])
def test_public_names(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert name == "__version__" or getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing
