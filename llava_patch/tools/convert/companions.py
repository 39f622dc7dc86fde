"""A checkpoint's files beside its weights, for either host: config.json, tokenizer, processors, generation settings."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from llava_patch.core.errors import CheckpointError, brief
from llava_patch.core.stored import field, read_object
from llava_patch.core.weights import MEND, lacks_config, locate, read_json, write_json
from llava_patch.hosts import compat, configs
from llava_patch.hosts.anatomy import LLAVA
from llava_patch.hosts.hf import whole_config
from llava_patch.hosts.host import made_of
from llava_patch.hosts.llava import is_own, text_config

if TYPE_CHECKING:
    from llava_patch.tools.convert.source import Checkpoint

ORIGINAL_KEY = "original_llava_config"
"""What llava's config says and HF's has no place for is kept there in HF's, so that the way back restores it."""
_FEATURES = {"patch": "default", "cls_patch": "full"}
_DERIVED = {"mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "mm_vision_select_feature"}
# What LLaVA-1.5's own release says, for a checkpoint that never was llava's.
_RELEASED = {
    "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False, "use_mm_proj": True,
    "pad_token_id": 0,
}  # fmt: skip
_NO_TILES = "conversion knows one tile an image (LLaVA-1.5), not anyres"
_CLIP_ALONE = "conversion knows CLIP towers, which are what llava builds"
IMAGE, PAD = "<image>", "<pad>"
_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_OTHER_FILES = ("preprocessor_config.json", "processor_config.json", "generation_config.json")
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


def vision_config(source: str) -> Any:
    """A CLIP tower's configuration, from a tower folder or hub name."""
    elsewhere = "or name the folder where it is with --vision-tower"
    try:
        values = read_json(source, "config.json")
        if values is None:
            raise lacks_config(source)
    except CheckpointError as error:
        raise CheckpointError(f"vision tower {error}, {elsewhere}") from error
    if not str(values.get("model_type")).startswith("clip"):
        raise CheckpointError(f"vision tower {source} is a {values.get('model_type')!r}: {_CLIP_ALONE}")
    where = f"vision tower {source}: config.json"
    configs.check_fields(values, where, {"vision_config": dict})
    with made_of(where):
        return transformers.CLIPVisionConfig(**values.get("vision_config") or values)


def check_files(found: "Checkpoint") -> None:
    """Refuse damaged JSON among the files beside the weights, before anything is written."""
    for name in (*_TOKENIZER_FILES[1:], *_OTHER_FILES):
        if (path := found.path(name)) is not None:
            values = read_object(path, advice=MEND)
            if name == "processor_config.json" and "image_processor" in values:
                field(values, "image_processor", dict, path)


def check_convertible(config: dict[str, Any], host: str) -> None:
    """Refuse what the other host has no counterpart for."""
    if host == LLAVA:
        merge, aspect = config.get("mm_patch_merge_type") or "flat", config.get("image_aspect_ratio")
        projector, feature = config.get("mm_projector_type", "linear"), config.get("mm_vision_select_feature", "patch")
        faults = {
            f"mm_patch_merge_type = {merge!r}, image_aspect_ratio = {aspect!r}: {_NO_TILES}": (
                merge != "flat" or str(aspect).startswith("anyres")
            ),
            f"mm_projector_type = {projector!r}: HF's projector is mlp2x_gelu only": projector != "mlp2x_gelu",
            "s2 = True: HF has no multi-scale (S2) tower": config.get("s2"),
            "model_type = 'llava_qwen': conversion knows Llama and Mistral": config.get("model_type") == "llava_qwen",
            f"mm_vision_select_feature = {feature!r} is not known": feature not in _FEATURES,
        }
    else:
        whole = whole_config(config)
        vision, text, layer = whole.vision_config.model_type, whole.text_config.model_type, whole.vision_feature_layer
        act, bias = whole.projector_hidden_act, whole.multimodal_projector_bias
        faults = {
            f"model_type = {whole.model_type!r}: {_NO_TILES}": whole.model_type != "llava",
            f"vision_feature_layer = {layer}: llava's projector takes one layer, so this merged checkpoint stays on "
            "HF; convert the patched one instead": not isinstance(layer, int),
            f"its vision tower is a {vision!r}: {_CLIP_ALONE}": vision != "clip_vision_model",
            f"its language model is a {text!r}: llava has llama and mistral": text not in ("llama", "mistral"),
            f"projector_hidden_act = {act!r}, multimodal_projector_bias = {bias}: llava's mlp2x_gelu has gelu and "
            "biases": act != "gelu" or not bias,
        }
    for fault, is_there in faults.items():
        if is_there:
            raise CheckpointError(fault)


def hf_config(
    config: dict[str, Any], vision: Any, tokens: dict[str, int], added: list[str], vocab: int
) -> dict[str, Any]:
    """The config.json of HF for a llava checkpoint."""
    text = text_config(config)
    original = {k: v for k, v in config.items() if is_own(k) and k not in _DERIVED}
    original |= {"vocab_size": text.vocab_size, "pad_token_id": text.pad_token_id, "added_tokens": added}
    text.vocab_size, text.pad_token_id = vocab, tokens["<pad>"]
    text.architectures = [f"{text.model_type.capitalize()}ForCausalLM"]
    stored = compat.stored_dtype(config)
    dtype = {"torch_dtype": stored} if stored else {}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "image_token_index": tokens["<image>"],
        "pad_token_id": tokens["<pad>"],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(text.tie_word_embeddings),
        "text_config": plain(text) | dtype,
        "vision_config": {**plain(vision), "architectures": ["CLIPVisionModel"]},
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _FEATURES[config.get("mm_vision_select_feature", "patch")],
        **dtype,
        ORIGINAL_KEY: original,
    }


