"""Writes an evidence.json, its page and figures into docs/measured, and its table into README.md.

python -m evidence.publish evidence_out/evidence.json
"""

import shutil
import sys
import tempfile
from pathlib import Path

from llava_patch.core.files import write_text
from llava_patch.tools.evidence import report, run

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "docs" / "measured"
BEGIN, END = "<!-- by scripts/evidence.sh -->", "<!-- end of evidence -->"


def block(values: dict) -> str:
    """What README.md shows of an evidence.json."""
    every = report.sections(values)
    return (
        f"{report.first_screen(every)}\n\n"
        f"{report.counts(every).capitalize()}: every claim with its control, interval and why, in "
        "[docs/measured/evidence.md](docs/measured/evidence.md)."
    )


def with_block(text: str, values: dict) -> str:
    """The text of README.md with its block replaced.

    Raises:
        ValueError: it has no such block.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{block(values)}\n{END}{after}"


def main() -> None:
    """Command line."""
    source = Path(sys.argv[1])
    values = run.read(source)
    if values["size"] != "cpu":
        raise SystemExit(f"{source}: tier {values['size']}; the pages show that of the CPU")
    readme = with_block((ROOT / "README.md").read_text(encoding="utf-8"), values)
    with tempfile.TemporaryDirectory() as folder:
        report.write(values, Path(folder))
        figures = MEASURED / report.FIGURES
        shutil.rmtree(figures, ignore_errors=True)
        shutil.copytree(Path(folder) / report.FIGURES, figures)
        shutil.copyfile(Path(folder) / report.TEXT, MEASURED / report.TEXT)
    shutil.copyfile(source, MEASURED / run.KEPT)
    write_text(ROOT / "README.md", readme)
    print(f"wrote {MEASURED / report.TEXT} and README.md")


if __name__ == "__main__":
    main()
