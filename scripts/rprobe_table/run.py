"""Runs the probes one after another and writes the table.

`python -m rprobe_table.run OUT`: what is finished is kept, so that the same command goes on where it stopped.
"""

import argparse
import importlib.metadata
import time
from pathlib import Path

from quickstart import base as small
from quickstart.measure import load
from quickstart.run import PINNED
from quickstart.steps import Lacking, Steps, console, json_with, make_folder

from . import arms, table

SCRIPTS = Path(__file__).resolve().parent.parent
PUBLISHED = SCRIPTS.parent / "docs" / "measured"


def measured_in(path: Path) -> dict:
    """A probe's result, with what the table needs.

    Raises:
        Lacking: what is not there.
    """
    result = json_with(path, *table.FIGURES, "documents", "settings")
    if not result["documents"]:
        raise Lacking(f"{path} has no documents")
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seeds", default="0,1,2", help="of pages and probe, comma-separated; default 0,1,2")
    parser.add_argument("--publish", action="store_true", help=f"also write the table into {PUBLISHED}")
    args = parser.parse_args()
    words = args.seeds.split(",")
    if not all(word.strip().isdigit() for word in words):
        parser.error(f"--seeds {args.seeds}: expected integers, such as 0,1,2")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        parser.error(f"--seeds {args.seeds}: one is named twice")
    out = make_folder(args.out.resolve())
    started = time.time()
    base = small.train_base(out / "base", small.BaseSettings())
    console.print(f"the model reads {base['exact_match']:.3f} of its held-out strings")
    versions = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name in PINNED)
    loaded = load(out / "base" / "llava-v1.5-small")
    found: dict[str, list[dict]] = {arm.name: [] for arm in arms.ARMS}
    for seed in seeds:
        for arm in arms.ARMS:
            folder = out / f"seed{seed}" / arm.name
            result = folder / "rprobe.json"

            def work(arm: arms.Arm = arm, seed: int = seed, result: Path = result) -> None:
                measured = arms.measure(arm, loaded, seed)
                measured.save(result.parent)

            steps = Steps(folder, [base["exact_match"], versions, arm.settings, arm.blurred, seed])
            figure = result.with_suffix(".png")
            steps.run(
                "probe", f"seed {seed}: {arm.title}", work, [result, figure], lambda result=result: measured_in(result)
            )
            found[arm.name].append(measured_in(result))
    record = table.collect(found, seeds, {"exact_match": base["exact_match"], "versions": versions})
    paths = table.write(record, out)
    if args.publish:
        paths += table.write(record, PUBLISHED)
    console.print(table.markdown(record), soft_wrap=True, markup=False, highlight=False)
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"{(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
