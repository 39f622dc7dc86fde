"""README.md on a package page: no link leads nowhere."""

import importlib.util
import re
import subprocess
import sys

from tests.support.paths import ROOT

LOCAL = re.compile(r"\]\((?!https?://|#)")
SPEC = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "package" / "readme.py")
readme = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme)


def test_without_an_address_links_are_paths_in_the_source_distribution():
    text = "[docs/a.md](docs/a.md), [how](docs/b.md#part), [there](https://x.org/), [here](#below)"
    assert readme.for_package_page(text, None) == "docs/a.md, how (docs/b.md), [there](https://x.org/), [here](#below)"


def test_with_an_address_links_are_absolute():
    shown = readme.for_package_page("[how](docs/b.md#part)", "https://x.org/me/it/")
    assert shown == "[how](https://x.org/me/it/blob/HEAD/docs/b.md#part)"


def test_a_build_says_so():
    code = "from hatchling.metadata.core import ProjectMetadata\nfrom hatchling.plugin.manager import PluginManager\n"
    code += "print(ProjectMetadata('.', PluginManager()).core.readme)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    source = (ROOT / "README.md").read_text(encoding="utf-8")
    assert LOCAL.search(source) and not LOCAL.search(done.stdout)
    assert done.stdout.strip() == readme.for_package_page(source, None).strip()


def test_what_the_readme_links_to_is_there():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if not (ROOT / link).exists()] == []