def llava_config(config: dict[str, Any], tower: str, vocab: int) -> dict[str, Any]:
    """The config.json of llava for an HF checkpoint."""
    whole = whole_config(config)
    kind, stored = whole.text_config.model_type, compat.stored_dtype(config)
    original = {k: v for k, v in config.get(ORIGINAL_KEY, {}).items() if k != "added_tokens"}
    return {
        **plain(whole.text_config),
        **({"torch_dtype": stored} if stored else {}),
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "model_type": f"llava_{kind}",
        "mm_projector_type": "mlp2x_gelu",
        **_RELEASED,
        **original,
        "vocab_size": vocab,
        "mm_hidden_size": whole.vision_config.hidden_size,
        "mm_vision_select_feature": {v: k for k, v in _FEATURES.items()}[whole.vision_feature_select_strategy],
        "mm_vision_select_layer": whole.vision_feature_layer,
        "mm_vision_tower": tower,
    }


def plain(config: Any) -> dict[str, Any]:
    """What a configuration object says beyond what every transformers configuration has by default, without dtype."""
    default = transformers.PretrainedConfig().to_dict()
    dropped = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
    values = {k: v for k, v in config.to_dict().items() if k not in default or default[k] != v}
    return {k: v for k, v in values.items() if k not in dropped} | {"model_type": config.model_type}


def hf_tokenizer(source: "Checkpoint") -> tuple[Any, dict[str, int], list[str]]:
    """A llava checkpoint's tokenizer with HF's "<image>" and "<pad>", their ids, and which of them it did not have."""
    place = source.find("tokenizer.model") or source.find("tokenizer.json")
    if place is None:
        raise CheckpointError(
            f"{source.name}: no tokenizer there (tokenizer.model or tokenizer.json), and HF needs one with {IMAGE}: "
            "copy the language model's into the folder"
        )
    tokenizer = _tokenizer(place)
    added = [name for name in (IMAGE, PAD) if name not in tokenizer.get_vocab()]
    tokenizer.add_tokens(transformers.AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer, {name: tokenizer.convert_tokens_to_ids(name) for name in (IMAGE, PAD)}, added


def _tokenizer(place: str) -> Any:
    """The tokenizer of a folder; CheckpointError: its files are damaged, or want a package."""
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # tokenizers has no class of its own, and damaged files meet any of Python's
        files = " or ".join(name for name in _TOKENIZER_FILES if locate(place, name) is not None)
        raise CheckpointError(
            f"{place}: the tokenizer cannot be loaded ({brief(error)}): copy or download {files} again; if it is for "
            "want of a package: pip install sentencepiece protobuf"
        ) from error


def write_hf(source: "Checkpoint", config: dict[str, Any], tokenizer: Any, vision: Any, images: Any, out: Path) -> None:
    """Tokenizer, processor, chat template and generation settings of an HF checkpoint."""
    if source.config.get("image_aspect_ratio") == "pad":  # HF has LLaVA's padding to a square in a class of its own
        values = {k: v for k, v in images.to_dict().items() if k != "image_processor_type"}
        images = compat.pil_processor("LlavaImageProcessor")(**values, do_pad=True)
    tokenizer.padding_side = "left"  # for generation in batches, as HF's releases have it
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=vision.patch_size, num_additional_image_tokens=1,
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
        chat_template=CHAT_TEMPLATES[config["text_config"]["model_type"]],
    ).save_pretrained(out)  # fmt: skip
    _generation(source, out, config.get("pad_token_id"))


