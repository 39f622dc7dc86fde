"""The layers above the split: image and text states apart, merged where a layer sees both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from llava_patch.routing import feed, side_branch, side_output, watch
from llava_patch.routing.autograd import prime
from llava_patch.routing.cache import TEXT
from llava_patch.routing.plan import Held, RoutingPlan, make_plan
from llava_patch.routing.schedule import Work
from llava_patch.routing.streams import Stream

if TYPE_CHECKING:
    from llava_patch.routing.run import Run


class DeepLayers:
    """Image and text states above the split. Only `forward` is meant to be called, once.

    At any time either `text` and `image` hold the states, or `merged` does, or both agree.
    """

    def __init__(self, run: Run, hidden: Tensor) -> None:
        """Split the batch and run the side branch."""
        self.run = run
        self.plan: RoutingPlan | None = None
        self.image: Tensor | None = None
        self.text: Tensor | None = hidden
        self.merged: Tensor | None = None
        self.idle: Tensor | None = None  # joins where a batch with an image first reads the side branch
        self.side: Tensor | None = None  # the side branch's output, which `image` is until a layer changes it
        self.number = run.program.split  # the layer under way; L behind the last
        if run.image_mask is None:
            if run.call.idle:
                self.idle = side_branch.idle(run.anatomy, hidden, run.full.rotary)
            if run.program.has_text_layers:
                run.text_stream = run.substream(TEXT, None, hidden)
        else:
            valid = run.call.valid if run.main is None else run.main.valid
            self.plan = make_plan(run.image_mask, valid, run.counts)
            name = TEXT if run.program.has_text_layers else None
            run.text_stream = run.substream(name, run.columns(self.plan.text), hidden)
            self.image = self._side_branch(self.plan.image.take(hidden))
            if run.program.side_layers and self.image.shape[1]:
                self.side = self.image = side_output.output(self.image)
            self.text = self.plan.text.take(hidden)
        self.entered: Tensor | None = None  # what the layer before pruning got

    def forward(self) -> Tensor:
        """Run the layers.

        Returns:
            [batch, main positions, hidden], or only the last positions where no others are read.
        """
        run = self.run
        for number in range(run.program.split, len(run.layers)):
            self.number = number
            if number == run.prune_at and number > run.program.split:
                self._prune()
            if number + 1 == run.prune_at:
                self.entered = self._whole()
            self._layer(number)
        self.number = len(run.layers)
        return self._with_idle(self._whole())

    def _with_idle(self, whole: Tensor) -> Tensor:
        if self.idle is not None:
            whole, self.idle = whole + self.idle, None
        return whole

    def _side_branch(self, states: Tensor) -> Tensor:
        run, plan = self.run, self.plan
        assert plan is not None
        if not run.program.side_layers or not states.shape[1]:
            return states
        call = run.call
        columns = run.columns(plan.image)
        places = columns.shifted(call.seen)
        rotary, new = columns.take_rotary(run.full.rotary), states.shape[1]
        if call.cache is not None:
            ids = columns.take(call.position_ids[:, :, None])[:, :, 0]
            memory = call.cache.remember_side(states, ids, places)
            if memory.states.shape[1] > new:
                states, places = memory.states, memory.places
                rotary = run.decoder.rotary_emb(states, memory.position_ids)
        stream = Stream(run.config, rotary, len(places), Held(places), states, run.windowed)
        return side_branch.run(run.anatomy, states, stream)[:, -new:]

    # --- one layer ----------------------------------------------------------------------------------------------------

    def _layer(self, number: int) -> None:
        run = self.run
        work = run.program.work[number]
        last = number == len(run.layers) - 1
        if work is Work.TEXT:
            self._text_layer(number, last)
        elif work is Work.FUSE:
            self._fusion_layer(number, last)
        elif work is Work.RESET or last:
            self._reset_layer(number, last)
        else:
            self._keys_layer(number)

    def _text_layer(self, number: int, last: bool) -> None:
        run = self.run
        text = self._text()
        if text.shape[1]:  # a prompt may be nothing but an image
            if last and run.lean(text, text_only=True):
                self._finish(run.suffix_only(number, text, run.text_stream))
                return
            self.text = run.layer(number, text, run.text_stream)
        run.record(self._text(), None if self.plan is None else run.columns(self.plan.text))

    def _fusion_layer(self, number: int, last: bool) -> None:
        run = self.run
        if last and run.lean(self._whole()):
            self._finish(run.suffix_only(number, self._whole(), run.main_stream))
        elif not last and number == run.program.fusion[-1] and self._image_is_read_no_more(number):
            self._keys_layer(number)
        else:
            self.merged = run.layer(number, self._with_idle(self._whole()), run.main_stream)
            self.text = None
            run.record(self.merged, run.main)

    def _image_is_read_no_more(self, number: int) -> bool:
        run = self.run
        return (
            self.plan is not None
            and run.lean(self._text(), text_only=True)
            and not run.backend_of(number).startswith("flash_attention")  # its masks cannot say this
        )

    def _reset_layer(self, number: int, last: bool) -> None:
        run = self.run
        whole = self._with_idle(self._whole())
        if last and run.lean(whole):
            self._finish(run.suffix_only(number, whole, run.main_stream))
            return
        out = run.layer(number, whole, run.main_stream)
        run.record(out, run.main)
        if last or self.plan is None:
            self.merged, self.text = out, None
        else:
            self.text, self.merged = self.plan.text.take(out), None  # `image` stays the side branch's output

    def _keys_layer(self, number: int) -> None:
        run, plan = self.run, self.plan
        if plan is None:
            self.text = run.layer(number, self._text(), run.main_stream)
            run.record(self.text, run.main)
            return
        text, image = self._text(), self._image()
        layer = run.layers[number]
        columns = run.columns(plan.image)
        image_rotary = columns.take_rotary(run.full.rotary)
        if not text.shape[1]:
            feed.store_keys(layer, image, image_rotary, run.call.cache)
        elif not image.shape[1]:
            self.text = run.layer(number, text, run.main_stream)
        else:
            watch.tell(number, run.text_stream, run.main_stream)
            self.text = feed.call_with_keys(
                layer, prime(text, layer), image, rotary=run.text_stream.rotary, others_rotary=image_rotary,
                merge=plan.merge_heads, attention_mask=run.text_rows(), past_key_values=run.call.cache,
            )  # fmt: skip
        run.record(self._text(), run.columns(plan.text))

    # --- states -------------------------------------------------------------------------------------------------------

    def _text(self) -> Tensor:
        if self.text is None:
            assert self.merged is not None
            if self.plan is None:
                self.text = self.merged
            else:
                self.text, self.image = self.plan.text.take(self.merged), self.plan.image.take(self.merged)
        self.merged = None
        return self.text

    def _whole(self) -> Tensor:
        if self.merged is None:
            assert self.text is not None
            if self.plan is None:
                self.merged = self.text
            else:
                self.merged = self.plan.merge(self._image(), self.text)
        return self.merged

    def _image(self) -> Tensor:
        assert self.image is not None
        return side_output.read(self.image, self.number) if self.image is self.side else self.image

    def _finish(self, states: Tensor) -> None:
        self.merged, self.text, self.plan = states, None, None

    def _prune(self) -> None:
        """Prune between deep layers (pc and kv, whose layers see the image)."""
        run = self.run
        assert self.entered is not None
        was_side, self.side = self.image is self.side, None  # pruning is no layer that reads it
        hidden = run.prune(self.entered, self._whole())
        if self.plan is not None:  # the text positions, and so the text stream, stay as they are
            assert run.image_mask is not None and run.main is not None
            self.plan = make_plan(run.image_mask, run.main.valid, run.counts)
            self.text, self.image, self.merged = self.plan.text.take(hidden), self.plan.image.take(hidden), None
            self.side = self.image if was_side else None
