"""A small sentencepiece tokenizer with the file set and the conventions of vicuna's.

Like vicuna's: BPE with byte fallback, single digits, a dummy space in front, ids 0/1/2 for unk/bos/eos. Unlike it, a
piece may span words. The vicuna_v1 prompt thereby takes a dozen tokens instead of fifty, which is most of the
training time of a model this small.
"""

import io
from itertools import chain

import numpy as np
import sentencepiece

from . import english, prompts, questions, render
from .hub_files import json_bytes

DEFAULT_VOCAB_SIZE = 1024
MIN_VOCAB_SIZE = 384  # 3 special pieces, 256 bytes, the characters of the corpus and a few merges
MAX_PIECE_LENGTH = 48  # characters
_SEAM = "\x1f"  # pieces never span it; it is not part of the text


def _conversation(question: str, answer: str) -> str:
    """One conversation with seams where llava cuts the text or where prompt and answer meet."""
    lines = _SEAM.join(question.split("\n"))
    return _SEAM.join([prompts.SYSTEM_PROMPT, " USER:", " ", lines, " ASSISTANT:", f" {answer}"])


def corpus(seed: int = 0, num_conversations: int = 600) -> list[str]:
    """Conversations as the demo has them, then English whose pieces stay within words.

    Args:
        seed: picks the questions.
        num_conversations: how many; the more, the longer the pieces of the prompt.
    """
    sampler = questions.Sampler(np.random.default_rng(seed), dict.fromkeys(questions.DEFAULT_SHARES, 1.0))
    samples = [sampler.draw() for _ in range(num_conversations)]
    talk = [_conversation(s.question, s.answer) for s in samples]
    captions = [_SEAM.join(s.caption.split("\n")) for s in samples if s.caption]
    # Every object word as it follows an article, however rare the sampler made it.
    nouns = [f"{_SEAM} ".join(["in", questions.with_article(w), "image"]) for w in render.PHOTOGRAPH_FILES] * 20
    plain = [f"{_SEAM} ".join(s.split()) for s in english.sentences()]
    # Every character gets a piece, so that bytes are left for what no English text needs.
    characters = [_SEAM.join(chr(c) for c in range(33, 127))] * 2
    return talk + captions + nouns + plain + characters


def train_tokenizer(vocab_size: int = DEFAULT_VOCAB_SIZE, seed: int = 0) -> bytes:
    """Trains the tokenizer.

    Args:
        vocab_size: number of pieces, at least `MIN_VOCAB_SIZE`.
        seed: picks the corpus.

    Returns:
        The content of `tokenizer.model`.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, not {vocab_size}")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        max_sentencepiece_length=MAX_PIECE_LENGTH,
        pretokenization_delimiter=_SEAM,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _added_token(content: str) -> dict:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }


def slow_tokenizer_files(model: bytes, model_max_length: int) -> dict[str, bytes]:
    """File name -> content of a `LlamaTokenizer`, as in lmsys/vicuna-7b-v1.5 (no tokenizer.json).

    Args:
        model: content of `tokenizer.model`.
        model_max_length: longest sequence, in tokens.
    """
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _added_token("<s>"),
        "clean_up_tokenization_spaces": False,
        "eos_token": _added_token("</s>"),
        # The other setting needs the protobuf package.
        "legacy": True,
        "model_max_length": model_max_length,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": _added_token("<unk>"),
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    return {
        "tokenizer.model": model,
        "tokenizer_config.json": json_bytes(config),
        "special_tokens_map.json": json_bytes(special),
    }


def fast_tokenizer_files(model: bytes, model_max_length: int) -> dict[str, bytes]:
    """File name -> content of a `LlamaTokenizerFast` with "<image>" and "<pad>", as in llava-hf/llava-1.5-7b-hf.

    It splits text as the slow tokenizer does, the text after "<image>" included.

    Args:
        model: content of `tokenizer.model`.
        model_max_length: longest sequence, in tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    whole = (p for p, i in vocab.items() if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i)))
    # sentencepiece stores pieces, not merges: every way to join two pieces into a third is one, the earlier learnt
    # (lower id) first.
    merges = chain.from_iterable(
        ((p[:cut], p[cut:]) for cut in range(1, len(p)) if p[:cut] in vocab and p[cut:] in vocab)
        for p in sorted(whole, key=lambda p: (-pieces.get_score(vocab[p]), vocab[p]))
    )
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", pieces.bos_id())]
    )
    names = ["<unk>", "<s>", "</s>", prompts.IMAGE_TOKEN, "<pad>"]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    ids = {name: tokenizer.token_to_id(name) for name in names}
    added = {str(i): {**_added_token(name), "special": True} for name, i in ids.items()}
    for entry in added.values():
        del entry["__type"]
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": prompts.IMAGE_TOKEN},
        "image_token": prompts.IMAGE_TOKEN,
        "legacy": True,
        "model_max_length": model_max_length,
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {
        "tokenizer.model": model,
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json_bytes(config),
        "special_tokens_map.json": json_bytes({**special, "image_token": prompts.IMAGE_TOKEN}),
        "added_tokens.json": json_bytes({prompts.IMAGE_TOKEN: ids[prompts.IMAGE_TOKEN], "<pad>": ids["<pad>"]}),
    }
