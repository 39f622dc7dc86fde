"""`llava-patch flops`: what every variant costs, from a model's sizes alone."""

from __future__ import annotations

from pathlib import Path

import typer

from llava_patch.cli import common as commands
from llava_patch.cli import output as written
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs

_CHECKPOINT = typer.Argument("", metavar="CKPT", help="checkpoint folder or hub name; only its JSON files are read")
_OUTPUT = typer.Option(None, help="folder of flops.json and flops.png; default: flops/NAME")
_TEXT = typer.Option([64], min=1, help="text tokens of a prompt; may be repeated, a table each")


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("flops")(flops)


@needs("flops", "figures")
def flops(
    checkpoint: str = _CHECKPOINT,
    shape: str = typer.Option("", help="7b, 13b or small instead of a checkpoint; default: 7b"),
    split: int = typer.Option(-1, show_default=False, help="first routed layer; default: the model's own, or 18/32"),
    fusion_layers: str = typer.Option("1", help="LF: K, or layer numbers as 20,31"),
    side_layers: int = typer.Option(1, min=1, help="depth of the side branch"),
    text: list[int] = _TEXT,
    image: int = typer.Option(-1, show_default=False, help="image tokens; default: one image of the model"),
    tiles: int = typer.Option(-1, show_default=False, help="tiles that the tower takes; default: as IMAGE tokens need"),
    batch: int = typer.Option(1, min=1, help="samples a batch"),
    dtype: str = typer.Option("float16", help="of the KV cache: float32, bfloat16 or float16"),
    gin_file: list[str] = commands.GIN_FILE,
    gin_param: list[str] = commands.GIN_PARAM,
    output: Path | None = _OUTPUT,
) -> None:
    """FLOPs and KV cache of the stock model and every variant, in closed form.

    Columns: a plain forward pass; generation's prefill; what image tokens
    still cost in the layers from the split on (stock: 100 %); one decoded
    token; the KV cache after the prompt. A patched checkpoint, and bindings
    of Routing and FastV, get a row of their own. No weights are loaded.
    """
    from llava_patch.hosts.sizes import SHAPES
    from llava_patch.measurements.flops import files, result
    from llava_patch.measurements.flops import shape as shapes
    from llava_patch.measurements.flops.count import Prompt
    from llava_patch.settings import active

    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    if dtype not in sizes:
        raise SettingError(f"--dtype {dtype}: expected {', '.join(sizes)}")
    if checkpoint and shape:
        raise SettingError(f"--shape {shape} stands for a checkpoint: leave it or {checkpoint} out")
    if checkpoint:
        commands.check_checkpoint(checkpoint)
    subject = checkpoint or shape or "7b"
    with commands.configured(gin_file, gin_param):
        folder = commands.folder_for("flops", subject, output)
        written.check_results(folder / "flops.json", [subject])
        routing = pruning = None
        asked = active.configuration()
        if checkpoint:
            found, routing, pruning = files.read_shape(checkpoint)
        else:
            found = shapes.named(subject)
            split = SHAPES[subject].split if split < 0 and (asked is None or asked.routing is None) else split
        if asked is not None:
            if asked.fusion is not None:
                raise SettingError(
                    f"{type(asked.fusion).__name__} is bound, but llava-patch flops counts a fusion of a checkpoint "
                    "that carries one: leave the binding out"
                )
            routing, pruning = asked.routing or routing, asked.pruning or pruning
        if routing is not None and not isinstance(routing.split, int):
            raise SettingError(f'Routing.split = "{routing.split}": nothing is measured here; name a layer')
        measured = result.measure_flops(
            found,
            [
                Prompt(words, found.projected if image < 0 else image, batch, None if tiles < 0 else tiles)
                for words in text
            ],
            None if split < 0 else split,
            _fusion_layers(fusion_layers),
            side_layers,
            (routing, pruning),
            sizes[dtype],
        )
        for number, prompt in enumerate(measured.prompts):
            tokens = f"{prompt.image} image + {prompt.text} text tokens, batch {prompt.batch}"
            written.show(measured.table(number), f"{found.name}: {tokens}, split {measured.split}")
        written.finish_plain(measured, folder, "flops", subject)


def _fusion_layers(text: str) -> int | tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise SettingError(f"--fusion-layers {text}: expected a number, or layer numbers as 20,31")
    return int(words[0]) if len(words) == 1 else tuple(map(int, words))
