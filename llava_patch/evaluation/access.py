"""From lmms-eval's model object to what a measurement needs: model, tokenizer, image processor, inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava_patch.errors import HostError
from llava_patch.evaluation.loud import model_of
from llava_patch.hosts.anatomy import HF, Anatomy, find

LLAVA_15_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
"""Prompt of LLaVA-1.5 (conversation `vicuna_v1`)."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under evaluation.

    Attributes:
        anatomy: where its parts are.
        tokenizer: its tokenizer.
        image_processor: turns PIL images into pixel values (CLIPImageProcessor and kin).
        processor: HF's joint processor; None on `llava`.
        conversation: name of llava's conversation template; None on HF.
    """

    anatomy: Anatomy
    tokenizer: Any
    image_processor: Any
    processor: Any
    conversation: str | None

    def forward_inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        """Keyword arguments of the model's forward for one image and a question about it, on the model's device."""
        return self._hf_inputs(image, question) if self.anatomy.host == HF else self._llava_inputs(image, question)

    def _hf_inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            text = LLAVA_15_PROMPT.format(question=question)
        pixels = next(self.anatomy.projector.parameters())
        inputs = self.processor(images=[image], text=text, return_tensors="pt").to(self._device(), pixels.dtype)
        return dict(inputs)

    def _llava_inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        from llava.constants import DEFAULT_IMAGE_TOKEN
        from llava.conversation import conv_templates
        from llava.mm_utils import process_images, tokenizer_image_token

        conversation = conv_templates[self.conversation or "vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(
            conversation.get_prompt(), self.tokenizer, self.anatomy.image_token_id, return_tensors="pt"
        )[None].to(self._device())
        dtype = next(self.anatomy.projector.parameters()).dtype
        pixels = process_images([image], self.image_processor, self.anatomy.model.config)
        if isinstance(pixels, list):
            pixels = [p.to(self._device(), dtype) for p in pixels]
        else:
            pixels = pixels.to(self._device(), dtype)
        return {"input_ids": ids, "images": pixels, "image_sizes": [image.size]}

    def _device(self) -> Any:
        return self.anatomy.embed_tokens.weight.device


def reach(lm: Any) -> Subject:
    """Find model, tokenizer and processors in lmms-eval's `llava` and `llava_hf` models.

    Raises:
        HostError: another kind of model; the message says which ones work.
    """
    model = model_of(lm)
    tokenizer = getattr(lm, "tokenizer", None)
    processor = getattr(lm, "_image_processor", None)
    if model is None or tokenizer is None or processor is None:
        raise HostError(
            f"llava_patch's tasks look inside the model and know lmms-eval's `llava` and `llava_hf`; "
            f"{type(lm).__name__} has no model, tokenizer and image processor to look at"
        )
    anatomy = find(model)
    joint = processor if hasattr(processor, "image_processor") else None
    if (joint is not None) != (anatomy.host == HF):
        raise HostError(f"{type(processor).__name__} is not the processor of a model of the host {anatomy.host!r}")
    return Subject(
        anatomy=anatomy,
        tokenizer=tokenizer,
        image_processor=processor if joint is None else joint.image_processor,
        processor=joint,
        conversation=getattr(lm, "conv_template", None),
    )
