"""Which blocks each fusion taps on a tower, in which order, and which of them are detached."""

import pytest

from llava_patch.core.errors import SettingError
from llava_patch.fusion.base import Join, choose_taps
from llava_patch.settings.methods import DeepStack, DenseConnector, DirectFusion, SkipLinks


def _groups(settings, n=24, main=23):
    return [(g.blocks, g.detached) for g in choose_taps(settings, n, main).groups]


@pytest.mark.parametrize(
    ("stride", "main", "blocks", "detached"),
    [
        (6, 24, (6, 12, 18, 23), 2),  # the paper's setting: 6, 12 detached, 18, 23 not
        (6, 23, (6, 12, 18), 2),  # LLaVA-1.5
        (12, 23, (12,), 1),
        (4, 23, (4, 8, 12, 16, 20), 3),
        (3, 24, (3, 6, 9, 12, 15, 18, 21, 23), 4),
        (24, 22, (23,), 0),
    ],
)
def test_skip_links_by_stride(stride, main, blocks, detached):
    taps = choose_taps(SkipLinks(stride=stride), 24, main)
    assert taps.blocks == blocks
    assert [g.blocks[0] for g in taps.groups] == list(reversed(blocks))  # deepest first
    assert [g.blocks[0] for g in taps.groups if g.detached] == list(reversed(blocks[:detached]))
    assert taps.deepest == max(main, *blocks[detached:], 0)


def test_skip_links_by_list():
    taps = choose_taps(SkipLinks(layers=(9, 3), detach=1), 24, 23)
    assert [(g.blocks, g.detached) for g in taps.groups] == [((9,), False), ((3,), True)]
    assert (taps.columns, taps.deepest, taps.join) == (3, 23, Join.CHANNELS)


def test_a_detached_tap_above_the_main_block_trains_nothing_there():
    assert choose_taps(SkipLinks(layers=(24,), detach=1), 24, 23).deepest == 23
    assert choose_taps(SkipLinks(layers=(24,), detach=0), 24, 23).deepest == 24


def test_merging_alone_needs_no_tap():
    taps = choose_taps(SkipLinks(layers=(), merge_size=2), 24, 23)
    assert (taps.groups, taps.columns, taps.tokens((32, 32))) == ((), 1, 256)


def test_dense_connector_as_published():
    first, second = tuple(range(12)), tuple(range(12, 24))
    assert _groups(DenseConnector()) == [(first, True), (second, False)]
    siglip = _groups(DenseConnector(detach=()), n=27, main=26)
    assert siglip == [(tuple(range(13)), False), (tuple(range(13, 26)), False)]
    assert _groups(DenseConnector(kind="sci")) == [((7,), True), ((15,), False)]
    sti = choose_taps(DenseConnector(kind="sti"), 24, 23)
    assert (sti.join, sti.columns, sti.tokens((24, 24))) == (Join.TOKENS, 1, 576 + 2 * 72)
    assert not sti.keeps_tokens


def test_free_groups_and_their_places():
    free = DenseConnector(groups=((12, 11), 3, (1, 2)), detach=(1,))
    assert _groups(free) == [((11, 12), False), ((3,), True), ((1, 2), False)]
    assert [d for _, d in _groups(DenseConnector(groups=((12, 11), 3, (1, 2)), detach=2))] == [False, True, True]


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("18", [(18,)]),
        ("3-18", [(3,), (18,)]),
        ("3-18-23", [(3,), (18,)]),  # 23 is the main feature
        ("former", [tuple(range(1, 13))]),
        ("latter", [tuple(range(13, 25))]),
        ("all", [tuple(range(1, 13)), tuple(range(13, 25))]),
        ((20, 5), [(20,), (5,)]),  # in the order given
    ],
)
def test_direct_fusion_sets(layers, groups):
    assert [g for g, _ in _groups(DirectFusion(layers=layers))] == groups
    last = DirectFusion(layers=layers, detach=(len(groups) - 1,))  # the paper detaches the set's last layer
    assert [d for _, d in _groups(last)] == [False] * (len(groups) - 1) + [True]


@pytest.mark.parametrize(
    ("layers", "main", "groups"),
    [  # of 27 blocks; the code of Lin et al. has the first two, with main 25
        ("3-20-25", 25, [(3,), (20,)]),
        ("latter", 25, [(15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26)]),
        ("3-20-25", 26, [(3,), (20,), (25,)]),  # LLaVA's -2: 25 is a tap then
        ("latter", 26, [(15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26)]),
        ("former", 25, [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)]),
        ("all", 25, [tuple(range(1, 14)), tuple(range(15, 27))]),
        ("3-18-23", 25, [(3,), (18,), (23,)]),
        ("18", 25, [(18,)]),
    ],
)
def test_direct_fusion_sets_on_siglip(layers, main, groups):
    assert [g for g, _ in _groups(DirectFusion(layers=layers), 27, main)] == groups


