"""From an image and a question about it to the keyword arguments of a host model's forward."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from llava_patch.core.errors import InputError, LlavaPatchError, brief
from llava_patch.hosts.anatomy import HF, Anatomy

if TYPE_CHECKING:
    from llava_patch.data.examples import Example

IGNORED = -100  # label of positions that the loss leaves out, in torch and both hosts
LLAVA_15_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
"""Prompt of LLaVA-1.5 (conversation `vicuna_v1`)."""


@contextlib.contextmanager
def _refused(image: Image.Image) -> Iterator[None]:
    """Say which image it is that a processor cannot take."""
    try:
        yield
    except LlavaPatchError:
        raise
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise InputError(
            f"the model's processor refuses the image of {image.width} x {image.height} pixels: {brief(error)}"
        ) from error


@dataclass(frozen=True, eq=False)
class Inputs:
    """Makes a model's inputs."""

    anatomy: Anatomy
    tokenizer: Any
    image_processor: Any  # turns PIL images into pixel values (CLIPImageProcessor and kin)
    processor: Any = None  # HF's joint processor; None on `llava`
    conversation: str | None = None  # name of llava's conversation template; None: LLaVA-1.5's

    def of(self, example: "Example", answers: bool = False) -> dict[str, Any]:
        """The `forward_inputs` of an example or, with `answers`, its `training_inputs`; errors name the example."""
        image, name = example.open_image(), example.where or example.id
        try:
            if answers:
                return self.training_inputs(image, example.question, example.answer)
            return self.forward_inputs(image, example.question)
        except InputError as error:
            raise InputError(f"{name}: {error}; leave it out of the data (image {example.image})") from error

    def forward_inputs(self, image: Image.Image, question: str) -> dict[str, Any]:
        """Keyword arguments of the model's forward for one image and a question about it, on the model's device.

        InputError: the image processor refuses the image, or the tokens are more than the model has positions.
        """
        return self._encoder(image, question)(None)

    def training_inputs(self, image: Image.Image, question: str, answer: str) -> dict[str, Any]:
        """The same followed by an answer and the end-of-sequence token, with `labels`: only the answer is scored."""
        encode = self._encoder(image, question)
        prompt, inputs = encode(None)["input_ids"], encode(answer)
        # Tokenised together, as in training: alone, the answer's first word may become other tokens.
        whole = inputs["input_ids"]
        shared = min(prompt.shape[1], whole.shape[1])
        same = int((prompt[0, :shared] == whole[0, :shared]).long().cumprod(0).sum())
        end = torch.full((1, 1), self.tokenizer.eos_token_id, dtype=whole.dtype, device=whole.device)
        inputs["input_ids"] = torch.cat([whole, end], dim=1)
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :same] = IGNORED
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        self._check_length(inputs["input_ids"])
        return inputs

    def _check_length(self, ids: torch.Tensor) -> None:
        """Refuse ids [1, length] that are more than the language model has positions: such a forward may not end."""
        config = self.anatomy.model.config
        config = getattr(config, "text_config", None) or config
        limit = getattr(config, "max_position_embeddings", None)
        scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        if limit and isinstance(factor, (int, float)):  # of a context that was lengthened
            limit = int(limit * max(factor, 1))
        if limit and ids.shape[1] > limit:
            raise InputError(
                f"the prompt has {ids.shape[1]:,} tokens, and the language model has {limit:,} positions "
                "(max_position_embeddings): shorten the question or the answer"
            )

    def _encoder(self, image: Image.Image, question: str) -> Callable[[str | None], dict[str, Any]]:
        """What makes the inputs of image and question, followed by an answer unless that is None."""
        device, dtype = self.anatomy.embed_tokens.weight.device, next(self.anatomy.projector.parameters()).dtype
        if self.anatomy.host == HF:
            text = LLAVA_15_PROMPT.format(question=question)
            if getattr(self.processor, "chat_template", None):
                content = [{"type": "image"}, {"type": "text", "text": question}]
                turn = {"role": "user", "content": content}
                text = self.processor.apply_chat_template([turn], add_generation_prompt=True)

            def encode(words: str) -> dict[str, Any]:
                with _refused(image):
                    made = self.processor(images=[image], text=words, return_tensors="pt")
                self._check_length(made["input_ids"])
                return dict(made.to(device, dtype))

        else:
            from llava.constants import DEFAULT_IMAGE_TOKEN
            from llava.conversation import conv_templates
            from llava.mm_utils import process_images, tokenizer_image_token

            conversation = conv_templates[self.conversation or "vicuna_v1"].copy()
            conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
            conversation.append_message(conversation.roles[1], None)
            text = conversation.get_prompt()
            with _refused(image):
                pixels = process_images([image], self.image_processor, self.anatomy.model.config)
            one_size = isinstance(pixels, torch.Tensor)
            pixels = pixels.to(device, dtype) if one_size else [p.to(device, dtype) for p in pixels]

            def encode(words: str) -> dict[str, Any]:
                ids = tokenizer_image_token(words, self.tokenizer, self.anatomy.image_token_id, return_tensors="pt")
                self._check_length(ids[None])
                return {"input_ids": ids[None].to(device), "images": pixels, "image_sizes": [image.size]}

        return lambda answer: encode(text if answer is None else f"{text.rstrip()} {answer}")
