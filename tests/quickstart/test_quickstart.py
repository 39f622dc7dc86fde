"""The quickstart's data, prompts, steps and table; its whole run is `scripts/quickstart.sh`."""

import json

import numpy as np
import pytest
import torch
from quickstart import questions, table
from quickstart.fileset import write_fileset
from quickstart.prompts import PromptEncoder
from quickstart.run import Steps
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


def test_a_step_runs_once_until_something_before_it_runs_again(tmp_path):
    done = []

    def run(inputs, steps=("a", "b")):
        runner = Steps(tmp_path, inputs)
        for name in steps:
            runner.run(name, name, lambda name=name: (done.append(name), (tmp_path / name).touch()), tmp_path / name)

    run(1)
    run(1)
    assert done == ["a", "b"]
    (tmp_path / "b").unlink()
    run(1)
    assert done == ["a", "b", "b"]
    run(2)
    assert done == ["a", "b", "b", "a", "b"]


def test_a_failing_command_shows_its_end(tmp_path):
    with pytest.raises(SystemExit, match=r"bad failed \(exit 3\)(.|\n)*the reason"):
        Steps(tmp_path, 0).command("bad", ["bash", "-c", "echo the reason; exit 3"])


def test_metrics_are_read_whatever_their_filter(tmp_path):
    results = {"results": {"pope": {"pope_accuracy,none": 0.5, "alias": "pope"}}}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "2026_results.json").write_text(json.dumps(results))
    read = table.lmms_results(tmp_path)
    assert table.metric(read, "pope", "pope_accuracy") == 0.5
    with pytest.raises(KeyError, match="has no metric other"):
        table.metric(read, "pope", "other")
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        table.lmms_results(tmp_path / "m" / "none")


def test_a_file_set_is_the_same_for_the_same_seed(tmp_path):
    a, b = (write_fileset(tmp_path / n, vision=VISION, text=TEXT, vocab_size=512, seed=3) for n in "ab")
    first, second = (torch.load(f.language_model / "pytorch_model.bin", weights_only=True) for f in (a, b))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
