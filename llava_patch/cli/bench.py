"""`llava-patch bench`: speed on random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs
from llava_patch.core.terminal import show


@needs("bench", "figures")
def bench(
    shape: str = typer.Option("small", help="small (7B's depth, reduced width), 7b or 13b; random weights"),
    device: str = typer.Option("", help="cpu or cuda; default: cuda where there is one"),
    dtype: str = typer.Option("", help="float32, bfloat16 or float16; default: bfloat16 on cuda, else float32"),
    attention: str = typer.Option("sdpa", help="attention backend: sdpa, eager or flash_attention_2"),
    split: int = typer.Option(-1, show_default=False, help="first routed layer; default: the shape's own"),
    text: list[int] = typer.Option([64], min=1, help="text tokens beside 576 image tokens; may be repeated"),  # noqa: B008
    batch: list[int] = typer.Option([1], min=1, help="samples a batch; may be repeated"),  # noqa: B008
    repeats: int = typer.Option(5, min=1, help="rounds after one warm-up; ratios are of the medians over rounds"),
    train: bool = typer.Option(False, help="time a forward and backward pass too"),
    lora: bool = typer.Option(True, help="compare with LoRA (needs peft)"),
    fusions: bool = typer.Option(False, "--fusions", help="time vision fusions (prefill, full training step) instead"),
    output: Path = typer.Option(Path("bench"), help="folder for the .json, .md and (routing) .png"),  # noqa: B008
) -> None:
    """Time prefill and decode of every routing method beside the stock model, and check its identity.

    With --fusions: prefill and a full training step of every vision
    fusion, tower included.
    """
    from llava_patch.data.loaded import pick_device, pick_dtype
    from llava_patch.hosts import sizes
    from llava_patch.tools.bench import fusion, measure, report, shapes
    from llava_patch.tools.bench.methods import methods

    if shape not in sizes.SHAPES:
        raise SettingError(f"--shape {shape}: expected one of {', '.join(sizes.SHAPES)}")
    if attention not in ("sdpa", "eager", "flash_attention_2"):
        raise SettingError(f"--attention {attention}: expected sdpa, eager or flash_attention_2")
    device = pick_device(device)
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    number = pick_dtype(dtype, device)
    size = sizes.SHAPES[shape]
    if split >= size.layers - 1:
        raise SettingError(f"--split {split}: shape {shape} has {size.layers} layers; expected 0..{size.layers - 2}")
    if fusions and (split >= 0 or train):
        raise SettingError("--fusions: always times a training step, and knows no --split: leave both out")
    tower = sizes.TOWERS["none" if not fusions else "small" if shape == "small" else "large"]
    console = Console()

    def build() -> tuple[Any, dict[str, Any]]:
        model: Any = shapes.build(size, device, number, attention, tower)
        about = report.machine(model.device)
        return model, {**about, "shape": shape, "dtype": dtype, "attention": attention, "repeats": repeats}

    def wrote(paths: Sequence[Path]) -> None:
        for path in paths:
            console.print(f"wrote {path}")

    settings = [(samples, words) for samples in batch for words in text]
    if fusions:
        for samples, words in settings:
            model, about = build()
            rest = f"one image + {words} text tokens, batch {samples}, {about['device']}, {dtype}"
            title = f"{shape}: 24 ViT blocks, {rest}"
            rows = fusion.measure(model, fusion.fusions(), words, samples, repeats=repeats)
            show(console, *report.fusion_table(rows), [], title)
            name = f"fusion_speed_{shape}" + (f"_text{words}_batch{samples}" if (words, samples) != (64, 1) else "")
            wrote(report.write_fusions(output, name, rows, title, about))
        return
    model, about = build()
    tables = {}
    for samples, words in settings:
        title = f"{shape}: 576 image + {words} text tokens, batch {samples}, {about['device']}, {dtype}"
        compared = methods(size.layers, size.split if split < 0 else split, lora)
        tables[title] = measure.measure(model, compared, words, samples, repeats=repeats, training=train)
        for table in report.method_tables(tables[title]):
            show(console, *table, [], title)
    wrote(report.write(output, f"routing_{shape}", tables, about))
