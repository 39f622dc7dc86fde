import numpy as np
import torch

from llava_patch.tools.evidence.small import chain
from llava_patch.tools.evidence.small.chain import CELL, CELLS, IMAGE, LETTER, STEPS, Chain
from llava_patch.tools.evidence.small.model import build
from llava_patch.tools.evidence.small.training import IGNORED


def test_the_answer_follows_the_pairs_of_the_picture():
    batch = Chain(0, steps=(1, 3)).batch(5, questions=4)
    for row in range(5):
        follows = {int(left): int(right) for left, right in batch.cells[row] if left != chain.BLANK}
        assert len(follows) == chain.PAIRS
        for asked in range(4):
            letter = int(batch.prompts[row, asked, 2]) - LETTER
            for _ in range(int(batch.prompts[row, asked, 1]) - STEPS):
                letter = follows[letter]
            assert batch.answers[row, asked] == LETTER + letter


def test_ink_is_where_a_patch_shows_letters():
    batch = Chain(1).batch(3)
    patches = batch.pixels[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(1, 2)
    shown = batch.cells[..., 0] != chain.BLANK
    assert torch.equal(patches.flatten(2).std(-1) > 1e-3, shown)


def test_held_out_renderings_are_in_no_training_picture():
    (train, counts), (held, held_counts) = chain.renderings(False), chain.renderings(True)
    seen = {train[0, i].tobytes() for i in range(counts[0])}
    new = [held[0, i].tobytes() not in seen for i in range(held_counts[0])]
    assert np.mean(new) > 0.8  # two sizes of a font may round to the same picture


def test_the_same_seed_draws_the_same_and_training_draws_others_than_held_out():
    one, again, held = Chain(2).batch(2), Chain(2).batch(2), Chain(2, held_out=True).batch(2)
    assert torch.equal(one.pixels, again.pixels) and torch.equal(one.prompts, again.prompts)
    assert not torch.equal(one.cells, held.cells)


def test_inputs_have_the_image_behind_the_words_and_the_answer_as_the_only_label():
    batch = Chain(0, words=6).batch(2)
    given = batch.inputs(labels=True)
    assert torch.equal((given["input_ids"] == IMAGE).nonzero()[:, 1].reshape(2, -1)[0], torch.arange(7, 7 + CELLS))
    assert torch.equal(given["labels"][:, -1], batch.answers[:, 0])
    assert (given["labels"][:, :-1] == IGNORED).all()
    assert "labels" not in batch.inputs()


def test_a_layers_lens_has_taken_no_more_steps_than_it_may():
    batch = Chain(0, steps=(1, 2)).batch(4, questions=3)
    lens = batch.questions({1: 1}).lens[1]
    assert torch.equal(lens[..., -1], batch.chain[..., 1])
    assert (lens[..., :-1] == IGNORED).all()


def test_held_out_batches_have_the_rows_and_steps_that_were_asked_for():
    batches = chain.held_out(0, 10, steps=2, at_once=4)
    assert [len(batch.cells) for batch in batches] == [4, 4, 2]
    assert all((batch.steps == 2).all() for batch in batches)


def test_right_answers_are_counted_at_the_last_position_of_the_prompt():
    model = build(chain.VISION, chain.text(layers=1), IMAGE, 0)
    batches = chain.held_out(0, 6, steps=1)
    with torch.no_grad():
        said = model(**batches[0].inputs()).logits[:, -1].argmax(-1)
    assert torch.equal(chain.right(model, batches), said == batches[0].answers[:, 0])
