"""Where the repository and the programs for processes of their own are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = Path(__file__).resolve().parent / "launchers"
