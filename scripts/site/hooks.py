"""Files beside docs/ that the site shows too; links between them and the pages hold in the site as well."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
REFERENCES = (ROOT / "llava_patch" / "routing").glob("reference*.py")
SHOWN = {**PAGES, **{path.relative_to(ROOT).as_posix(): "methods.md" for path in REFERENCES}}
"""Files of the checkout that pages link to, and the page of the site that has what is in them."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's own pages; one to any other file outside docs/ stays, and mkdocs warns of it."""
    if page.file.src_uri in PAGES.values():
        return markdown.replace("](docs/", "](")
    out = "../" * (page.file.src_uri.count("/") + 1)
    for name, shown in SHOWN.items():
        markdown = markdown.replace(f"]({out}{name})", f"]({out[3:]}{shown})")
    return markdown
