"""README.md as a package page shows it, where nothing lies beside it; pyproject.toml names this file to hatchling."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"\[([^]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_package_page(text: str, source: str | None) -> str:
    """Links to files of the checkout: absolute where the project has an address, else their paths as plain text.

    Args:
        text: README.md.
        source: `Source` of [project.urls], such as https://github.com/OWNER/NAME; None: there is no public address, and
            a reader finds the files in the source distribution under the paths.
    """

    def seen(link: re.Match[str]) -> str:
        name, path = link.groups()
        if source is not None:
            return f"[{name}]({source.rstrip('/')}/blob/HEAD/{path})"
        path = path.partition("#")[0]
        return name if name == path else f"{name} ({path})"

    return LINK.sub(seen, text)


class ReadmeHook(MetadataHookInterface):
    """Hatchling's hook: the project's `readme`, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = for_package_page(text, metadata.get("urls", {}).get("Source"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
