"""The closing table of the quickstart: stock beside patched, every figure read from what the steps wrote."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from .steps import lmms_results, losses, metric

METRICS = (
    ("R-Probe error (MSE, held-out)", "rprobe", "rprobe_mse", 3),
    ("R-Probe error / variance (FVU)", "rprobe", "rprobe_fvu", 3),
    ("vision transition layer", "saturation", "vision_transition_layer", 1),
    ("recommended split", "saturation", "recommended_split", 0),
    ("POPE accuracy (24 local rows)", "pope", "pope_accuracy", 3),
    ("MME perception (local rows)", "mme", "mme_perception_score", 1),
)


def _loss_text(run: Path) -> str:
    # Medians, since a batch of text-only rows, which the small base was never taught, has a loss of its own.
    values = losses(run)
    return f"{statistics.median(values[:16]):.3f} -> {statistics.median(values[-16:]):.3f}"


def _number(value: float, digits: int = 3) -> str:
    return "none" if math.isnan(value) else f"{value:.{digits}f}"


def build(out: Path, base: Path, stage1: Path, patched: Path) -> Table:
    """The table.

    Args:
        out: the quickstart's folder, which holds read_*.json and eval_*.
        base: the small file set with base.json.
        stage1: stage 1's output.
        patched: stage 2's output.
    """
    record = json.loads((base / "base.json").read_text())
    read = {name: json.loads((out / f"read_{name}.json").read_text()) for name in ("stock", "patched")}
    evaluated = {name: lmms_results(out / f"eval_{name}") for name in ("stock", "patched")}
    both = ("stock", "patched")
    table = Table("", "stock LLaVA-1.5 (small)", "Skip-Links + DPVR-LF", title="quickstart")
    table.add_row("what trains", f"all {record['parameters']:,} parameters", _trains(stage1, read["patched"]))
    table.add_row("loss, stage 1 (projector)", "-", _loss_text(stage1))
    table.add_row("loss, stage 2 (side branch)", "-", _loss_text(patched))
    table.add_row("exact match, held-out strings", *(f"{read[n]['exact_match']:.3f}" for n in both))
    table.add_row("  control: another sample's image", *(f"{read[n]['exact_match_other_image']:.3f}" for n in both))
    table.add_row(
        "  control: side branch sees another's", "-", f"{read['patched']['exact_match_side_other_image']:.3f}"
    )
    for label, task, name, digits in METRICS:
        table.add_row(label, *(_number(metric(evaluated[n], task, name), digits) for n in both))
    time = read["stock"]["prefill"]
    table.add_row(
        f"prefill time ratio ({time['tokens']} tokens, {time['depth']} layers)",
        "1.00",
        f"{time['ratio']:.2f} ({time['spread'][0]:.2f} to {time['spread'][1]:.2f})",
    )
    return table


def _trains(stage1: Path, read: dict[str, Any]) -> str:
    taps = json.loads((stage1 / "config.json").read_text())["llava_patch"]["fusion"]["stride"]
    return f"stage 1: projector (taps every {taps} blocks)\nstage 2: {read['trainable']}"


def closing(out: Path, patched: Path, report: Path) -> list[str]:
    """Lines under the table: where report and figures are, and what to type for a real checkpoint."""
    figures = sorted(str(path) for path in out.glob("eval_*/**/*.png"))
    return [
        "",
        "[bold]figures[/]",
        *(f"  {path}" for path in figures),
        f"[bold]report of the patched checkpoint[/] (open it in a browser; works offline)  {report}",
        f"[bold]patched checkpoint[/]  {patched}  (loads with llava's and lmms-eval's own loaders, no flag needed)",
        "[bold]next, on your own LLaVA-1.5 7B[/] (your launch script, two flags appended):",
        "  bash scripts/v1_5/finetune.sh --gin_file dpvr_lf_7b.gin",
        "  lmms-eval --model llava --model_args pretrained=CKPT --tasks rprobe,saturation,pope,mme",
        "  llava-patch report CKPT DATA.json --base liuhaotian/llava-v1.5-7b",
        "  (a script that takes no arguments: LLAVA_PATCH_GIN_FILE=dpvr_lf_7b.gin bash scripts/v1_5/finetune.sh)",
    ]
