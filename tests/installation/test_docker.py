"""A Dockerfile a lock: what each of them installs, and where it then looks for it."""

import os
import re
import subprocess

import pytest

from tests.support.paths import ROOT

FILES = sorted((ROOT / "scripts" / "docker").glob("*.Dockerfile"))


def test_every_lock_has_a_dockerfile():
    locks = {path.stem for path in (ROOT / "scripts" / "locks").glob("*.txt")}
    assert {path.name.removesuffix(".Dockerfile") for path in FILES} == locks


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_its_path_is_where_install_puts_the_environment(path):
    text = path.read_text()
    given = dict(pair.split("=", 1) for line in re.findall(r"^ENV (LLAVA.*)$", text, re.M) for pair in line.split())
    assert given["LLAVA_PATCH_LOCK"] == path.name.removesuffix(".Dockerfile")
    assert "RUN bash scripts/install.sh" in text
    until_it_installs = (ROOT / "scripts" / "install.sh").read_text().split("\nif [")[0]
    done = subprocess.run(["bash", "-ec", f"{until_it_installs}\necho $VENV"], capture_output=True, text=True,
                          env={**os.environ, **given}, cwd=ROOT)  # fmt: skip
    assert f"ENV PATH={done.stdout.split()[-1]}/bin:" in text, done.stderr
