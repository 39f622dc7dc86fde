"""A tiny random LLaVA-1.5 as files on disk, with tokenizer and processor, and a little POPE; offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDE, PATCH = 28, 14


def tokenizer() -> Any:
    """A byte-level tokenizer in memory that knows <image>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def vision_config() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip


def text_sizes(layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip


def hf_model(layers: int = 4) -> Any:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    words = tokenizer()
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=LlamaConfig(**text_sizes(layers, len(words))),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config).eval()


def processor() -> Any:
    from transformers import LlavaProcessor

    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} {% endfor %}ASSISTANT:"
    )
    return LlavaProcessor(
        image_processor=image_processor(), tokenizer=tokenizer(), patch_size=PATCH, chat_template=template,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def write_hf(folder: Path, layers: int = 4) -> Path:
    """Write model and processor; returns the folder."""
    hf_model(layers).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def llava_model(folder: Path, layers: int = 4) -> Any:
    """The original host; its tower is read from `folder`."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    tower = folder / "clip"
    CLIPVisionModel(vision_config()).save_pretrained(tower)
    image_processor().save_pretrained(tower)
    config = LlavaConfig(
        **text_sizes(layers, len(tokenizer())), mm_vision_tower=str(tower), mm_hidden_size=16,
        mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        tune_mm_mlp_adapter=False, image_aspect_ratio="pad",
    )  # fmt: skip
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    return model.float().eval()


def write_pope(folder: Path, count: int = 2) -> None:
    """`lmms-lab-encoder/POPE` below a folder that becomes the current one: the stock task then needs no network."""
    from datasets import Dataset, Image
    from PIL import Image as Pictures

    rng = np.random.default_rng(0)
    numbers = [str(i) for i in range(count)]
    rows = {
        "id": numbers,
        "question_id": numbers,
        "question": ["Is there a dog in the image?"] * count,
        "answer": ["yes", "no"] * (count // 2),
        "image_source": numbers,
        "image": [Pictures.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)) for _ in numbers],
        "category": ["random"] * count,
    }
    target = folder / "lmms-lab-encoder" / "POPE" / "data"
    target.mkdir(parents=True)
    Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(target / "test-00000-of-00001.parquet")
