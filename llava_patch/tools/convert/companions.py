"""A checkpoint's other files: tokenizer, image processor, chat template, generation settings, for either host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import locate, read_json, write_json
from llava_patch.tools.convert.configs import ORIGINAL_KEY, plain
from llava_patch.tools.convert.source import Checkpoint

IMAGE, PAD = "<image>", "<pad>"
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_CONTENT = (
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)
# LLaVA's conversations "v1" (Vicuna) and "mistral_instruct", as HF's processors take them.
CHAT_TEMPLATES = {
    "llama": (
        "{%- for message in messages %}"
        "{%- if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        + _CONTENT
        + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (
        "{%- for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
        + _CONTENT
        + "{{ ' [/INST]' }}{% else %}{{ ' ' }}"
        + _CONTENT
        + "{{ '</s>' if message['role'] == 'assistant' else '' }}{% endif %}{% endfor %}"
    ),
}


def hf_tokenizer(source: Checkpoint) -> tuple[Any, dict[str, int], list[str]]:
    """A llava checkpoint's tokenizer with HF's "<image>" and "<pad>", their ids, and which of them it did not have."""
    from transformers import AddedToken, AutoTokenizer

    place = source.find("tokenizer.model") or source.find("tokenizer.json")
    if place is None:
        raise CheckpointError(
            f"{source.name}: no tokenizer there (tokenizer.model or tokenizer.json), and HF needs one with {IMAGE}: "
            "copy the language model's into the folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"{place}: the tokenizer cannot be loaded ({error}); if that is for want of a package: "
            "pip install sentencepiece protobuf"
        ) from error
    added = [name for name in (IMAGE, PAD) if name not in tokenizer.get_vocab()]
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer, {name: tokenizer.convert_tokens_to_ids(name) for name in (IMAGE, PAD)}, added


def write_hf(source: Checkpoint, out: Path, tokenizer: Any, vision: Any, tower: str, kind: str, pad_id: int) -> None:
    """Tokenizer, processor, chat template and generation settings of an HF checkpoint."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    images = _clip_images(tower)
    if source.config.get("image_aspect_ratio") == "pad":  # HF has LLaVA's padding to a square in a class of its own
        values = {k: v for k, v in images.to_dict().items() if k != "image_processor_type"}
        images = LlavaImageProcessor(**values, do_pad=True)
    tokenizer.padding_side = "left"  # for generation in batches, as HF's releases have it
    feature = source.config.get("mm_vision_select_feature", "patch")
    processor = LlavaProcessor(
        images, tokenizer, patch_size=vision.patch_size, num_additional_image_tokens=1,
        vision_feature_select_strategy="default" if feature == "patch" else "full", chat_template=CHAT_TEMPLATES[kind],
    )  # fmt: skip
    processor.save_pretrained(out)
    _generation(source, out, pad_id)


def _generation(source: Checkpoint, out: Path, pad_id: int | None) -> None:
    place = source.find("generation_config.json")
    if place is not None:
        values = read_json(place, "generation_config.json") or {}
        write_json(out / "generation_config.json", values | {"pad_token_id": pad_id})


def llava_vocabulary(source: Checkpoint) -> tuple[int, list[str]]:
    """How many rows of HF's embedding are llava's, and the tokens that go with the rest."""
    from transformers import AutoTokenizer

    original = source.config.get(ORIGINAL_KEY)
    if original is not None:
        return int(original["vocab_size"]), list(original["added_tokens"])
    place = source.find("tokenizer.json") or source.find("tokenizer.model")
    if place is None:
        raise CheckpointError(f"{source.name}: no tokenizer there, which says how many tokens the language model knows")
    vocabulary = AutoTokenizer.from_pretrained(place).get_vocab()
    added = [name for name in (IMAGE, PAD) if name in vocabulary]
    rows = 1 + max(i for name, i in vocabulary.items() if name not in added)
    behind = [name for name in added if vocabulary[name] < rows]
    if behind:
        raise CheckpointError(
            f"{source.name}: the tokenizer has tokens of its own behind {behind[0]}, so HF's cannot be cut off"
        )
    return rows, added


def write_llava(source: Checkpoint, out: Path, config: dict[str, Any], removed: list[str]) -> None:
    """Tokenizer, without the removed tokens (llava grows its embedding to its length), and generation settings."""
    for name in _TOKENIZER_FILES:
        path = source.path(name)
        if path is not None and name == "tokenizer.model":
            shutil.copyfile(path, out / name)
        elif path is not None:
            values = _without(name, json.loads(path.read_text(encoding="utf-8")), set(removed))
            if values:
                write_json(out / name, values)
    _generation(source, out, config.get("pad_token_id"))


def _without(name: str, values: dict[str, Any], removed: set[str]) -> dict[str, Any]:
    if name == "tokenizer.json":
        values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] not in removed]
        values["padding"] = None
        return values
    if name == "added_tokens.json":
        return {token: i for token, i in values.items() if token not in removed}
    for key in ("image_token", "processor_class", "extra_special_tokens"):
        values.pop(key, None)
    if "additional_special_tokens" in values:
        tokens = [t for t in values["additional_special_tokens"] if _content(t) not in removed]
        values["additional_special_tokens"] = tokens
    if "added_tokens_decoder" in values:
        decoder = values["added_tokens_decoder"]
        values["added_tokens_decoder"] = {i: t for i, t in decoder.items() if t["content"] not in removed}
    if _content(values.get("pad_token")) in removed:  # LLaVA pads with the unknown token
        values["pad_token"] = values.get("unk_token")
    if name == "tokenizer_config.json":
        values["padding_side"] = "right"
    return values


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def check_image_processor(place: str) -> None:
    """Refuse a folder or hub name without image processor settings, which a vision tower's folder needs."""
    if locate(place, "preprocessor_config.json") is None:
        raise CheckpointError(
            f"{place}: no preprocessor_config.json there, which the vision tower's folder needs: name a tower that has "
            "one with --vision-tower"
        )


def write_tower_files(place: str, folder: Path, vision: Any) -> None:
    """config.json and preprocessor_config.json of a vision tower's folder."""
    write_json(folder / "config.json", {**plain(vision), "architectures": ["CLIPVisionModel"]})
    _clip_images(place).save_pretrained(folder)


def _clip_images(place: str) -> Any:
    """CLIP's image processor, without what other processors' files say beside its settings."""
    from transformers import CLIPImageProcessor

    images = CLIPImageProcessor.from_pretrained(place)
    for name in ("do_pad", "_processor_class"):
        vars(images).pop(name, None)
    return images
