"""What is given to a patched model while it runs and does not fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.reliability.place import Call, Place, Row, open_stock

TOKENS = 8  # <s>, four of the image, three of text


def ids(batch: int = 1, images: int = 1) -> torch.Tensor:
    """Token ids with the places of some images."""
    image = open_stock().config.image_token_id
    return torch.tensor([[1, *[image] * 4 * images, 10, 11, 12]] * batch)


def pixels(batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 3, 28, 28)


def embeds() -> torch.Tensor:
    return open_stock().get_input_embeddings()(ids())


def called(use: Callable[[Any, Any], Any], **settings: Any) -> Callable[[Place], Call]:
    """A call of the stock model with a patch (LF routing from layer 2), which is taken off again."""

    def make(place: Place) -> Call:
        def run() -> None:
            from llava_patch import Routing, patch

            with patch(open_stock(), **(settings or {"routing": Routing(split=2)})) as handle, torch.no_grad():
                use(open_stock(), handle)

        return run

    return make


def masked(mask: Any, batch: int = 1, generate: bool = False) -> Callable[[Place], Call]:
    """A call with an attention mask."""

    def use(model: Any, handle: Any) -> Any:
        given = {"input_ids": ids(batch), "pixel_values": pixels(batch), "attention_mask": mask}
        return model.generate(**given, max_new_tokens=2) if generate else model(**given)

    return called(use)


def placed(mask: Any, **more: Any) -> Callable[[Place], Call]:
    """A call with embeddings and the positions of their images."""

    def use(model: Any, handle: Any) -> None:
        with handle.image_positions(mask, **more):
            model(inputs_embeds=embeds())

    return called(use)


def never_called(model: Any, handle: Any) -> None:
    with handle.image_positions(torch.ones(1, TOKENS, dtype=torch.bool)):
        pass


def next_turn_of_another_width(model: Any, handle: Any) -> None:
    cache = model(input_ids=ids(), pixel_values=pixels(), use_cache=True).past_key_values
    more = torch.tensor([[13, 14]])
    model(input_ids=more, past_key_values=cache, attention_mask=ones(1, TOKENS))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


SHAPE = "one of [1, 8]"
ROWS = [
    Row("runtime", "a mask that is wider", masked(ones(1, 11)), ("attention_mask is [1, 11]", "8 tokens", SHAPE)),
    Row("runtime", "a mask that is narrower", masked(ones(1, 5)), ("attention_mask is [1, 5]", "8 tokens", SHAPE)),
    Row("runtime", "a mask of one token", masked(ones(1, 1)), ("attention_mask is [1, 1]", SHAPE)),
    Row("runtime", "a mask of no token", masked(ones(1, 0)), ("attention_mask is [1, 0]", SHAPE)),
    Row("runtime", "a mask of more samples", masked(ones(2, 8)), ("attention_mask is [2, 8]", "1 samples", SHAPE)),
    Row("runtime", "a mask of fewer samples", masked(ones(1, 8), 2), ("attention_mask is [1, 8]", "one of [2, 8]")),
    Row("runtime", "a mask of one dimension", masked(ones(8)), ("2-D attention_mask", "1 dimensions")),
    Row("runtime", "a mask of four dimensions", masked(ones(1, 1, 8, 8)), ("2-D attention_mask", "4 dimensions")),
    Row("runtime", "a mask of complex numbers", masked(ones(1, 8) * 1j), ("attention_mask", "0 and 1", "complex64")),
    Row("runtime", "a mask that is a list", masked([[1] * 8]), ("attention_mask", "expected a tensor", "list")),
    Row("runtime", "generation with a wider mask", masked(ones(1, 10), generate=True), ("[1, 10]", SHAPE)),
    Row(
        "runtime",
        "a later turn with a mask of the first one's width",
        called(next_turn_of_another_width),
        ("attention_mask is [1, 8]", "after 8 cached", "one of [1, 10]"),
    ),
    Row(
        "runtime",
        "ids of one dimension",
        called(lambda model, handle: model(input_ids=ids()[0], pixel_values=pixels())),
        ("input_ids", "[batch, tokens]"),
    ),
    Row(
        "runtime",
        "ids of three dimensions",
        called(lambda model, handle: model(input_ids=ids()[None], pixel_values=pixels())),
        ("input_ids", "[batch, tokens]"),
    ),
    Row(
        "runtime",
        "embeddings without the positions of images",
        called(lambda model, handle: model(inputs_embeds=embeds())),
        ("inputs_embeds", "image_positions"),
    ),
    Row(
        "runtime", "image positions that are too many", placed(ones(1, 10).bool()), ("cover 10 tokens", "got 8", "give")
    ),
    Row("runtime", "image positions that are too few", placed(ones(1, 6).bool()), ("cover 6 tokens", "got 8", "give")),
    Row("runtime", "image positions that are integers", placed(ones(1, 8)), ("image_mask", "bool tensor", "int64")),
    Row("runtime", "image positions of one dimension", placed(ones(8).bool()), ("image_mask", "[batch, tokens]")),
    Row("runtime", "image positions that are a list", placed([[True] * 8]), ("image_mask", "bool tensor", "list")),
    Row("runtime", "image positions of three samples", placed(ones(3, 8).bool()), ("3 samples", "got 1", "give a row")),
    Row("runtime", "image positions of no sample", placed(ones(0, 8).bool()), ("0 samples", "got 1", "give a row")),
    Row(
        "runtime",
        "kept positions of a model that prunes nothing",
        placed(ones(1, 8).bool(), kept=ones(1, 8).bool()),
        ("kept", "prunes nothing"),
    ),
    Row("runtime", "image positions without a call", called(never_called), ("image_positions", "not called")),
    Row(
        "runtime",
        "a cache that is text",
        called(lambda model, handle: model(input_ids=ids(), pixel_values=pixels(), past_key_values="x")),
        ("KV cache", "str", "dynamic"),
    ),
    Row(
        "runtime",
        "attention probabilities asked for",
        called(lambda model, handle: model(input_ids=ids(), pixel_values=pixels(), output_attentions=True)),
        ("output_attentions", "handle.remove()"),
    ),
    Row(
        "runtime",
        "samples packed into one sequence",
        called(
            lambda model, handle: model(
                input_ids=ids(), pixel_values=pixels(), position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
            )
        ),
        ("padded batches", "packed"),
    ),
]
