"""The table of all probes: Markdown, JSON and a figure, every number read from what the probes left."""

from pathlib import Path

from fusion_table import table as fusion_table

from llava_patch.measurements.rprobe import bootstrap

from .arms import ARMS, DIFFERENCES

NAME = "rprobe_small"
FIGURES = ("mse", "fvu", "psnr", "constant_mse", "steps_to_half_fvu")


def collect(found: dict[str, list[dict]], seeds: list[int], setting: dict) -> dict:
    """Everything as JSON values.

    Args:
        found: results by arm, one a seed, in the order of `seeds`.
        seeds: of the probes.
        setting: what all of them share, as it is to be kept beside the numbers.
    """
    rows = []
    for arm in ARMS:
        results = found[arm.name]
        first = results[0]
        row = {"arm": arm.name, "title": arm.title, **{name: first[name] for name in FIGURES}}
        row["interval"] = bootstrap.interval(first["documents"], first["settings"]["resamples"], 0)
        row["mse_by_seed"] = [result["mse"] for result in results]
        rows.append(row)
    differences = []
    for title, more, less in DIFFERENCES:
        pairs = [
            bootstrap.paired(a["documents"], b["documents"], a["settings"]["resamples"], 0)
            for a, b in zip(found[more], found[less], strict=True)
        ]
        differences.append({"of": title, "more": more, "less": less, "by_seed": pairs})
    first = found[ARMS[0].name][0]
    kept = {name: first["settings"][name] for name in ("steps", "batch_size", "train_pages", "heldout_pages")}
    return {"setting": {**setting, **kept, "seeds": seeds}, "arms": rows, "differences": differences}


def markdown(record: dict) -> str:
    """The tables and how to read them."""
    setting = record["setting"]
    seeds = ", ".join(map(str, setting["seeds"]))
    lines = [
        "# R-Probe on the quickstart's small LLaVA-1.5",
        "",
        f"| probe (seed {setting['seeds'][0]}) | MSE | 95 % interval | FVU | PSNR (dB) | steps to half the variance "
        f"| MSE, seeds {seeds} |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for row in record["arms"]:
        low, high = row["interval"]
        steps = "never" if row["steps_to_half_fvu"] is None else row["steps_to_half_fvu"]
        lines.append(
            f"| {row['title']} | {row['mse']:.4f} | {low:.4f} to {high:.4f} | {row['fvu']:.3f} | {row['psnr']:.1f} "
            f"| {steps} | {', '.join(f'{value:.4f}' for value in row['mse_by_seed'])} |"
        )
    constant = record["arms"][0]["constant_mse"]
    lines += [
        f"| a constant patch | {constant:.4f} | | | | | |",
        "",
        f"| what it adds to the MSE | {' | '.join(f'seed {seed}' for seed in setting['seeds'])} |",
        "|---|" + "---|" * len(setting["seeds"]),
    ]
    for row in record["differences"]:
        cells = (f"{value:+.4f} ({low:+.4f} to {high:+.4f})" for value, low, high in row["by_seed"])
        lines.append(f"| {row['of']} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "The model has 2.3 million parameters and 16 image tokens, and reads "
            f"{setting['exact_match']:.3f} of its held-out strings. {setting['train_pages']} rendered pages to train "
            f"on, {setting['heldout_pages']} held out, {setting['steps']} steps of {setting['batch_size']}; float32 on "
            "a CPU. A seed draws pages, split and probe anew, so its figures stand for another set of pages. "
            "Intervals: bootstrap over held-out pages, for a difference over pairs (the same pages in both).",
            "",
            "Blurred: each token of the tower is averaged with its neighbours (3 x 3) before the projector. A tower "
            "that keeps less of each patch must come out higher, or the probe measures nothing.",
            "",
        ]
    )


def figure(record: dict, path: Path) -> None:
    """The MSE of each probe with its interval, and the differences of each seed."""
    from matplotlib.figure import Figure

    rows, differences = record["arms"], record["differences"]
    picture = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = picture.subplots(1, 2)
    for place, row in enumerate(rows):
        left.plot(row["interval"], [place, place], "-", color="C0", lw=2)
        left.plot(row["mse"], place, "o", color="C0", ms=7)
    left.axvline(rows[0]["constant_mse"], color="0.4", ls=":", label="a constant patch")
    left.set_xlim(left=0)
    left.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    left.set_xlabel("per-token MSE, held-out pages (bars: 95 % interval)")
    left.legend(fontsize=8, loc="center left")
    for place, row in enumerate(differences):
        for offset, (value, low, high) in enumerate(row["by_seed"]):
            height = place + 0.18 * (offset - (len(row["by_seed"]) - 1) / 2)
            right.plot([low, high], [height, height], "-", color=f"C{offset}", lw=1.6)
            label = f"seed {record['setting']['seeds'][offset]}" if place == 0 else None
            right.plot(value, height, "o", color=f"C{offset}", ms=4, label=label)
    right.axvline(0, color="0.4", lw=1)
    right.set_yticks(range(len(differences)), [row["of"] for row in differences], fontsize=8)
    right.set_xlabel("what it adds to the MSE (paired, 95 % interval)")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    picture.savefig(path, dpi=140)


def write(record: dict, folder: Path) -> list[Path]:
    """Write all three files; returns their paths."""
    return fusion_table.write(record, folder, NAME, markdown, figure)
