"""The tables of both kinds of rows on screen, in Markdown and in JSON, and the figure of the methods."""

import contextlib
import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llava_patch.core import files
from llava_patch.core.plotting import TEXT, TITLE, panels, write_figure
from llava_patch.core.terminal import markdown
from llava_patch.tools.bench.compiled import Row as CompiledRow
from llava_patch.tools.bench.fusion import Row as FusionRow
from llava_patch.tools.bench.host import Row as HostRow
from llava_patch.tools.bench.host import least
from llava_patch.tools.bench.measure import Row, ratio

Table = tuple[list[str], list[list[str]]]
"""Head and lines."""


def method_tables(rows: Sequence[Row]) -> list[Table]:
    """The speed table, and the one of training and identities; ratios refer to the first row."""
    base = rows[0]
    speed = [
        ("method", lambda row: row.method),
        ("prefill ms", lambda row: f"{median(row.prefill_ms):,.0f}"),
        ("/ stock", lambda row: _ratio(row, base, "prefill_ms")),
        ("of bound", lambda row: f"{_share_of_bound(row, base):.2f}"),
        ("decode ms/token", lambda row: f"{median(row.decode_ms):,.1f}"),
        ("/ stock", lambda row: _ratio(row, base, "decode_ms")),
        ("cache MB", lambda row: f"{row.cache_bytes / 1e6:,.1f}"),
        ("/ stock", lambda row: f"{row.cache_bytes / base.cache_bytes:.3f}"),
    ]
    training = [
        ("method", lambda row: row.method),
        ("trainable", lambda row: "-" if row.trainable is None else f"{row.trainable / 1e6:,.1f} M"),
        ("training step / stock", lambda row: _ratio(row, base, "train_ms")),
        ("must equal", lambda row: row.partner),
        ("max |Δlogit|", lambda row: _difference(row.partner_delta)),
        ("cached decode", lambda row: _difference(row.cached_delta)),
    ]
    return [_table(rows, speed), _table(rows, training)]


def fusion_table(rows: Sequence[FusionRow]) -> Table:
    """The table of the fusions; ratios refer to the first row."""
    base = rows[0]
    columns = [
        ("fusion", lambda row: row.method),
        ("image tokens", lambda row: str(row.image_tokens)),
        ("added", lambda row: f"{row.added / 1e6:,.2f} M" if row.added else "-"),
        ("prefill / stock", lambda row: _ratio(row, base, "prefill_ms", digits=3)),
        ("training step / stock", lambda row: _ratio(row, base, "train_ms", digits=3)),
        ("kept for backward", lambda row: f"{row.kept_bytes / base.kept_bytes:.3f}"),
        ("max |Δlogit|", lambda row: _difference(row.start_delta)),
    ]
    return _table(rows, columns)


def compiled_table(rows: Sequence[CompiledRow]) -> Table:
    """The table of compiled decode; ratios refer to the first row, or to the method itself with a dynamic cache."""
    base = rows[0]
    columns = [
        ("method", lambda row: row.method),
        ("dynamic cache, ms/token", lambda row: f"{median(row.dynamic_ms):,.2f}"),
        ("/ stock", lambda row: _ratio(row, base, "dynamic_ms")),
        ("static, compiled, ms/token", lambda row: f"{median(row.compiled_ms):,.2f}"),
        ("/ stock", lambda row: _ratio(row, base, "compiled_ms")),
        ("/ dynamic", lambda row: f"{median(row.compiled_ms) / median(row.dynamic_ms):.2f}"),
        ("cache MB", lambda row: f"{row.cache_bytes / 1e6:,.1f}"),
        ("/ stock", lambda row: f"{row.cache_bytes / base.cache_bytes:.3f}"),
        ("max |Δlogit|", lambda row: _difference(row.delta)),
    ]
    return _table(rows, columns)


def host_table(rows: Sequence[HostRow]) -> Table:
    """The table of the host's work; ratios refer to the first row, and are those of the least times."""
    base = rows[0]

    def of(phase: str) -> list[tuple[str, Callable[[Any], str]]]:
        ms, operations = f"{phase}_ms", f"{phase}_operations"
        return [
            (f"{phase} ms", lambda row: f"{min(getattr(row, ms)):.1f}"),
            ("/ stock", lambda row: f"{least(row, base, ms):.3f}"),
            ("operations", lambda row: str(getattr(row, operations))),
            ("/ stock", lambda row: f"{getattr(row, operations) / getattr(base, operations):.3f}"),
        ]

    return _table(rows, [("method", lambda row: row.method), *of("prefill"), *of("decode")])


