"""LLaVA's vicuna_v1 prompt as text and as token ids, equal to what llava's `preprocess_v1` makes of a conversation."""

from functools import lru_cache

import sentencepiece

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_INDEX = -200  # llava's placeholder id for one image
IGNORE_INDEX = -100  # llava's label for positions without a loss
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def v1_prompt(question: str, with_image: bool = True, with_system: bool = True) -> str:
    """The text up to and including "ASSISTANT:".

    Args:
        question: the user's text, without the image placeholder.
        with_image: puts "<image>" and a line break before the question.
        with_system: begins with vicuna's system prompt, as llava does; the chat template of the HF checkpoints
            leaves it out.
    """
    system = f"{SYSTEM_PROMPT} " if with_system else ""
    image = f"{IMAGE_TOKEN}\n" if with_image else ""
    return f"{system}USER: {image}{question} ASSISTANT:"


class PromptEncoder:
    """Token ids of prompts and answers, with llava's rules.

    llava tokenises the text before and after "<image>" apart, so each begins with the tokenizer's dummy space. The
    answer is tokenised apart too: the tokenizer has no piece that spans "ASSISTANT:" and an answer, so that is what
    tokenising the whole conversation gives.

    Args:
        tokenizer_model: path of the sentencepiece model.
    """

    def __init__(self, tokenizer_model: str):
        self.sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
        self.prompt_ids = lru_cache(maxsize=100_000)(self._prompt_ids)
        self.answer_ids = lru_cache(maxsize=100_000)(self._answer_ids)

    def _prompt_ids(self, question: str, with_image: bool = True, with_system: bool = True) -> tuple[int, ...]:
        """Ids of `v1_prompt(...)` with a leading BOS; the image is one `IMAGE_TOKEN_INDEX`."""
        chunks = v1_prompt(question, with_image, with_system).split(IMAGE_TOKEN)
        ids = [self.sentencepiece.bos_id(), *self.sentencepiece.encode(chunks[0])]
        for chunk in chunks[1:]:
            ids += [IMAGE_TOKEN_INDEX, *self.sentencepiece.encode(chunk)]
        return tuple(ids)

    def _answer_ids(self, answer: str) -> tuple[int, ...]:
        """Ids of an answer with the closing EOS."""
        return (*self.sentencepiece.encode(answer), self.sentencepiece.eos_id())

    def caption_ids(self, caption: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and answer of a stage-1 sample (`--version plain`): an image, then its caption and a line break."""
        prompt = (self.sentencepiece.bos_id(), IMAGE_TOKEN_INDEX)
        return prompt, tuple(self.sentencepiece.encode(f"{caption}\n"))

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, up to the first EOS."""
        eos = self.sentencepiece.eos_id()
        kept = ids[: ids.index(eos)] if eos in ids else ids
        return self.sentencepiece.decode([i for i in kept if i >= 0]).strip()
