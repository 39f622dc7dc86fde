"""From an image and a question about it to the keyword arguments of a host model's forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava_patch.hosts.anatomy import HF, Anatomy

IGNORED = -100  # label of positions that the loss leaves out, in torch and both hosts
LLAVA_15_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
"""Prompt of LLaVA-1.5 (conversation `vicuna_v1`)."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Makes a model's inputs.

    Attributes:
        anatomy: where the model's parts are.
        tokenizer: its tokenizer.
        image_processor: turns PIL images into pixel values (CLIPImageProcessor and kin).
        processor: HF's joint processor; None on `llava`.
        conversation: name of llava's conversation template; None: LLaVA-1.5's.
    """

    anatomy: Anatomy
    tokenizer: Any
    image_processor: Any
    processor: Any = None
    conversation: str | None = None

    def forward_inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        """Keyword arguments of the model's forward for one image and a question about it, on the model's device."""
        return self._hf(image, question, None) if self.anatomy.host == HF else self._llava(image, question, None)

    def training_inputs(self, image: Image.Image, question: str, answer: str) -> dict[str, Any]:
        """The same followed by an answer and the end-of-sequence token, with `labels`: only the answer is scored."""
        return self._hf(image, question, answer) if self.anatomy.host == HF else self._llava(image, question, answer)

    def _hf(self, image: Image.Image, question: str, answer: str | None) -> dict[str, Any]:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            text = LLAVA_15_PROMPT.format(question=question)

        def encode(words: str) -> dict[str, Any]:
            pixels = next(self.anatomy.projector.parameters())
            return dict(
                self.processor(images=[image], text=words, return_tensors="pt").to(self._device(), pixels.dtype)
            )

        inputs = encode(text)
        if answer is not None:
            whole = encode(f"{text.rstrip()} {answer}")["input_ids"]
            inputs["input_ids"], inputs["labels"] = self._scored(inputs["input_ids"], whole)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def _llava(self, image: Image.Image, question: str, answer: str | None) -> dict[str, Any]:
        from llava.constants import DEFAULT_IMAGE_TOKEN
        from llava.conversation import conv_templates
        from llava.mm_utils import process_images, tokenizer_image_token

        conversation = conv_templates[self.conversation or "vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        conversation.append_message(conversation.roles[1], None)

        def encode(words: str) -> torch.Tensor:
            ids = tokenizer_image_token(words, self.tokenizer, self.anatomy.image_token_id, return_tensors="pt")
            return ids[None].to(self._device())

        text = conversation.get_prompt()
        ids = encode(text)
        dtype = next(self.anatomy.projector.parameters()).dtype
        pixels = process_images([image], self.image_processor, self.anatomy.model.config)
        if isinstance(pixels, list):
            pixels = [p.to(self._device(), dtype) for p in pixels]
        else:
            pixels = pixels.to(self._device(), dtype)
        inputs = {"input_ids": ids, "images": pixels, "image_sizes": [image.size]}
        if answer is not None:
            inputs["input_ids"], inputs["labels"] = self._scored(ids, encode(f"{text.rstrip()} {answer}"))
        return inputs

    def _scored(self, prompt: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of prompt and answer with the end-of-sequence token, and labels of what comes after the prompt.

        Tokenised together, as in training: alone, the answer's first word may become other tokens.
        """
        shared = min(prompt.shape[1], whole.shape[1])
        same = int((prompt[0, :shared] == whole[0, :shared]).long().cumprod(0).sum())
        end = torch.full((1, 1), self.tokenizer.eos_token_id, dtype=whole.dtype, device=whole.device)
        ids = torch.cat([whole, end], dim=1)
        labels = ids.clone()
        labels[:, :same] = IGNORED
        return ids, labels

    def _device(self) -> Any:
        return self.anatomy.embed_tokens.weight.device
