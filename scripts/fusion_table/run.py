"""Trains and measures the arms one after another, and writes the table.

`python -m fusion_table.run OUT`: what is finished is kept, so that the same command goes on where it stopped.
"""

import argparse
import dataclasses
import importlib.metadata
import shutil
import sys
import time
from pathlib import Path

from quickstart import base as small
from quickstart.run import PINNED
from quickstart.steps import Steps, console, json_with, losses, make_folder

from . import arms as arm_list
from . import table, train
from .measure import NUMBERS, trained_parameters

SCRIPTS = Path(__file__).resolve().parent.parent
PUBLISHED = SCRIPTS.parent / "docs" / "measured"
VERSIONS = (*PINNED, "deepspeed")


def base_settings(tower_steps: int, answer_steps: int, rows: int) -> small.BaseSettings:
    """The common start: a tower that sees characters, a language model that has begun to read.

    Trained longer it would leave the arms nothing to learn; from scratch, train.py would take far too long.
    """
    return small.BaseSettings(
        tower_stage=dataclasses.replace(small.TOWER_STAGE, steps=tower_steps),
        answer_stage=dataclasses.replace(small.ANSWER_STAGE, steps=answer_steps),
        num_plain=4096,
        num_v1=rows,
        num_test=1024,
    )


def run_arm(arm: arm_list.Arm, recipe: train.Recipe, out: Path, base: Path, inputs: list) -> dict:
    """Both stages and the measurement, each skipped when its result is there for the same inputs.

    Returns:
        What was measured.
    """
    folder = out / arm.name
    zero2 = train.write_zero2(out)
    commands = {stage: train.command(arm, stage, recipe, base, folder, zero2) for stage in (1, 2)}
    steps = Steps(folder, [*inputs, commands, train.ZERO2])
    result = folder / "measured.json"

    def stage(number: int) -> None:
        # A stage starts from nothing, whatever an interrupted run has left.
        shutil.rmtree(train.stage_folder(folder, number), ignore_errors=True)
        steps.command(f"stage{number}", commands[number], **train.environment())

    def measure() -> None:
        command = [sys.executable, "-m", "fusion_table.measure", str(folder), str(base), str(result)]
        steps.command("measure", command, cwd=SCRIPTS)

    def trained(number: int) -> None:
        losses(train.stage_folder(folder, number), recipe.steps[number - 1])
        trained_parameters(folder / "logs" / f"stage{number}.log")

    for number, weights in ((1, "mm_projector.bin"), (2, "model.safetensors")):
        place = train.stage_folder(folder, number)
        steps.run(
            f"stage{number}", f"{arm.name}: stage {number}", lambda n=number: stage(n),
            [place / weights, place / "config.json"], lambda n=number: trained(n),
        )  # fmt: skip
    steps.run("measure", f"{arm.name}: exact match", measure, [result], lambda: json_with(result, *NUMBERS))
    return json_with(result)


def main() -> None:
    """Command line."""
    recipe = train.Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--arms", help=f"comma-separated, of {', '.join(arm_list.BY_NAME)}; default: all but the last")
    parser.add_argument("--steps", help=f"of stage 1 and 2, comma-separated; default {recipe.steps}")
    parser.add_argument("--tower-steps", type=int, default=900, help="of the common tower")
    parser.add_argument("--answer-steps", type=int, default=300, help="of the common language model")
    parser.add_argument("--publish", action="store_true", help=f"also write the table into {PUBLISHED}")
    args = parser.parse_args()
    try:
        if args.steps:
            first, second = map(int, args.steps.split(","))
            recipe = dataclasses.replace(recipe, steps=(first, second))
        chosen = arm_list.choose(args.arms)
        if args.publish and not set(arm_list.ARMS) <= set(chosen):
            raise ValueError("--publish needs all ten arms: leave --arms out")
    except ValueError as error:
        parser.error(str(error))
    out = make_folder(args.out.resolve())
    started = time.time()
    # Enough rows that none is seen twice, so that the training loss is that of new images.
    settings = base_settings(args.tower_steps, args.answer_steps, recipe.steps[1] * recipe.batch_size)
    base_record = small.train_base(out / "base", settings)
    console.print(f"common start: exact match {base_record['exact_match']:.3f} with the projector it was trained with")
    versions = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name in VERSIONS)
    records = {}
    for arm in chosen:
        records[arm.name] = run_arm(arm, recipe, out, out / "base", [settings.as_dict(), versions])
        console.print(f"{arm.name}: exact match {records[arm.name]['exact_match']:.3f}")
    setting = {
        "recipe": dataclasses.asdict(recipe),
        "base": base_record["steps"],
        "base_exact_match": base_record["exact_match"],
        "ranks": train.RANKS,
        "versions": versions,
    }
    found = table.collect(chosen, records, setting)
    paths = table.write(found, out)
    if args.publish:
        paths += table.write(found, PUBLISHED)
    console.print(table.markdown(found), soft_wrap=True, markup=False, highlight=False)
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"{(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
