"""What goes into a model's forward: prompts, labels, and LLaVA's own training as the reference."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from PIL import Image

from llava_patch.core.errors import InputError
from llava_patch.data.examples import Example
from llava_patch.data.inputs import IGNORED, Inputs
from llava_patch.data.loaded import load_subject
from llava_patch.hosts.anatomy import HF, find
from tests.support.release import write_fileset

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QUESTION = "What is the number in the image?"
ANSWERS = ["No", "134", "a cat, black and white", "first line\nsecond line", "$ 4.50"]
PICTURE = Image.new("RGB", (40, 30), "white")


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Any:
    return write_fileset(tmp_path_factory.mktemp("set"), vision=VISION, text=TEXT, vocab_size=512)


@pytest.fixture(scope="module", params=["hf", "llava"])
def subject(request: Any, files: Any) -> Any:
    if request.param == "llava":
        pytest.importorskip("llava")
    return load_subject(str(getattr(files, request.param)), device="cpu")


@pytest.mark.parametrize("answer", ANSWERS)
def test_labels_cover_the_answer_and_the_end_and_nothing_else(subject: Any, answer: str) -> None:
    inputs, end = subject.inputs(), subject.tokenizer.eos_token_id
    asked = inputs.forward_inputs(PICTURE, QUESTION)["input_ids"][0]
    made = inputs.training_inputs(PICTURE, QUESTION, answer)
    ids, labels = made["input_ids"][0], made["labels"][0]
    scored = labels != IGNORED
    first = int(scored.nonzero()[0])
    assert bool(scored[first:].all()) and torch.equal(labels[scored], ids[scored])
    assert int(ids[-1]) == end and int((ids == end).sum()) == 1
    # The tiny vocabulary has pieces of several words, whose spaces the slow tokenizer does not turn back.
    assert subject.tokenizer.decode(ids[first:-1]).replace("\u2581", " ").strip() == answer
    assert first >= len(asked) - 1  # a space behind the prompt may be a token that the answer takes in
    assert torch.equal(ids[: len(asked) - 1], asked[:-1])
    image = find(subject.model).image_token_id
    assert int((asked == image).sum()) == (4 if find(subject.model).host == HF else 1)


def test_the_loss_is_of_the_scored_positions(subject: Any) -> None:
    made = subject.inputs().training_inputs(PICTURE, QUESTION, "134")
    with torch.no_grad():
        out = subject.model(**made)
    scored = int((made["labels"] != IGNORED).sum())
    logits, wanted = out.logits[0, -scored - 1 : -1], made["labels"][0, -scored:]
    expected = torch.nn.functional.cross_entropy(logits.float(), wanted)
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("answer", ANSWERS)
def test_llavas_own_training_has_the_same_ids_labels_and_loss(files: Any, answer: str, monkeypatch: Any) -> None:
    pytest.importorskip("llava")
    from llava import conversation
    from llava.train.train import preprocess_multimodal, preprocess_v1

    subject = load_subject(str(files.llava), device="cpu")
    made = subject.inputs().training_inputs(PICTURE, QUESTION, answer)
    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates["vicuna_v1"])
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]

    class Arguments:
        is_multimodal, mm_use_im_start_end = True, False

    theirs = preprocess_v1(preprocess_multimodal([turns], Arguments), subject.tokenizer, has_image=True)
    assert torch.equal(theirs["input_ids"], made["input_ids"])
    assert torch.equal(theirs["labels"], made["labels"])
    with torch.no_grad():
        ours = subject.model(**made).loss
        reference = subject.model(**{**made, "labels": theirs["labels"]}).loss
    assert torch.equal(ours, reference) and bool(torch.isfinite(ours))


def test_a_processor_without_a_chat_template_gets_llavas_prompt(files: Any) -> None:
    subject = load_subject(str(files.hf), device="cpu")
    subject.processor.chat_template = None
    ids = subject.inputs().forward_inputs(PICTURE, QUESTION)["input_ids"][0]
    text = subject.tokenizer.decode(ids[ids != find(subject.model).image_token_id])
    assert "A chat between a curious user" in text and text.rstrip().endswith(f"{QUESTION} ASSISTANT:")


def test_pixels_have_the_models_precision_and_conversations_can_be_chosen(files: Any) -> None:
    pytest.importorskip("llava")
    subject = load_subject(str(files.llava), device="cpu", dtype="bfloat16")
    inputs = subject.inputs()
    assert inputs.forward_inputs(PICTURE, QUESTION)["images"].dtype == torch.bfloat16
    plain = Inputs(inputs.anatomy, inputs.tokenizer, inputs.image_processor, conversation="plain")
    assert plain.forward_inputs(PICTURE, QUESTION)["input_ids"].shape[1] < 30
    unknown = Inputs(inputs.anatomy, inputs.tokenizer, inputs.image_processor, conversation="nothing")
    with pytest.raises(KeyError, match="nothing"):
        unknown.forward_inputs(PICTURE, QUESTION)


@pytest.mark.parametrize("answers", [False, True])
def test_a_prompt_longer_than_the_model_has_positions_is_refused_with_numbers(subject: Any, answers: bool) -> None:
    inputs, picture = subject.inputs(), "page.png"
    long = Example(PICTURE, "word " * 3000, "no", picture)
    with pytest.raises(InputError, match=r"page.png: the prompt has [3-9],\d+ tokens, .* has 2,048 positions .*: sh"):
        inputs.of(long, answers)
    with pytest.raises(InputError, match="the prompt has"):  # the answer counts
        inputs.training_inputs(PICTURE, QUESTION, "word " * 3000)
    known = find(subject.model).model.config
    known = getattr(known, "text_config", None) or known
    short = inputs.forward_inputs(PICTURE, QUESTION)["input_ids"].shape[1]
    limit = known.max_position_embeddings
    try:
        known.max_position_embeddings = short
        inputs.forward_inputs(PICTURE, QUESTION)  # as many as there are
        known.max_position_embeddings = short - 1
        with pytest.raises(InputError, match=f"has {short} tokens, and the language model has {short - 1} positions"):
            inputs.forward_inputs(PICTURE, QUESTION)
    finally:
        known.max_position_embeddings = limit


def test_an_image_that_the_processor_refuses_is_named(subject: Any, tmp_path: Any, monkeypatch: Any) -> None:
    path = tmp_path / "dot.png"
    Image.new("RGB", (1, 1)).save(path)
    inputs = subject.inputs()

    def refuses(*args: Any, **options: Any) -> Any:
        raise ValueError("mean must have 1 elements if it is an iterable, got 3")

    # Which images are refused depends on the version of transformers: that one is, is not.
    place = inputs.processor if inputs.anatomy.host == HF else inputs.image_processor
    monkeypatch.setattr(type(place), "__call__", refuses)
    monkeypatch.setattr(type(place), "preprocess", refuses, raising=False)
    with pytest.raises(InputError, match=r"list:3: the model's processor refuses the image of 1 x 1 .*dot.png"):
        inputs.of(Example(path, QUESTION, "no", where="list:3"))


def test_images_of_a_pixel_give_inputs_or_the_error(subject: Any) -> None:
    for size in ((1, 1), (1, 60), (3, 2), (2, 1)):
        example = Example(Image.new("RGB", size), QUESTION, id="dot")
        with contextlib.suppress(InputError):
            assert subject.inputs().of(example)["input_ids"].shape[0] == 1
