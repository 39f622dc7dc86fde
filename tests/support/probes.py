"""Tiny random models and data for the probe's tests: built from configurations, nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_patch.measurements.rprobe.store.freeze import Batch, FrozenData, Text
from llava_patch.measurements.rprobe.store.shard import Record, Shard
from llava_patch.probe.sample import Sample
from llava_patch.probe.sequence import ProbeSequence, TokenGrid, build_sequence

SIDE, PATCH, HIDDEN, VOCABULARY = 56, 14, 64, 120


def tiny_model(layers: int = 4, dtype: torch.dtype = torch.float32, **text) -> LlavaForConditionalGeneration:
    """LLaVA on 56 x 56 images (16 tokens) with a small random Llama."""
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text_config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.1,
        **text,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=VOCABULARY - 1)
    return LlavaForConditionalGeneration(config).to(dtype)


def processor(side: int = SIDE) -> CLIPImageProcessor:
    """CLIP's image processor at the tiny tower's side."""
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


class Characters:
    """A tokenizer that gives one id to each character; id 0 is unknown."""

    unk_token_id: int | None = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens, "the probe's text carries no special tokens"
        return {"input_ids": [1 + ord(c) % (VOCABULARY - 3) for c in text]}


def unique_page(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A page on which no two pixels have the same colour."""
    number = np.arange(width * height).reshape(height, width)
    return Image.fromarray(np.stack([number % 251, number // 251, (number * 7) % 256], -1).astype(np.uint8))


def samples(count: int, box=(3.0, 15.0, 40.0, 27.0)) -> list[Sample]:
    """Random pages with one box each."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return [Sample(Image.fromarray(p), f"line {i}", (box,), id=f"data.jsonl:{i + 1}") for i, p in enumerate(pixels)]


def made_up(count: int, seed: int, kind: str) -> FrozenData:
    """Frozen data whose tokens are the pixels themselves ("true"), those of another place ("shuffled"), or "constant".

    Pixels are independent noise of variance 1, so whatever is not in a token cannot be known: FVU is then 1.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = TokenGrid(4, 4, 2)
    projection = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)))[0]
    pixels = torch.randn(count, grid.tokens, grid.pixels, generator=generator)
    seen = pixels
    if kind == "constant":
        seen = torch.ones_like(pixels)
    elif kind == "shuffled":
        order = torch.rand(count, grid.tokens, generator=generator).argsort(1)
        seen = pixels.gather(1, order[..., None].expand_as(pixels))
    else:
        assert kind == "true"
    target = torch.zeros(count, grid.tokens, dtype=torch.bool)
    first = torch.randint(0, 3, (count,), generator=generator)
    rows = grid.positions()[:, 0]
    target[(rows >= first[:, None]) & (rows <= first[:, None] + 1)] = True
    tensors = {
        "tokens": (seen @ projection[: grid.pixels]).flatten(0, 1),
        "positions": grid.positions().float().repeat(count, 1),
        "cells": torch.arange(grid.tokens, dtype=torch.int32).repeat(count),
        "image_counts": torch.full((count,), grid.tokens),
        "grids": torch.tensor([[grid.rows, grid.columns, grid.cell]] * count),
        "text_start": torch.full((count,), grid.text_start),
        "sample_image": torch.arange(count),
        "target": target.nonzero()[:, 1].to(torch.int32),
        "target_counts": target.sum(1),
        "pixels": pixels[target],
        "boxes": torch.zeros(0, 4, dtype=torch.float64),
        "box_counts": torch.zeros(count, dtype=torch.int64),
    }
    ones = torch.ones(count, dtype=torch.int64)
    return FrozenData(
        samples=[],
        labels=[(str(i), str(i), "") for i in range(count)],
        shards=[Shard(tensors, [Record(i, str(i), str(i), "") for i in range(count)], [])],
        places=[(0, i) for i in range(count)],
        text=Text(torch.zeros(count, 1, dtype=torch.int64), ones, torch.randn(1, HIDDEN, generator=generator)),
        key=f"{kind} {count} {seed}",
    )


def targets_of(data: FrozenData) -> torch.Tensor:
    """The pixels of all targets, float32 [targets, pixels]."""
    return torch.cat([data.batch(index).pixels for index in torch.arange(len(data)).split(64)])


def grid_sequence(target: torch.Tensor, text_counts: torch.Tensor, grid: TokenGrid) -> ProbeSequence:
    """The sequence of images that all have the grid's tokens in raster order."""
    places = grid.positions().float().expand(len(target), -1, -1)
    start = torch.full_like(text_counts, grid.text_start)
    return build_sequence(target, torch.ones_like(target), places, text_counts, start)


def random_batch(grid: TokenGrid, target: torch.Tensor, text_counts: list[int], seed: int = 0) -> Batch:
    """A batch of random embeddings, padded to the longest text."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(text_counts)
    return Batch(
        image_tokens=torch.randn(len(target), grid.tokens, HIDDEN, generator=generator),
        text_tokens=torch.randn(len(target), int(counts.max()), HIDDEN, generator=generator),
        sequence=grid_sequence(target, counts, grid),
        pixels=torch.randn(int(target.sum()), grid.pixels, generator=generator),
        counts=target.sum(1),
    )