def _generation(source: "Checkpoint", out: Path, pad_id: int | None) -> None:
    place = source.find("generation_config.json")
    if place is not None:
        values = read_json(place, "generation_config.json") or {}
        write_json(out / "generation_config.json", values | {"pad_token_id": pad_id})


def llava_vocabulary(source: "Checkpoint") -> tuple[int, list[str]]:
    """How many rows of HF's embedding are llava's, and the tokens that go with the rest."""
    place = source.find("tokenizer.json") or source.find("tokenizer.model")
    if place is None:
        raise CheckpointError(
            f"{source.name}: no tokenizer there (tokenizer.model or tokenizer.json), which says how many "
            "tokens the language model knows: copy it into the folder"
        )
    original = source.config.get(ORIGINAL_KEY)
    if original is not None:
        where = f"{source.name}: config.json: {ORIGINAL_KEY}"
        return field(original, "vocab_size", int, where), field(original, "added_tokens", list, where)
    vocabulary = _tokenizer(place).get_vocab()
    added = [name for name in (IMAGE, PAD) if name in vocabulary]
    rows = 1 + max(i for name, i in vocabulary.items() if name not in added)
    for name in added:
        if vocabulary[name] < rows:
            what = f"the tokenizer has tokens of its own behind {name}"
            raise CheckpointError(f"{source.name}: {what}, so HF's cannot be cut off")
    return rows, added


def llava_tokenizer(source: "Checkpoint", removed: list[str]) -> dict[str, dict[str, Any]]:
    """The JSON files of the tokenizer without some tokens (llava grows its embedding to its length), by name."""
    files = {}
    for name in _TOKENIZER_FILES[1:]:
        if (path := source.path(name)) is not None:
            values = read_object(path, advice=MEND)
            with made_of(str(path)):
                files[name] = _without(name, values, set(removed))
    return {name: values for name, values in files.items() if values}


def write_llava(source: "Checkpoint", config: dict[str, Any], tokenizer: dict[str, dict[str, Any]], out: Path) -> None:
    """Tokenizer and generation settings."""
    if (path := source.path("tokenizer.model")) is not None:
        shutil.copyfile(path, out / "tokenizer.model")
    for name, values in tokenizer.items():
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


def images_of(sources: Sequence[str]) -> str | None:
    """The first folder with an image processor's settings; transformers 5 writes them into the processor's file."""
    for source in sources:
        inside = (read_json(source, "processor_config.json") or {}).get("image_processor")
        if inside or locate(source, "preprocessor_config.json") is not None:
            return source
    return None


def clip_images(place: str) -> Any:
    """CLIP's image processor, without what other processors' files say beside its settings."""
    with made_of(f"{place}: preprocessor_config.json"):
        try:
            images = compat.pil_processor("CLIPImageProcessor").from_pretrained(place)
        except OSError as error:
            raise CheckpointError(
                f"{place}: no image processor can be read there ({brief(error)}): copy the vision tower's "
                "preprocessor_config.json into the folder, or name a tower that has one with --vision-tower"
            ) from error
    for name in ("do_pad", "_processor_class"):
        vars(images).pop(name, None)
    return images
