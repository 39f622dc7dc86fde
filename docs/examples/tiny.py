"""A tiny LLaVA-1.5 with random weights, in a folder: what the examples beside it run on when they are given none."""

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

SIDE, PATCH = 56, 14  # 16 image tokens


def tiny_llava(folder: str = "", reads_at: int | None = None, channels: int = 64) -> str:
    """Write model, tokenizer and processor in Hugging Face's format; returns the folder ("": a temporary one).

    With `reads_at` the attention of that one of its 8 decoder layers alone does something, and more. The first `channels` of 64
    leave the projector; the others are zero.
    """
    signs = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = {sign: number for number, sign in enumerate(signs)}
    raw = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=inputs, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=2, image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.1,
            bos_token_id=1, eos_token_id=2, pad_token_id=3,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for number, layer in enumerate(model.model.language_model.layers):
            if reads_at is not None:
                layer.self_attn.o_proj.weight.mul_(16 * (number == reads_at))
        out = model.model.multi_modal_projector.linear_2
        out.weight.normal_(std=64**-0.5)
        out.weight[channels:], out.bias[channels:] = 0, 0

    folder = folder or tempfile.mkdtemp(prefix="tiny_llava_")
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return str(Path(folder))
