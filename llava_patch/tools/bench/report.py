"""The tables of both kinds of rows on screen, in Markdown and in JSON, and the figure of the methods."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llava_patch.core import files
from llava_patch.core.plotting import TEXT, TITLE, panels, write_figure
from llava_patch.core.terminal import markdown
from llava_patch.tools.bench.fusion import Row as FusionRow
from llava_patch.tools.bench.measure import Row, median, ratio

SPEED = ("method", "prefill ms", "/ stock", "of bound", "decode ms/token", "/ stock", "cache MB", "/ stock")
TRAINING = ("method", "trainable", "training step / stock", "must equal", "max |Δlogit|", "cached decode")
FUSIONS = (
    "fusion", "image tokens", "added", "prefill / stock", "training step / stock", "kept for backward", "max |Δlogit|",
)  # fmt: skip
Table = tuple[Sequence[str], list[list[str]]]
"""Head and lines."""


def method_tables(rows: Sequence[Row]) -> list[Table]:
    """The speed table, and the one of training and identities; ratios refer to the first row."""
    base = rows[0]
    speed = [
        [
            row.method,
            f"{median(row.prefill_ms) or 0:,.0f}",
            _ratio(row, base, "prefill_ms"),
            f"{_share_of_bound(row, base):.2f}",
            f"{median(row.decode_ms) or 0:,.1f}",
            _ratio(row, base, "decode_ms"),
            f"{row.cache_bytes / 1e6:,.1f}",
            f"{row.cache_bytes / base.cache_bytes:.3f}",
        ]
        for row in rows
    ]
    training = [
        [
            row.method,
            "-" if row.trainable is None else f"{row.trainable / 1e6:,.1f} M",
            _ratio(row, base, "train_ms"),
            row.partner,
            _difference(row.partner_delta),
            _difference(row.cached_delta),
        ]
        for row in rows
    ]
    return [(SPEED, speed), (TRAINING, training)]


def fusion_table(rows: Sequence[FusionRow]) -> Table:
    """The table of the fusions; ratios refer to the first row."""
    base = rows[0]
    lines = [
        [
            row.method,
            str(row.image_tokens),
            f"{row.added / 1e6:,.2f} M" if row.added else "-",
            _ratio(row, base, "prefill_ms", digits=3),
            _ratio(row, base, "train_ms", digits=3),
            f"{row.kept_bytes / base.kept_bytes:.3f}",
            "other tokens" if row.start_delta is None else _difference(row.start_delta),
        ]
        for row in rows
    ]
    return FUSIONS, lines


def _ratio(row: Any, base: Any, what: str, digits: int = 2) -> str:
    values = ratio(row, base, what)
    return "-" if values is None else f"{values[0]:.{digits}f} ({values[1]:.2f} to {values[2]:.2f})"


def _difference(delta: float) -> str:
    return f"{delta:.0e}" if delta else "0"


def _share_of_bound(row: Row, base: Row) -> float:
    """How much of the speed-up that the matrix products allow was reached: 1 is all of it."""
    reached = (median(base.prefill_ms) or 0) / (median(row.prefill_ms) or 1)
    return reached / (base.bound_ms / row.bound_ms)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = {p: version(p) for p in ("torch", "transformers", "llava_patch")}
    found = {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version()}
    return {**found, **packages, "date": datetime.date.today().isoformat()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(folder: Path, name: str, tables: dict[str, list[Row]], about: dict[str, Any]) -> list[Path]:
    """Write `<name>.json`, `<name>.md` and `<name>.png` of methods; returns the paths."""
    values = {**about, "tables": {title: [_values(row, rows[0]) for row in rows] for title, rows in tables.items()}}
    parts = {title: "\n\n".join(markdown(*table) for table in method_tables(rows)) for title, rows in tables.items()}
    written = _write(folder, name, "\n".join(f"### {title}\n\n{text}\n" for title, text in parts.items()), values)
    title, rows = next(iter(tables.items()))
    return [*written, figure(rows, title, folder / f"{name}.png")]


def write_fusions(folder: Path, name: str, rows: Sequence[FusionRow], title: str, about: dict[str, Any]) -> list[Path]:
    """Write `<name>.json` and `<name>.md` of fusions; arguments as for `write`."""
    base = rows[0]
    values = [
        {
            **asdict(row),
            "prefill_ratio": ratio(row, base, "prefill_ms"),
            "train_ratio": ratio(row, base, "train_ms"),
            "kept_ratio": row.kept_bytes / base.kept_bytes,
            "train_median_ms": median(row.train_ms),
        }
        for row in rows
    ]
    text = f"### {title}\n\n{markdown(*fusion_table(rows))}\n"
    return _write(folder, name, text, {**about, "table": title, "rows": values})


def _write(folder: Path, name: str, text: str, values: dict[str, Any]) -> list[Path]:
    page = files.write_text(folder / f"{name}.md", text)
    return [files.write_json(folder / f"{name}.json", values), page]


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
    names = [row.method for row in rows[1:]][::-1]
    kinds: tuple[tuple[str, list[Any]], ...] = (
        ("prefill time", [ratio(r, rows[0], "prefill_ms") for r in rows[1:]]),
        ("decode time a token", [ratio(r, rows[0], "decode_ms") for r in rows[1:]]),
        ("KV cache", [(r.cache_bytes / rows[0].cache_bytes,) * 3 for r in rows[1:]]),
    )
    plot, axes = panels(1, 3, 0.3 * len(names) + 1.2)
    for axis, (what, values) in zip(axes, kinds, strict=True):
        known = [value or (0.0, 0.0, 0.0) for value in values][::-1]
        middle = [v[0] for v in known]
        spread = [[v[0] - v[1] for v in known], [v[2] - v[0] for v in known]]
        bars = axis.barh(names, middle, color=TEXT, xerr=spread if what != "KV cache" else None, zorder=2)
        axis.bar_label(bars, [f"{m:.2f}" for m in middle], label_type="center", color="white")
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xlabel(f"{what} / stock")
        axis.tick_params(labelleft=axis is axes[0])
    plot.suptitle(f"Over the stock model ({title})", fontsize=TITLE)
    return write_figure(plot, path)
