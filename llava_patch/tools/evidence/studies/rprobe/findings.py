"""What R-Probe's positive controls say."""

from typing import Any

from llava_patch.tools.evidence.findings import Finding, Found

TITLE = "R-Probe sees what is planted"
ABOUT = "R-Probe on a small model that reads strings of digits."


def findings(found: Found) -> list[Finding]:
    """The claims."""
    return []


def figures(found: Found) -> dict[str, Any]:
    """The figures by name."""
    return {}