def _table(rows: Sequence[Any], columns: Sequence[tuple[str, Callable[[Any], str]]]) -> Table:
    return [name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows]


def _ratio(row: Any, base: Any, what: str, digits: int = 2) -> str:
    values = ratio(row, base, what)
    return "-" if values is None else f"{values[0]:.{digits}f} ({values[1]:.2f} to {values[2]:.2f})"


def _difference(delta: float | None) -> str:
    return "other tokens" if delta is None else f"{delta:.0e}" if delta else "0"


def _share_of_bound(row: Row, base: Row) -> float:
    """How much of the speed-up that the matrix products allow was reached: 1 is all of it."""
    return (median(base.prefill_ms) / median(row.prefill_ms)) / (base.bound_ms / row.bound_ms)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = {package: version(package) for package in ("torch", "transformers", "llava_patch")}
    found = {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version()}
    return {**found, **packages, "date": datetime.date.today().isoformat()}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
        return platform.machine()
    return platform.processor() or platform.machine()


def write(folder: Path, name: str, tables: dict[str, list[Row]], about: dict[str, Any]) -> list[Path]:
    """Write `<name>.json`, `<name>.md` and `<name>.png` of methods; returns the paths."""

    def values(row: Row, base: Row) -> dict[str, Any]:
        return {
            **asdict(row),
            **{f"{kind}_ratio": ratio(row, base, f"{kind}_ms") for kind in ("prefill", "decode", "train")},
            "cache_ratio": row.cache_bytes / base.cache_bytes,
            "flop_ratio": row.prefill_flops / base.prefill_flops,
            "bound_ratio": row.bound_ms / base.bound_ms,
            "share_of_bound": _share_of_bound(row, base),
        }

    found = {title: [values(row, rows[0]) for row in rows] for title, rows in tables.items()}
    pages = {title: method_tables(rows) for title, rows in tables.items()}
    title, rows = next(iter(tables.items()))
    written = _write(folder, name, pages, {**about, "tables": found})
    return [*written, figure(rows, title, folder / f"{name}.png")]


def write_fusions(folder: Path, name: str, rows: Sequence[FusionRow], title: str, about: dict[str, Any]) -> list[Path]:
    """Write `<name>.json` and `<name>.md` of fusions; arguments as for `write`."""
    values = [
        {
            **asdict(row),
            **{f"{kind}_ratio": ratio(row, rows[0], f"{kind}_ms") for kind in ("prefill", "train")},
            "kept_ratio": row.kept_bytes / rows[0].kept_bytes,
            "train_median_ms": median(row.train_ms),
        }
        for row in rows
    ]
    return _write(folder, name, {title: [fusion_table(rows)]}, {**about, "table": title, "rows": values})


def write_compiled(folder: Path, name: str, tables: dict[str, list[CompiledRow]], about: dict[str, Any]) -> list[Path]:
    """Write `<name>.json` and `<name>.md` of compiled decode; arguments as for `write`."""
    found = {
        title: [
            {
                **asdict(row),
                **{f"{kind}_ratio": ratio(row, rows[0], f"{kind}_ms") for kind in ("dynamic", "compiled")},
                "cache_ratio": row.cache_bytes / rows[0].cache_bytes,
            }
            for row in rows
        ]
        for title, rows in tables.items()
    }
    pages = {title: [compiled_table(rows)] for title, rows in tables.items()}
    return _write(folder, name, pages, {**about, "tables": found})


def write_host(folder: Path, name: str, rows: Sequence[HostRow], title: str, about: dict[str, Any]) -> list[Path]:
    """Write `<name>.json` and `<name>.md` of the host's work; arguments as for `write`."""
    values = [
        {**asdict(row), **{f"{kind}_ratio": least(row, rows[0], f"{kind}_ms") for kind in ("prefill", "decode")}}
        for row in rows
    ]
    return _write(folder, name, {title: [host_table(rows)]}, {**about, "table": title, "rows": values})


def _write(folder: Path, name: str, pages: dict[str, list[Table]], values: dict[str, Any]) -> list[Path]:
    parts = {title: "\n\n".join(markdown(*table) for table in tables) for title, tables in pages.items()}
    text = "\n".join(f"### {title}\n\n{part}\n" for title, part in parts.items())
    return [files.write_json(folder / f"{name}.json", values), files.write_text(folder / f"{name}.md", text)]


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