def test_the_means_of_a_tower_of_any_other_depth_are_its_halves():
    assert [g for g, _ in _groups(DirectFusion(layers="all"), 26, 25)] == [tuple(range(1, 14)), tuple(range(14, 27))]
    assert [g for g, _ in _groups(DirectFusion(layers="all"), 8, 7)] == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_deep_stack_taps_and_layers():
    settings = DeepStack()
    taps = choose_taps(settings, 24, 23)
    assert [g.blocks[0] for g in taps.groups] == [6, 12, 18, 23]
    assert taps.layers == (4, 6, 8, 10)
    assert (taps.columns, taps.join, taps.deepest) == (1, Join.LAYERS, 23)
    assert choose_taps(DeepStack(), 8, 7).blocks == (2, 4, 6, 7)
    assert choose_taps(SkipLinks(), 24, 23).layers == ()
    assert [g.detached for g in choose_taps(DeepStack(detach=2), 24, 23).groups] == [True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SkipLinks(layers=(3, 25)), r"SkipLinks.layers: block 25 is outside this tower's 1..24"),
        (SkipLinks(stride=30), "no tap left"),
        (SkipLinks(layers=(23,)), "no tap left"),
        (SkipLinks(stride=6, detach=4), r"only 3 taps \(blocks 6, 12, 18\)"),
        (SkipLinks(layers=(), merge_size=2, detach=1), "only 0 taps"),
        (DenseConnector(groups=((3, 25),)), "DenseConnector.groups: block 25 is outside"),
        (DenseConnector(detach=(2,)), r"DenseConnector.detach = \(2,\): place 2 is outside 0..1"),
        (DirectFusion(layers=(25,)), "DirectFusion.layers: block 25 is outside"),
        (DirectFusion(layers="3-20-25"), "DirectFusion.layers: block 25 is outside this tower's 1..24"),
        (DirectFusion(layers=(23,)), "no tap left beside the main block 23"),
        (DirectFusion(detach=3), "DirectFusion.detach = 3: there are only 2 taps"),
        (DeepStack(taps=(6, 30)), "DeepStack.taps: block 30 is outside"),
        (DeepStack(detach=(4,)), "place 4 is outside 0..3"),
    ],
)
def test_impossible_taps(settings, message):
    with pytest.raises(SettingError, match=message):
        choose_taps(settings, 24, 23)


def test_blocks_of_a_small_tower_must_be_named():
    with pytest.raises(SettingError, match="taps blocks 7 and 15, but this tower has 8: name others"):
        choose_taps(DenseConnector(kind="sci"), 8, 7)
    with pytest.raises(SettingError, match=r"DirectFusion\.layers: block 18 is outside this tower's 1..8"):
        choose_taps(DirectFusion(), 8, 7)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        *((SkipLinks, a) for a in (
            {"stride": 0}, {"detach": -1}, {"layers": ()}, {"layers": (0,)}, {"layers": (3, 3)}, {"merge_size": 3},
            {"train_tower": "some"}, {"train_tower": 0}, {"stride": True}, {"layers": 6}, {"merge_padding": 1},
            {"tower_lr": 1e-5}, {"layer_decay": 0.9}, {"unfreeze_after": 1.5},
        )),
        (SkipLinks, {"tower_lr": 0, "train_tower": "all"}),
        (SkipLinks, {"layer_decay": 1.5, "train_tower": "all"}),
        *((DenseConnector, a) for a in (
            {"kind": "dic"}, {"groups": ()}, {"groups": 3}, {"groups": ((),)}, {"groups": ((2, 2),)},
            {"detach": (0, 0)},
        )),
        *((DirectFusion, a) for a in ({"layers": "4-18"}, {"layers": ()}, {"layers": (0,)}, {"detach": "all"})),
        *((DeepStack, a) for a in ({"start": -1}, {"interval": 0}, {"taps": ()}, {"taps": (4, 4)}, {"detach": -1})),
        *((DeepStack, a) for a in ({"projector": "main"}, {"projector": None}, {"projector": ("shared",)})),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_no_tower_can_take(cls, arguments):
    with pytest.raises(SettingError, match=f"{cls.__name__}.{next(iter(arguments))}"):
        cls(**arguments)


def test_settings_name_what_matters():
    assert repr(SkipLinks(stride=4)) == "SkipLinks(stride=4, detach=None, layers=None)"
    assert repr(DeepStack(merge_size=2)).endswith("merge_size=2)")
