"""Several saturation results side by side: names, one table, one figure, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.files import write_json
from llava_patch.measurements.saturation.result import NAME, SaturationResult

RESULT = f"{NAME}.json"
FACTS = ("data", "question", "dtype")  # what else than the model changes the numbers
_UNSEEN = ("save_every", "max_samples", "chunk")  # settings that do not


def find_result(given: str) -> Path | None:
    """The result file that an argument names; None: it is a checkpoint.

    Args:
        given: a result file, a folder that holds one (in itself or anywhere below), or a checkpoint.

    Raises:
        InputError: a folder with several results below it, or a JSON file that is missing.
    """
    path = Path(given)
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"{given}: no such file")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    if (path / RESULT).is_file():
        return path / RESULT
    below = sorted(path.rglob(RESULT))
    if len(below) > 1:
        raise InputError(f"{given}: holds several results ({below[0]}, {below[1]}, ...): name the ones to compare")
    return below[0] if below else None


def names_of(given: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """What to call the compared models: by the last part of their paths, or the part above it, that tells them apart.

    Args:
        given: checkpoints, result files or folders.
        names: of the user's own; empty: none.

    Raises:
        SettingError: another number of names than of models, or one name twice.
    """
    if names:
        if len(names) != len(given) or len(set(names)) < len(names):
            raise SettingError(f"--names {','.join(names)}: expected {len(given)} distinct names")
        return list(names)
    parts = [_parts(path) for path in given]
    single = [part[-1] for part in parts]
    above = [part[-2] if len(part) > 1 else part[-1] for part in parts]
    for found in (single, above, [f"{a}__{b}" for a, b in zip(above, single, strict=True)]):
        if len(set(found)) == len(found):
            return found
    return [f"{name}-{i}" for i, name in enumerate(single, 1)]


def _parts(given: str) -> list[str]:
    path = Path(given)
    if path.exists():
        path = path.resolve()
    if path.name == RESULT:
        path = path.parent
    return [part.removesuffix(".json") for part in path.parts if part not in ("/", "")]


def table(results: Mapping[str, SaturationResult]) -> tuple[list[str], list[list[str]]]:
    """(head, rows), a line a model; layers are numbers with their percentage of the depth.

    `image` and `text` are the transition layers, `mass 0` and `deep` the attention mass at layer 0 and in the deep
    median, `own` is a patched model's own split.
    """
    head = ["model", "layers", "split", "window", "image", "text", "mass 0", "deep"]
    own = any(result.split is not None for result in results.values())
    rows = []
    for name, result in results.items():
        window = result.recommendation.window
        rows.append(
            [
                name,
                str(result.n_layers),
                result.worded(result.recommended_split),
                "none" if window is None else f"{window[0]}..{window[1]}",
                result.worded(result.image_transition),
                result.worded(result.text_transition),
                f"{result.curves.mass[0]:.3g}",
                f"{result.deep_mass:.3g}",
                *([result.worded(result.split)] * own),
            ]
        )
    return head + ["own"] * own, rows


def notes(results: Mapping[str, SaturationResult]) -> list[str]:
    """Why a model has no recommended split, and what besides the model differs from the first; a sentence each."""
    found = []
    base_name, base = next(iter(results.items()))
    for name, result in results.items():
        if result.recommended_split is None:
            found.append(f"{name}: no split: {result.recommendation.reason}")
        mine = {**asdict(result.settings), **{k: result.facts.get(k) for k in FACTS}, "samples": result.samples}
        theirs = {**asdict(base.settings), **{k: base.facts.get(k) for k in FACTS}, "samples": base.samples}
        unlike = [f"{k} = {mine[k]} (there {theirs[k]})" for k in mine if k not in _UNSEEN and mine[k] != theirs[k]]
        if unlike:
            found.append(f"{name} differs from {base_name} in more than the model: {', '.join(unlike)}")
    return found


def write(results: Mapping[str, SaturationResult], folder: Path) -> tuple[Path, Path]:
    """Write `compare.json` and `compare.png`.

    Returns:
        The two paths.
    """
    from llava_patch.measurements.saturation.figure import comparison_figure

    head, rows = table(results)
    values = {
        "results": {name: result.to_dict() for name, result in results.items()},
        "table": {"head": head, "rows": rows},
        "notes": notes(results),
    }
    return write_json(folder / "compare.json", values), comparison_figure(results, folder / "compare.png")
