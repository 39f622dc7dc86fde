"""The FLOP model: what commands and report ask of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_patch.core.errors import SettingError
from llava_patch.data.target import Target
from llava_patch.measurements.base import Measurement, Table, words
from llava_patch.settings import active

if TYPE_CHECKING:
    from llava_patch.measurements.flops.result import FlopsResult

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHAPE = "7b"
TEXT = 64


class FlopsMeasurement(Measurement):
    """FLOPs and KV cache of the stock model and every variant, in closed form.

    Columns: a plain forward pass; generation's prefill; what image tokens
    still cost in the layers from the split on (stock: 100 %); one decoded
    token; the KV cache after the prompt. A patched checkpoint, and bindings
    of Routing and FastV, get a row of their own. No weights are loaded.
    """

    name = "flops"
    title = "FLOPs"
    about = (
        "What a forward pass costs in this model's sizes, stock and in every variant, in closed form: projections, "
        "attention over the whole sequence, feed-forward, head, vision tower and projector."
    )
    alt = "FLOPs of every variant of this model's sizes."
    result = "llava_patch.measurements.flops.result:FlopsResult"
    samples = None
    optional = True

    def check(self, data: str, samples: int | None, **options: Any) -> None:
        """Refuse a precision that is not known."""
        if options["dtype"] not in BYTES:
            raise SettingError(f"--dtype {options['dtype']}: expected {', '.join(BYTES)}")

    def subject(self, checkpoint: str, **options: Any) -> str:
        """A checkpoint, or a shape in its place."""
        shape = options["shape"]
        if checkpoint and shape:
            raise SettingError(f"--shape {shape} stands for a checkpoint: leave it or {checkpoint} out")
        return checkpoint or shape or SHAPE

    def tables(self, result: Any) -> list[tuple[str, Table]]:
        """A table a prompt."""
        found = []
        for number, prompt in enumerate(result.prompts):
            tokens = f"{prompt.image} image + {prompt.text} text tokens, batch {prompt.batch}"
            found.append((f"{result.shape.name}: {tokens}, split {result.split}", result.table(number)))
        return found

    def recorded(self, context: Any, settings: Any) -> dict[str, Any]:
        """The prompt, and what gin puts on the checkpoint."""
        asked = active.configuration()
        configured = {} if asked is None else {k: str(v) for k, v in asked.lasting().items()}
        return {"text tokens": TEXT, **configured}

    def in_report(self, context: Any, settings: Any) -> "FlopsResult":
        """Count one prompt; a fusion that gin puts on the checkpoint is not counted."""
        from llava_patch.measurements.flops.count import Prompt
        from llava_patch.measurements.flops.result import measure_flops

        found, split, own = self._model(context.below or context.checkpoint)
        value_bytes = 4 if context.dtype == "float32" else 2
        return measure_flops(found, [Prompt(TEXT, found.projected)], split, own=own, value_bytes=value_bytes)

    def report_tables(self, result: Any) -> list[tuple[str, Table]]:
        """The table with its prompt."""
        prompt = result.prompts[0]
        tokens = f"{prompt.image} image and {prompt.text} text tokens"
        return [(f"{tokens}; FLOPs in closed form, saved against the stock model", result.table())]

    def measure(
        self,
        target: Target,
        settings: Any = None,
        folder: Path | None = None,
        *,
        shape: str = "",
        split: int | None = None,
        fusion_layers: str = "1",
        side_layers: int = 1,
        text: list[int] = [TEXT],  # noqa: B006 - typer's way to say that an option may be repeated
        image: int | None = None,
        tiles: int | None = None,
        batch: int = 1,
        dtype: str = "float16",
    ) -> "FlopsResult":
        """Count.

        Args:
            target: the checkpoint; only its JSON files are read.
            settings: none.
            folder: not needed.
            shape: 7b, 13b or small instead of a checkpoint; default: 7b.
            split: first routed layer; default: the model's own, or 18/32.
            fusion_layers: LF: K, or layer numbers as 20,31.
            side_layers: depth of the side branch.
            text: text tokens of a prompt; may be repeated, a table each.
            image: image tokens; default: one image of the model.
            tiles: tiles that the tower takes; default: as IMAGE tokens need.
            batch: samples a batch.
            dtype: of the KV cache: float32, bfloat16 or float16.
        """
        from llava_patch.measurements.flops.count import Prompt
        from llava_patch.measurements.flops.result import measure_flops

        asked = active.configuration()
        if asked is not None and asked.fusion is not None:
            raise SettingError(
                f"{type(asked.fusion).__name__} is bound, but llava-patch flops counts a fusion of a checkpoint that "
                "carries one: leave the binding out"
            )
        if asked is not None and asked.routing is not None and not isinstance(asked.routing.split, int):
            raise SettingError(f'Routing.split = "{asked.routing.split}": nothing is measured here; name a layer')
        given = words(fusion_layers)
        if not given or not all(word.isdigit() for word in given):
            raise SettingError(f"--fusion-layers {fusion_layers}: expected a number, or layer numbers as 20,31")
        layers: Any = int(given[0]) if len(given) == 1 else tuple(map(int, given))
        found, own_split, own = self._model(target.checkpoint, shape)
        tokens = found.projected if image is None else image
        prompts = [Prompt(count, tokens, batch, tiles) for count in text]
        split = own_split if split is None else split
        return measure_flops(found, prompts, split, layers, side_layers, own, BYTES[dtype])

    def _model(self, checkpoint: str, shape: str = "") -> tuple[Any, int | None, tuple[Any, Any]]:
        """(sizes, split of a shape where no routing is bound, routing and pruning: gin's, or the checkpoint's)."""
        from llava_patch.hosts.sizes import SHAPES
        from llava_patch.measurements.flops.shape import named, read_shape

        asked = active.configuration()
        split = routing = pruning = None
        if shape or (checkpoint == SHAPE and not Path(SHAPE).exists()):
            found = named(checkpoint)
            split = SHAPES[checkpoint].split if asked is None or asked.routing is None else None
        else:
            found, routing, pruning = read_shape(checkpoint)
        if asked is not None:
            routing, pruning = asked.routing or routing, asked.pruning or pruning
        return found, split, (routing, pruning)
