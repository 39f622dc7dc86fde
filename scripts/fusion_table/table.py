"""The table of all arms: Markdown, JSON and a figure, every number read from what the arms left."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from quickstart.fileset import write_atomically

from .arms import PLAIN, Arm
from .measure import CONTROL_ROWS, FINAL_STEPS, paired

NAME = "fusion_small"
HEADER = (
    "arm", "settings", "detached taps", "trained in stage 1", "trained in stage 2", "final loss, stage 1",
    "final loss, stage 2", "exact match", "95 % interval", "minus plain LLaVA (95 %)", "another image",
)  # fmt: skip


def collect(arms: list[Arm], records: dict[str, dict], setting: dict) -> dict:
    """Everything as JSON values.

    Args:
        arms: in the table's order.
        records: what `measure` found, by arm.
        setting: what all arms share, as it is to be kept beside the numbers.
    """
    plain = records.get(PLAIN.name)
    rows = []
    for arm in arms:
        record = records[arm.name]
        row = {"arm": arm.name, "title": arm.title, "settings": arm.settings_text(), "detached": arm.detached}
        row |= {k: v for k, v in record.items() if k != "right"}
        if plain is not None and arm is not PLAIN:
            row["minus_plain"] = paired(plain["right"], record["right"])
        rows.append(row)
    final_steps = min(FINAL_STEPS, *(len(history) for record in records.values() for history in record["losses"]))
    size = len(next(iter(records.values()))["right"])
    return {"setting": {**setting, "held_out_rows": size, "final_steps": final_steps}, "arms": rows}


def markdown(found: dict) -> str:
    """The table and how to read it."""
    setting = found["setting"]
    steps, rates = setting["recipe"]["steps"], setting["recipe"]["learning_rates"]
    lines = [f"| {' | '.join(HEADER)} |", "|---|---|---|" + "---:|" * (len(HEADER) - 3)]
    for row in found["arms"]:
        difference = row.get("minus_plain")
        cells = [
            row["title"], f"`{row['settings']}`" if row["settings"] != "-" else "-", row["detached"],
            *(f"{n:,}" for n in row["trained_parameters"]), *(f"{loss:.4f}" for loss in row["final_loss"]),
            f"{row['exact_match']:.3f}", f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
            "-" if difference is None else f"{difference[0]:+.3f} ({difference[1]:+.3f} to {difference[2]:+.3f})",
            f"{row['exact_match_other_image']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    base = setting["base"]
    return "\n".join(
        [
            "# Fusions on the small LLaVA-1.5, with and without detached taps",
            "",
            *lines,
            "",
            f"Each arm: LLaVA's unmodified train.py under DeepSpeed ZeRO-2, {setting['ranks']} CPU ranks over gloo, "
            f"float32, {setting['recipe']['batch_size']} samples a step, seed {setting['recipe']['seed']}, one run. "
            f"Stage 1 trains a new projector (and what else the fusion adds) for {steps[0]} steps at {rates[0]:g}; "
            f"stage 2 trains everything for {steps[1]} steps at {rates[1]:g}. Data, order of data and start are the "
            "same for all arms: a vision tower of 8 blocks trained on patch labels for "
            f"{base['tower_stage']} steps, and a language model of 8 layers trained with it on answers for "
            f"{base['answer_stage']} steps.",
            "",
            "LLaVA never trains its vision tower, so plain LLaVA's stays as it is while the fusions' trains "
            '(`train_tower = "all"`): the difference to plain LLaVA is that of fusion and tower together, and the '
            "second row says what the tower alone does. A fusion with and without detach differ in the gradient "
            "alone.",
            "",
            f"Final loss: median training loss (nats per token) of the last {setting['final_steps']} steps (LLaVA "
            "groups samples by kind, and the few steps of text alone stand far above the rest). Exact match: "
            f"greedy answers to {setting['held_out_rows']} images of strings that no training image shows; Wilson's "
            "interval, which is that of the sample of images, not of the training run: other seeds would move each "
            "arm as well. Minus plain LLaVA: the difference on the same images. Another image: the first "
            f"{CONTROL_ROWS} questions, each with another row's image: what can be guessed.",
            "",
        ]
    )


def figure(found: dict, path: Path) -> None:
    """Exact match with its interval for each arm, and the course of stage 2's loss."""
    from matplotlib.figure import Figure

    rows = found["arms"]
    picture = Figure(figsize=(12.5, 0.42 * len(rows) + 2.6), layout="constrained")
    match, course = picture.subplots(1, 2)
    titles = list(dict.fromkeys(row["title"] for row in rows))
    for place, row in enumerate(rows):
        color = f"C{titles.index(row['title'])}"
        stopped = row["detached"] not in ("-", "none", "no taps")
        low, high = row["interval"]
        match.plot([low, high], [place, place], "-", color=color, lw=2)
        match.plot(row["exact_match"], place, "o", color=color, ms=8, mfc=color if stopped else "white", mew=1.8)
        smooth = _smooth(row["losses"][1])
        course.plot(range(1, 1 + len(smooth)), smooth, "--" if stopped else "-", color=color, lw=1.4, label=_label(row))
    match.set_yticks(range(len(rows)), [_label(row) for row in rows])
    match.invert_yaxis()
    match.set_xlabel(f"exact match on {found['setting']['held_out_rows']} images of held-out strings")
    match.set_title("Exact match (filled: taps detached; bars: 95 % interval)", fontsize=10)
    match.grid(axis="x", alpha=0.3)
    course.set_xlabel("optimiser step of stage 2")
    course.set_ylabel("training loss (nats per token)")
    course.set_yscale("log")
    course.set_title("Loss in stage 2, median of 15 steps (dashed: taps detached)", fontsize=10)
    course.grid(alpha=0.3, which="both")
    course.legend(fontsize=8)
    picture.savefig(path, dpi=140)


def _label(row: dict) -> str:
    title = row["title"].split(" (")[0]
    return f"{title}, {row['detached']} detached" if row["detached"] not in ("-", "none", "no taps") else title


def _smooth(values: list[float], window: int = 15) -> list[float]:
    return [statistics.median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def write(
    found: dict,
    folder: Path,
    name: str = NAME,
    text: Callable[[dict], str] = markdown,
    draw: Callable[[dict, Path], None] = figure,
) -> list[Path]:
    """Write a table's three files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    write_atomically(paths[0], (json.dumps(_rounded(found)) + "\n").encode())
    write_atomically(paths[1], text(found).encode())
    draw(found, paths[2])
    return paths


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value
