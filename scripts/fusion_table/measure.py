"""What the table needs of one finished arm: losses, trained parameters, exact match on the held-out strings.

`python -m fusion_table.measure ARM_FOLDER BASE OUT.json`
"""

import argparse
import json
import math
import re
import statistics
from pathlib import Path

from quickstart.data import TrainingData
from quickstart.fileset import write_atomically
from quickstart.measure import load
from quickstart.score import exactly_right, read_rows
from quickstart.steps import Lacking, losses

from .train import stage_folder

FINAL_STEPS = 25
# What `measure` finds, which is what the table needs.
NUMBERS = (
    "final_loss", "losses", "trained_parameters", "exact_match", "interval", "exact_match_other_image", "right",
)  # fmt: skip
CONTROL_ROWS = 256  # of the held-out rows, for the control with other images


def trained_parameters(log: Path) -> int:
    """The Trainer's own count of the parameters that have a gradient.

    Args:
        log: of a run with `--log_level info`.

    Raises:
        Lacking: the log does not hold it.
    """
    text = log.read_text(errors="replace") if log.is_file() else ""
    found = re.findall(r"Number of trainable parameters = ([\d,]+)", text)
    if not found:
        raise Lacking(f"{log} has no line 'Number of trainable parameters'")
    return int(found[-1].replace(",", ""))


def final_loss(values: list[float]) -> float:
    """Median of the last steps: a few of them hold text alone, whose loss nobody trains here and would drown the rest.

    Raises:
        ValueError: a loss that is not finite, or none.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"losses must be finite; got {values[-5:]} at the end of {len(values)}")
    return statistics.median(values[-FINAL_STEPS:])


def wilson(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, spread = right / rows, z * z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    return middle - half, middle + half


def paired(first: list[bool], second: list[bool], z: float = 1.959964) -> tuple[float, float, float]:
    """Difference of two shares on the same rows, second less first, with its 95 % interval."""
    differences = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    half = z * statistics.pstdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def measure(arm_folder: Path, base: Path) -> dict:
    """Everything the table says about an arm."""
    checkpoint = stage_folder(arm_folder, 2)
    model, tokenizer, image_processor = load(checkpoint)
    data = TrainingData.at(base)
    rows = read_rows(data.read_test)
    arguments = (model, (tokenizer, image_processor), rows, data.images)
    right = exactly_right(*arguments)
    control = exactly_right(*arguments[:2], rows[:CONTROL_ROWS], data.images, shuffled=True)
    histories = [losses(stage_folder(arm_folder, stage)) for stage in (1, 2)]
    return {
        "final_loss": [final_loss(history) for history in histories],
        "losses": histories,
        "trained_parameters": [trained_parameters(arm_folder / "logs" / f"stage{s}.log") for s in (1, 2)],
        "exact_match": sum(right) / len(right),
        "interval": wilson(sum(right), len(right)),
        "exact_match_other_image": sum(control) / len(control),
        "right": right,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm_folder", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    record = measure(args.arm_folder, args.base)
    write_atomically(args.out, (json.dumps(record) + "\n").encode())
    print(f"exact match {record['exact_match']:.3f}, final losses {record['final_loss']}")


if __name__ == "__main__":
    main()
