"""What LLaVA's data set makes of a conversation with Vicuna's tokenizer, whichever version of transformers reads it."""

import json

import pytest
from transformers import AutoTokenizer

from tests.support.release import _train_pieces, _write_tokenizer


@pytest.fixture(scope="module")
def pieces():
    return _train_pieces(512)


def _tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", use_fast=False)  # as train.py does
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def _tokens(tokenizer, answers):
    import llava.train.train as script
    from llava.conversation import conv_templates

    script.conversation_lib.default_conversation = conv_templates["v1"]
    turns = [{"from": "human", "value": "<image>\nWhat is the number in the image?"}, {"from": "gpt", "value": "417"}]
    made = script.preprocess([turns * answers], tokenizer, has_image=True)
    return made["input_ids"][0].tolist(), made["labels"][0].tolist()


@pytest.mark.parametrize("named", [True, False, None])
def test_labels_of_two_answers(pieces, tmp_path, named):
    """`named` is the checkpoint's `legacy`: Vicuna 1.5 names it, older ones do not, which means True."""
    import llava.train.train  # noqa: F401  # the package whose tokenizer it is

    _write_tokenizer(tmp_path, pieces)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"legacy": named}
    if named is None:
        del settings["legacy"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = _tokenizer(tmp_path)
    assert tokenizer.legacy is (named is not False)
    after = tokenizer.convert_ids_to_tokens(tokenizer("</s>USER").input_ids)[2]
    assert after.startswith("▁") is tokenizer.legacy
    for answers in (1, 2) if tokenizer.legacy else (1,):  # these pieces span words: LLaVA's count of False is off
        ids, labels = _tokens(tokenizer, answers)
        kept = [token for token in labels if token != -100]
        assert tokenizer.decode(kept, skip_special_tokens=True).split() == ["417"] * answers
        assert len(ids) == len(labels)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = _tokenizer(tmp_path / "saved")
    assert again.legacy is tokenizer.legacy and _tokens(again, 2) == _tokens(tokenizer, 2)
