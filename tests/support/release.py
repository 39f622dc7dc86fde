"""The files of a small random LLaVA-1.5 release, as the hub has them under four repository names; offline."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SELECT_LAYER = -2
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# What the tokenizer learns its pieces from; a piece never spans SEAM.
SEAM = "\x1f"
LINES = [
    *[SEAM.join([SYSTEM, " USER:", " ", "What is the number in the image?", " ASSISTANT:", " 417"])] * 9,
    *[f"{SEAM} ".join(["A", "small", "line", "of", "words", "with", "another", "reading", "from", "it."])] * 9,
    *[SEAM.join(chr(c) for c in range(33, 127))] * 2,  # a piece each
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class FileSet:
    """Absolute paths: the vision tower's folder, vicuna's, the stage-1 projector, and the model for each host."""

    tower: Path
    language_model: Path
    projector: Path
    llava: Path
    hf: Path


def small_llava(vision: dict, text: dict, vocab_size: int) -> Any:
    """Hugging Face's model; "<image>" and "<pad>" follow the vocabulary, whose length is then padded to 64."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    padded = -(-(vocab_size + 2) // 64) * 64
    spread = 1 / math.sqrt(text["hidden_size"])  # Llama's 0.02 fits a width of thousands
    words = {"vocab_size": padded, "pad_token_id": vocab_size + 1, "max_position_embeddings": 2048}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**{"initializer_range": spread, "rms_norm_eps": 1e-5, **words, **text}),
        image_token_index=vocab_size,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=SELECT_LAYER,
        pad_token_id=vocab_size + 1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        projector, decoder, head = _parts(model)[1:]
        for linear in (projector.linear_1, projector.linear_2):
            linear.weight.normal_(0, 1 / math.sqrt(linear.in_features))
            linear.bias.zero_()
        decoder.embed_tokens.weight.normal_(0, 0.5)  # of the size of the projector's output
        head.weight.normal_(0, 0.02)
    return model.eval()


def _parts(model: Any) -> tuple[Any, Any, Any, Any]:
    """Tower, projector, decoder and head; up to 4.51 there is no inner model."""
    inner = getattr(model, "model", model)
    language = inner.language_model
    head = model.lm_head if inner is not model else language.lm_head
    return inner.vision_tower, inner.multi_modal_projector, getattr(language, "model", language), head


def write_fileset(out: Path, *, vision: dict, text: dict, vocab_size: int, model: Any = None) -> FileSet:
    """Write the set below `out`; `model` is one of `small_llava`, whose weights it then holds."""
    from transformers import LlamaConfig, LlamaTokenizerFast, LlavaProcessor

    model = model or small_llava(vision, text, vocab_size)
    root = Path(out).resolve()
    files = FileSet(
        tower=root / f"clip-vit-small-{vision['image_size']}",
        language_model=root / "vicuna-small",
        projector=root / "mm_projector.bin",
        llava=root / "llava-v1.5-small",
        hf=root / "llava-1.5-small-hf",
    )
    tower, bridge, decoder, head = _parts(model)
    images = _write_tower(tower, files.tower)
    model = model.half()
    for part in (model.config.vision_config, model.config.text_config):
        setattr(part, "dtype" if hasattr(part, "dtype") else "torch_dtype", torch.float16)

    with torch.no_grad():  # an added token is never likelier than every real one
        for weight in (decoder.embed_tokens.weight, head.weight):
            weight[vocab_size:] = weight[:vocab_size].float().mean(0)

    language = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    language["lm_head.weight"] = head.weight.detach()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        language[name] = language[name][:vocab_size].clone()
    places = {"linear_1": "0", "linear_2": "2"}
    projector = {}
    for name, tensor in bridge.state_dict().items():
        linear, kind = name.split(".")
        projector[f"model.mm_projector.{places[linear]}.{kind}"] = tensor
    torch.save(projector, files.projector)

    config = LlamaConfig(
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, **text}, vocab_size=vocab_size, pad_token_id=0,
        architectures=["LlamaForCausalLM"], dtype="float16",
    )  # fmt: skip
    llava = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "image_aspect_ratio": "pad",
        "mm_hidden_size": vision["hidden_size"], "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": SELECT_LAYER, "mm_vision_tower": str(files.tower), "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False, "use_mm_proj": True,
    }  # fmt: skip
    pieces = _train_pieces(vocab_size)
    for folder, more, weights in ((files.language_model, {}, {}), (files.llava, llava, projector)):
        config.save_pretrained(folder)
        _edit(folder / "config.json", **more)
        _write_generation(folder, pad=0)
        _write_tokenizer(folder, pieces, pad_token="<unk>", padding_side="right")
        torch.save({**language, **weights}, folder / "pytorch_model.bin")

    if "multi_modal_projector" in model._modules:  # up to 4.51, where the class is refused
        return files
    model.save_pretrained(files.hf)
    _edit(files.hf / "config.json")
    _write_generation(files.hf, pad=vocab_size + 1)
    _write_tokenizer(files.hf, pieces)
    fast = LlamaTokenizerFast.from_pretrained(files.hf, padding_side="left", add_prefix_space=True)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.add_special_tokens({"pad_token": "<pad>"})
    LlavaProcessor(
        images, fast, patch_size=vision["patch_size"], vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(files.hf)  # fmt: skip
    return files


def _write_tower(tower: Any, folder: Path) -> Any:
    """Write the tower in single precision, as OpenAI's; returns its image processor."""
    from transformers import CLIPImageProcessor

    size = tower.config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    tower.save_pretrained(folder, safe_serialization=False)
    _edit(folder / "config.json")
    images.save_pretrained(folder)
    _edit(folder / "preprocessor_config.json", size=size, crop_size=size)
    return images


def _write_tokenizer(folder: Path, pieces: bytes, **more: Any) -> None:
    """Sentencepiece's file with its settings, as on the hub (transformers 5 saves them as another tokenizer)."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "model_max_length": 2048, "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}, **tokens, **more,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(pieces)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _write_generation(folder: Path, pad: int) -> None:
    from transformers import GenerationConfig

    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=pad).save_pretrained(folder)


def _edit(path: Path, **changes: Any) -> None:
    """Change entries of a file of settings, and spell the others as files on the hub do."""
    values = json.loads(path.read_text()) | changes
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    path.write_text(json.dumps(values, indent=2))


def _train_pieces(vocab_size: int) -> bytes:
    """The content of a `tokenizer.model` with vicuna's conventions, but that a piece may span words."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, split_digits=True, split_by_whitespace=False, split_by_unicode_script=False,
        max_sentencepiece_length=48, pretokenization_delimiter=SEAM, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
