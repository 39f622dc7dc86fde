"""The table on screen and in Markdown, the JSON, and the figure."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from llava_patch.core import files
from llava_patch.core.clock import median
from llava_patch.core.extras import optional
from llava_patch.tools.bench.measure import Row, ratio

SPEED = ("method", "prefill ms", "/ stock", "of bound", "decode ms/token", "/ stock", "cache MB", "/ stock")
TRAINING = ("method", "trainable", "training step / stock", "must equal", "max |Δlogit|", "cached decode")


def speed_cells(row: Row, base: Row) -> list[str]:
    """One line of the speed table."""
    return [
        row.method,
        f"{median(row.prefill_ms) or 0:,.0f}",
        _ratio(row, base, "prefill_ms"),
        f"{_share_of_bound(row, base):.2f}",
        f"{median(row.decode_ms) or 0:,.1f}",
        _ratio(row, base, "decode_ms"),
        f"{row.cache_bytes / 1e6:,.1f}",
        f"{row.cache_bytes / base.cache_bytes:.3f}",
    ]


def training_cells(row: Row, base: Row) -> list[str]:
    """One line of the table of training and identities."""
    return [
        row.method,
        "-" if row.trainable is None else f"{row.trainable / 1e6:,.1f} M",
        _ratio(row, base, "train_ms"),
        row.partner,
        f"{row.partner_delta:.0e}" if row.partner_delta else "0",
        f"{row.cached_delta:.0e}" if row.cached_delta else "0",
    ]


def _ratio(row: Row, base: Row, what: str) -> str:
    values = ratio(row, base, what)
    return "-" if values is None else f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def _share_of_bound(row: Row, base: Row) -> float:
    """How much of the speed-up that the matrix products allow was reached: 1 is all of it."""
    reached = (median(base.prefill_ms) or 0) / (median(row.prefill_ms) or 1)
    return reached / (base.bound_ms / row.bound_ms)


def screen(rows: list[Row], title: str) -> list[Table]:
    """The tables for a terminal."""
    tables = []
    for head, cells in ((SPEED, speed_cells), (TRAINING, training_cells)):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*cells(row, rows[0]))
        tables.append(table)
    return tables


def markdown(rows: list[Row]) -> str:
    """The tables for a page."""
    return f"{_page(SPEED, speed_cells, rows)}\n{_page(TRAINING, training_cells, rows)}"


def _page(head: Sequence[str], cells: Callable[[Row, Row], list[str]], rows: list[Row]) -> str:
    lines: list[Sequence[str]] = [head, ("---",) * len(head), *(cells(row, rows[0]) for row in rows)]
    return "".join("| " + " | ".join(line).replace("|Δlogit|", "\\|Δlogit\\|") + " |\n" for line in lines)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = {p: version(p) for p in ("torch", "transformers", "llava_patch")}
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(folder: Path, name: str, tables: dict[str, list[Row]], about: dict[str, Any]) -> list[Path]:
    """Write `<name>.json`, `<name>.md` and `<name>.png`; returns the paths.

    Args:
        folder: made if it is not there.
        name: file name without an ending.
        tables: rows by title.
        about: machine and settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {**about, "tables": {title: [_values(row, rows[0]) for row in rows] for title, rows in tables.items()}}
    text = "".join(f"### {title}\n\n{markdown(rows)}\n" for title, rows in tables.items())
    page = folder / f"{name}.md"
    with files.atomic(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    title, rows = next(iter(tables.items()))
    figure_path = figure(rows, title, folder / f"{name}.png")
    return [files.write_json(folder / f"{name}.json", files.plain(values)), page, figure_path]


def _values(row: Row, base: Row) -> dict[str, Any]:
    return {
        **asdict(row),
        "prefill_ratio": ratio(row, base, "prefill_ms"),
        "decode_ratio": ratio(row, base, "decode_ms"),
        "train_ratio": ratio(row, base, "train_ms"),
        "cache_ratio": row.cache_bytes / base.cache_bytes,
        "flop_ratio": row.prefill_flops / base.prefill_flops,
        "bound_ratio": row.bound_ms / base.bound_ms,
        "share_of_bound": _share_of_bound(row, base),
    }


def figure(rows: list[Row], title: str, path: Path) -> Path:
    """Bars: prefill time, decode time and cache of each method over the stock model's."""
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")

    names = [row.method for row in rows[1:]][::-1]
    kinds: tuple[tuple[str, list[Any]], ...] = (
        ("prefill time", [ratio(r, rows[0], "prefill_ms") for r in rows[1:]]),
        ("decode time a token", [ratio(r, rows[0], "decode_ms") for r in rows[1:]]),
        ("KV cache", [(r.cache_bytes / rows[0].cache_bytes,) * 3 for r in rows[1:]]),
    )
    plot, axes = plt.subplots(1, 3, figsize=(11, 0.34 * len(names) + 1.4), sharey=True, layout="constrained")
    for axis, (what, values) in zip(axes, kinds, strict=True):
        known = [value or (0.0, 0.0, 0.0) for value in values][::-1]
        middle = [v[0] for v in known]
        spread = [[v[0] - v[1] for v in known], [v[2] - v[0] for v in known]]
        bars = axis.barh(names, middle, color="#4878a8", xerr=spread if what != "KV cache" else None)
        axis.bar_label(bars, [f"{m:.2f}" for m in middle], label_type="center", color="white", fontsize=8)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xlabel(f"{what} / stock")
    plot.suptitle(f"Over the stock model ({title})", fontsize=11)
    with files.atomic(path) as temporary:
        plot.savefig(temporary, dpi=150, format="png")
    plt.close(plot)
    return path
