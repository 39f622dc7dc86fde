"""The quickstart's data and prompts; its whole run is `scripts/quickstart.sh`."""

import numpy as np
import torch
from quickstart import questions
from quickstart.fileset import write_fileset
from quickstart.prompts import PromptEncoder
from quickstart.score import other_images

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}


def test_held_out_strings_never_train():
    strings = {}
    for held_out in (False, True):
        sampler = questions.Sampler(np.random.default_rng(0), held_out=held_out)
        strings[held_out] = {sampler.draw("read").answer for _ in range(400)}
    assert strings[False] and strings[True]
    assert not strings[False] & strings[True]


def test_prompts_are_what_llavas_own_preprocessing_makes(tmp_path):
    from llava import conversation
    from llava.mm_utils import tokenizer_image_token
    from llava.train.train import preprocess_plain, preprocess_v1
    from transformers import AutoTokenizer

    files = write_fileset(tmp_path, vision=VISION, text=TEXT, vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(files.language_model, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    encoder = PromptEncoder(str(files.language_model / "tokenizer.model"))
    conversation.default_conversation = conversation.conv_templates["v1"]
    turns = [
        {"from": "human", "value": "<image>\nWhat is the number in the image?"},
        {"from": "gpt", "value": "417"},
    ]
    made = preprocess_v1([turns], tokenizer, has_image=True)
    prompt, answer = encoder.prompt_ids("What is the number in the image?"), encoder.answer_ids("417")
    assert made["input_ids"][0].tolist() == [*prompt, *answer]
    assert (made["labels"][0] != -100).nonzero().flatten().tolist() == list(range(len(prompt), len(prompt + answer)))

    conversation.default_conversation = conversation.conv_templates["plain"]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "the number 417"}]
    made = preprocess_plain([turns], tokenizer)
    prompt, answer = encoder.caption_ids("the number 417")
    assert made["input_ids"][0].tolist() == [*prompt, *answer]
    assert tokenizer_image_token("<image>", tokenizer) == list(prompt)


def test_the_control_gives_every_row_an_image_of_another_answer():
    rows = [{"image": str(i), "answer": a} for i, a in enumerate("aabba")]
    answers = {row["image"]: row["answer"] for row in rows}
    assert all(answers[image] != row["answer"] for image, row in zip(other_images(rows), rows, strict=True))


def test_a_file_set_is_the_same_for_the_same_seed(tmp_path):
    a, b = (write_fileset(tmp_path / n, vision=VISION, text=TEXT, vocab_size=512, seed=3) for n in "ab")
    first, second = (torch.load(f.language_model / "pytorch_model.bin", weights_only=True) for f in (a, b))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
