import pytest
import torch

from llava_patch.tools.evidence.small import digits, pages, reader


@pytest.fixture(scope="module")
def drawn():
    return digits.draw(64, 3, held_out=False)


@pytest.fixture(scope="module")
def model():
    return reader.new(0)


def test_no_string_is_on_both_sides_and_each_digit_is_as_frequent_in_each_place():
    train, held = digits.strings(False), digits.strings(True)
    assert len(train) == 900 and len(held) == 100
    assert not {*map(tuple, train.tolist())} & {*map(tuple, held.tolist())}
    for side in (train, held):
        for place in range(digits.LENGTH):
            assert len({*torch.bincount(side[:, place]).tolist()}) == 1


def test_the_same_seed_draws_the_same_images_and_another_seed_others(drawn):
    again, other = digits.draw(64, 3, held_out=False), digits.draw(64, 4, held_out=False)
    assert torch.equal(again.pixels, drawn.pixels) and not torch.equal(other.pixels, drawn.pixels)
    assert not digits.is_held_out(drawn.digits).any()
    assert digits.is_held_out(digits.draw(64, 3, held_out=True).digits).all()


def test_ink_is_inside_the_box_and_nowhere_else(drawn):
    for pixels, (left, top, right, bottom) in zip(drawn.pixels, drawn.boxes.tolist(), strict=True):
        paper = pixels.mode().values.mode().values
        rows, columns = (pixels != paper).nonzero(as_tuple=True)
        assert left <= columns.min() and columns.max() < right + 1 and top <= rows.min() and rows.max() < bottom + 1
        assert columns.max() - columns.min() >= 0.7 * (right - left)


def test_patch_labels_name_every_digit_from_left_to_right():
    many = digits.draw(400, 5, held_out=False)
    for string, labels in zip(many.digits, many.patch_labels(), strict=True):
        digit, place = labels[:, :2], labels[:, 2:]
        assert torch.equal(digit == digits.BLANK, place == 0)
        for number in range(1, digits.LENGTH + 1):
            assert (place == number).any() and (digit[place == number] == string[number - 1]).all()
        for row in place.reshape(digits.GRID, -1):
            assert (row[row > 0].diff() >= 0).all()


@pytest.mark.parametrize("question, length", [("read", 3), ("largest", 1), ("place", 1), ("font", 1)])
def test_a_batch_asks_and_only_the_answer_is_labelled(drawn, question, length):
    index = torch.tensor([5, 9])
    batch = drawn.batch(index, question)
    ids, labels = batch["input_ids"], batch["labels"]
    answer = drawn.answers(index, question)
    assert torch.equal(ids[:, -1 - length : -1], answer) and (ids[:, -1] == digits.EOS).all()
    assert ((labels != digits.IGNORED).sum(1) == length + 1).all()
    assert torch.equal(labels[:, -1 - length :], ids[:, -1 - length :])
    assert (ids == digits.IMAGE).sum() == 2 * digits.TOKENS and ids.max() < digits.VOCABULARY


def test_a_share_of_the_answers_is_wrong_and_the_generator_says_which(drawn):
    index = torch.arange(64)
    noisy = [drawn.batch(index, wrong=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    differ = (noisy[0]["labels"] != drawn.batch(index)["labels"]).any(1)
    assert 0.25 < differ.float().mean() < 0.75
    assert torch.equal(noisy[0]["labels"], noisy[1]["labels"])
    assert not torch.equal(noisy[0]["labels"], noisy[2]["labels"])


def test_a_right_answer_is_one_that_greedy_decoding_gives(drawn, model):
    score = digits.evaluate(model, drawn, "read", size=48)
    assert not model.training and len(score.right) == 64 and score.loss > 0
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[digits.EOS] = 1.0
        assert not digits.evaluate(model, drawn).right.any()
    reader.load(model, reader.weights(reader.new(0)))
    index = torch.arange(8)
    batch = drawn.batch(index)
    prompt = {"input_ids": batch["input_ids"][:, : -1 - digits.LENGTH], "pixel_values": batch["pixel_values"]}
    said = model.generate(**prompt, max_new_tokens=digits.LENGTH + 1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    right = (said[:, -1 - digits.LENGTH :] == batch["input_ids"][:, -1 - digits.LENGTH :]).all(1)
    assert torch.equal(right, digits.evaluate(model, drawn).right[:8])


def test_lessons_change_the_tower_first_and_the_same_seed_teaches_the_same(drawn):
    lessons = reader.Lessons().scaled(1 / 400)
    assert (lessons.dense.steps, lessons.answers.steps, lessons.together.steps) == (2, 1, 2)
    kept = []
    for _ in range(2):
        taught = reader.new(1)
        named, tower = reader.teach(taught, drawn, lessons, seed=0)
        assert 0 <= named <= 1 and not taught.training
        kept.append(reader.weights(taught))
        assert any(not torch.equal(tower[name], kept[-1][f"tower.{name}"]) for name in tower)
    fresh = reader.weights(reader.new(1))
    assert kept[0].keys() == fresh.keys()
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    assert not torch.equal(kept[0]["head.weight"], fresh["head.weight"])
    other = reader.new(2)
    reader.load(other, {**kept[0], **{f"dense.{name}": value for name, value in tower.items()}})
    assert all(torch.equal(value, kept[0][name]) for name, value in reader.weights(other).items())


def test_the_processors_give_what_the_batches_give(drawn):
    processed = pages.image_processor()(images=[drawn.picture(0)], return_tensors="pt")["pixel_values"]
    assert torch.allclose(processed, digits.normalised(drawn.pixels[:1]), atol=1e-6)
    tokenizer = pages.tokenizer()
    assert tokenizer("407", add_special_tokens=False)["input_ids"] == [digits.DIGIT + d for d in (4, 0, 7)]
    assert tokenizer("4x")["input_ids"] == [digits.DIGIT + 4, digits.UNKNOWN] and tokenizer.unk_token_id == 4


@pytest.mark.parametrize("kind", [*pages.KINDS])
def test_text_decides_the_pages_but_for_what_their_kind_says(kind):
    found = pages.pages(kind, 40, 0)
    assert len({sample.text for sample in found}) > 30 and len({sample.id for sample in found}) == 40
    assert all(len(sample.text) == digits.GRID * pages.KINDS[kind].per_token for sample in found)
    darkest = {min(sample.image.getdata())[0] for sample in found}
    assert (len(darkest) > 15) == (kind == "small_ink")
    box = found[0].boxes[0]
    assert (box[3] - box[1], box[2] - box[0]) == (digits.CELL, digits.SIDE)
    again = pages.pages(kind, 40, 0)
    assert all(a.text == b.text and a.image.tobytes() == b.image.tobytes() for a, b in zip(found, again, strict=True))


def test_a_string_as_a_sample_has_its_ink_as_its_region(drawn):
    sample = pages.strings(drawn)[7]
    assert sample.text == "".join(map(str, drawn.digits[7].tolist()))
    assert sample.boxes[0] == tuple(map(float, drawn.boxes[7].tolist()))
