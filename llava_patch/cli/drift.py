"""`llava-patch drift`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from llava_patch.cli import common as commands
from llava_patch.cli import output as written
from llava_patch.cli import several
from llava_patch.core.extras import needs
from llava_patch.core.paths import named
from llava_patch.data.examples import check_data
from llava_patch.data.model_inputs import with_count
from llava_patch.settings.active import settings_of

NAME = "drift"
SAMPLES = 32
STOCK = typer.Argument(
    "", metavar="BASE", help='the model to compare with; "" or left out: what the record of CKPT names'
)


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("drift", no_args_is_help=True)(drift)


@needs("drift", "figures")
def drift(
    checkpoint: str = commands.CHECKPOINT,
    stock: str = STOCK,
    data: str = commands.DATA,
    samples: int | None = commands.samples_option(SAMPLES, "Drift.max_samples"),
    split: int | None = typer.Option(
        None, min=1, help="compare layers 0..N-1; default: those below CKPT's split, or all"
    ),
    together: bool | None = typer.Option(
        None, "--together/--apart", help="both models in memory, or one after the other (default)"
    ),
    store_gb: float | None = typer.Option(None, help="disk for hidden states of the first model; default 20"),
    question: str = commands.QUESTION,
    output: Path | None = typer.Option(None, help="folder; default: drift/NAME", show_default=False),  # noqa: B008
    base: str = commands.BASE,
    device: str = commands.DEVICE,
    dtype: str = commands.DTYPE,
    gin_file: list[str] = commands.GIN_FILE,
    gin_param: list[str] = commands.GIN_PARAM,
) -> None:
    """Are a trained checkpoint's lower layers still the base's?

    Median cosine of both models' hidden states, layer by layer below the
    split, image and text positions apart. The models are loaded one after
    the other; the first one's states wait on disk (--store-gb).
    OUTPUT gets drift.json and drift.png.
    """
    from llava_patch.measurements.drift import Drift, measure_drift, measure_drift_apart

    commands.check_checkpoint(checkpoint)
    folder = commands.folder_for(NAME, checkpoint, output)
    with commands.configured(gin_file, gin_param):
        settings = settings_of(Drift, split=split, together=together, store_gb=store_gb)
        stock = several.base_for(checkpoint, stock or settings.base or base)
        sources = [named(checkpoint), named(stock)]
        written.check_results(folder / f"{NAME}.json", sources)
        settings = with_count(settings, samples, SAMPLES)
        check_data(data)
        own, other = several.openers(checkpoint, stock, base, data, settings.max_samples, question, device, dtype)
        if settings.together:
            (model, ours), (stock_model, theirs) = own(), other()
            result = measure_drift(model, stock_model, ours, settings, base_samples=theirs)
        else:
            result = measure_drift_apart(own, other, settings)
        result = dataclasses.replace(result, checkpoint=sources[0], base=sources[1])
        written.show(result.table())
        written.finish_plain(result, folder, NAME, checkpoint)
