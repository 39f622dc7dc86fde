"""Exact match on held-out images, by greedy decoding, for an original llava model or an HF one."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .prompts import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, v1_prompt

# Takes images and as many prompts of one length; gives the decoded answers.
Answerer = Callable[[list[Image.Image], list[str]], list[str]]


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Rows of a `read_test.jsonl`: "image" (file name), "question", "answer".

    Args:
        path: one JSON object a line.
    """
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line]
    for number, row in enumerate(rows, 1):
        missing = {"image", "question", "answer"} - set(row)
        if missing:
            raise ValueError(f"{path}, line {number}: no {sorted(missing)}")
    return rows


def llava_answerer(model: Any, tokenizer: Any, image_processor: Any, max_new_tokens: int = 8) -> Answerer:
    """Answers with an original llava model.

    Args:
        model: as `llava.model.builder.load_pretrained_model` returns it. It is used in the precision it has; it loads
            in float16 also on a CPU, `model.float()` makes it float32.
        tokenizer: from the same call.
        image_processor: from the same call.
        max_new_tokens: longest answer.
    """
    from llava.mm_utils import process_images, tokenizer_image_token

    def answer(images: list[Image.Image], prompts: list[str]) -> list[str]:
        ids = [tokenizer_image_token(p, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt") for p in prompts]
        batch = torch.stack(ids).to(model.device)
        pixels = process_images(images, image_processor, model.config).to(model.device, model.dtype)
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            images=pixels,
            image_sizes=[image.size for image in images],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        return tokenizer.batch_decode(out, skip_special_tokens=True)

    return answer


def hf_answerer(model: Any, processor: Any, max_new_tokens: int = 8) -> Answerer:
    """Answers with a `LlavaForConditionalGeneration`.

    Args:
        model: used in the precision it has.
        processor: its `LlavaProcessor`.
        max_new_tokens: longest answer.
    """

    def answer(images: list[Image.Image], prompts: list[str]) -> list[str]:
        batch = processor(images=images, text=prompts, return_tensors="pt", padding=True)
        batch = batch.to(model.device, model.dtype)
        out = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        return processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def exact_match(
    model: Any, processor: Any, rows: Sequence[dict], image_folder: str | os.PathLike, **options: Any
) -> float:
    """Share of rows that the model answers with exactly the right text; arguments as for `exactly_right`."""
    right = exactly_right(model, processor, rows, image_folder, **options)
    return sum(right) / len(right)


def exactly_right(
    model: Any,
    processor: Any,
    rows: Sequence[dict],
    image_folder: str | os.PathLike,
    *,
    shuffled: bool = False,
    with_system: bool = True,
    batch_size: int = 64,
    max_new_tokens: int = 8,
) -> list[bool]:
    """For each row, whether the model answers it with exactly the right text.

    Args:
        model: an original llava model or a `LlavaForConditionalGeneration`, patched or not.
        processor: `(tokenizer, image_processor)` for the former, the `LlavaProcessor` for the latter.
        rows: as `read_rows` gives them.
        image_folder: where their images are.
        shuffled: the control: every row gets the image of another row with another answer. What is left of the
            exact match does not come from the image.
        with_system: asks with vicuna's system prompt, as llava does; without it, as the HF chat template does.
        batch_size: rows at once.
        max_new_tokens: longest answer.
    """
    if not rows:
        raise ValueError("exact match needs at least one row")
    if isinstance(processor, tuple):
        answer = llava_answerer(model, *processor, max_new_tokens=max_new_tokens)
    else:
        answer = hf_answerer(model, processor, max_new_tokens=max_new_tokens)
    names = other_images(rows) if shuffled else [row["image"] for row in rows]
    prompts = [v1_prompt(row["question"].replace(f"{IMAGE_TOKEN}\n", ""), True, with_system) for row in rows]
    # Equal prompts go together, so that no batch needs padding.
    order = sorted(range(len(rows)), key=lambda i: prompts[i])
    right = [False] * len(rows)
    was_training = model.training
    model.eval()
    try:
        while order:
            group = [i for i in order[:batch_size] if prompts[i] == prompts[order[0]]]
            order = order[len(group) :]
            images = [Image.open(Path(image_folder) / names[i]).convert("RGB") for i in group]
            with torch.inference_mode():
                answers = answer(images, [prompts[i] for i in group])
            for i, text in zip(group, answers, strict=True):
                right[i] = text.strip() == rows[i]["answer"]
    finally:
        model.train(was_training)
    return right


def other_images(rows: Sequence[dict]) -> list[str]:
    """For each row, the image of a later row (cyclically the next one) that has another answer.

    Args:
        rows: at least two different answers, or there is no such image.
    """
    if len({row["answer"] for row in rows}) < 2:
        raise ValueError("shuffled images need rows with at least two different answers")
    names = []
    for i, row in enumerate(rows):
        step = next(k for k in range(1, len(rows)) if rows[(i + k) % len(rows)]["answer"] != row["answer"])
        names.append(rows[(i + step) % len(rows)]["image"])
    return names
