"""The modality ablation: region visible or blacked out, text given or unknown; one table of the four.

Source: "Detached Skip-Links and R-Probe", table 5 (8B), whose figures are in `PAPER`.
"""

from collections.abc import Mapping
from typing import Any

from llava_patch.core.terminal import markdown
from llava_patch.measurements.rprobe.bootstrap import FEW, interval, paired
from llava_patch.measurements.rprobe.result import RProbeResult
from llava_patch.measurements.rprobe.settings import RProbe

SUMMARY = "ablation.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "masked_without_text": {"masked": True, "text": False},
    "masked_with_text": {"masked": True, "text": True},
    "full_without_text": {"masked": False, "text": False},
    "full_with_text": {"masked": False, "text": True},
}
"""Name of each run: the settings that are its own."""
PAPER = dict(zip(VARIANTS, (1.980, 1.103, 0.757, 0.724), strict=True))
# (what is measured, the run without it, the run with it): how much the MSE falls by it.
_EFFECTS = (
    ("text, region masked", "masked_without_text", "masked_with_text"),
    ("text, region visible", "full_without_text", "full_with_text"),
    ("region, without text", "masked_without_text", "full_without_text"),
    ("region, with text", "masked_with_text", "full_with_text"),
)


def summarise(results: Mapping[str, RProbeResult], settings: RProbe) -> dict[str, Any]:
    """The four results, by the names of `VARIANTS`, as plain JSON values.

    "runs" has each one's figures beside the paper's; "effects" how much the MSE falls by text and region, with the
    paired interval (None: too few documents).
    """
    runs = {}
    for name in VARIANTS:
        result = results[name]
        runs[name] = {
            "mse": result.mse,
            "interval": interval(result.documents, settings.resamples, settings.seed),
            "fvu": result.fvu,
            "mse_in_text": None if result.inside is None else result.inside.mse,
            "psnr": result.psnr,
            "steps_to_threshold": None if result.threshold_is_vacuous else result.steps_to_threshold,
            "steps_to_half_fvu": result.steps_to_half_fvu,
            "steps": len(result.losses),
            "paper": PAPER[name],
        }
    effects = []
    for label, without, with_it in _EFFECTS:
        pair = results[without].documents, results[with_it].documents
        falls, low, high = paired(*pair, settings.resamples, settings.seed)
        effects.append({"effect": label, "mse_falls_by": falls, "low": low, "high": high})
    whole = results["full_with_text"]
    return {
        "runs": runs,
        "effects": effects,
        "heldout_documents": len({sample["document"] for sample in whole.documents}),
        "heldout_samples": len(whole.documents),
        "constant_mse": whole.constant_mse,
        "comparable": settings.trained == "all",
        "cut": any(len(result.losses) < settings.steps for result in results.values()),
        **{name: getattr(settings, name) for name in ("trained", "steps", "threshold", "seed")},
    }


def tables(summary: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """(head, rows) of the two tables, as text: the runs, and what text and region do."""
    head = ["image", "text", "held-out MSE", "95 % interval", "FVU", "MSE in text", "FVU < 0.5 at step", "paper (8B)"]
    rows = []
    for name, run in summary["runs"].items():
        image, text = ("masked" if VARIANTS[name]["masked"] else "full"), ("yes" if VARIANTS[name]["text"] else "no")
        steps = "never" if run["steps_to_half_fvu"] is None else str(run["steps_to_half_fvu"])
        inside = "-" if run["mse_in_text"] is None else f"{run['mse_in_text']:.4f}"
        figures = [f"{run['mse']:.4f}", _between(*(run["interval"] or (None, None))), f"{run['fvu']:.3f}"]
        rows.append([image, text, *figures, inside, steps, f"{run['paper']:.3f}"])
    effects = [
        [one["effect"], f"{one['mse_falls_by']:+.4f}", _between(one["low"], one["high"])] for one in summary["effects"]
    ]
    return [(head, rows), (["effect of", "MSE falls by", "paired 95 % interval"], effects)]


def finding(summary: Mapping[str, Any]) -> str:
    """Whether the region is read from its own tokens, beyond what its text gives away: by the paired interval."""
    (effect,) = (one for one in summary["effects"] if one["effect"] == "region, with text")
    falls, low, high = effect["mse_falls_by"], effect["low"], effect["high"]
    if low is None or high is None:
        return "Undecided: fewer than two held-out documents have no interval; give more documents."
    between = f"the error falls by {falls:.4f} ({low:.4f} to {high:.4f}) when it is visible"
    if low > 0:
        return f"The tokens carry the region beyond what its text gives away: {between}."
    if high < 0:
        return f"The probe does worse where it sees the region: {between}; train it longer before concluding."
    return f"Undecided: the region adds nothing certain to its text: {between}."


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, a sentence each."""
    found = [
        f"{summary['heldout_samples']} held-out samples of {summary['heldout_documents']} documents; a constant patch "
        f"has MSE {summary['constant_mse']:.4f}; {summary['steps']} steps, seed {summary['seed']}."
    ]
    if any(run["interval"] is None for run in summary["runs"].values()):
        found.append(f"There is {FEW}.")
    if not summary["comparable"]:
        found.append(f'RProbe.trained = "{summary["trained"]}": not comparable with the paper or with full probes.')
    if summary["cut"]:
        found.append("Time was over before all steps were done (RProbe.minutes): not comparable with finished runs.")
    return found


def markdown_page(summary: Mapping[str, Any], title: str) -> str:
    """The two tables and their notes as markdown."""
    shown = [markdown(head, rows) for head, rows in tables(summary)]
    return "\n\n".join([f"# {title}", *shown, *notes(summary)]) + "\n"


def _between(low: float | None, high: float | None) -> str:
    return "none" if low is None or high is None else f"{low:.4f} to {high:.4f}"
