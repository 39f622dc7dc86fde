"""The arms of the table: a fusion with explicit blocks of the small tower, with and without detached taps.

The small tower has 8 blocks and block 7 is LLaVA's main feature; its language model has 8 layers. Blocks stand for
those of the 24-block tower at a third of their number. What is detached follows the Skip-Links paper: the lower half
for Skip-Links (section 6.2), Dense Connector's first group and the last layer of direct fusion's set (section 6.4).
The paper does not detach DeepStack: its lower half here is this project's choice.
"""

from dataclasses import dataclass

NO_TAPS = (("layers", ()),)


@dataclass(frozen=True)
class Arm:
    """One model that is trained.

    Attributes:
        name: of its folder, and for `--arms`.
        title: in the table.
        fusion: gin's name of the fusion; None: plain LLaVA.
        settings: its bindings, as {field: value}.
        detached: in words, which taps are under stop-gradient.
        train_tower: what trains in the tower in stage 2.
    """

    name: str
    title: str
    fusion: str | None = None
    settings: tuple[tuple[str, object], ...] = ()
    detached: str = "-"
    train_tower: str = "all"

    def parameters(self, stage: int) -> list[str]:
        """The gin bindings of a stage; the tower trains in stage 2 alone, so without taps stage 1 is plain LLaVA's."""
        if self.fusion is None or (stage == 1 and self.settings == NO_TAPS):
            return []
        values = [*self.settings, ("train_tower", self.train_tower if stage == 2 else "frozen")]
        return [f"{self.fusion}.{field} = {value!r}" for field, value in values]

    def settings_text(self) -> str:
        """The bindings for the table."""
        return ", ".join(f"{field} = {value!r}" for field, value in self.settings) or "-"


def _pair(name: str, title: str, fusion: str, detach: object, words: str, nothing: object, **settings: object):
    fields = tuple(settings.items())
    return (
        Arm(name, title, fusion, (*fields, ("detach", nothing)), "none"),
        Arm(f"{name}_detached", title, fusion, (*fields, ("detach", detach)), words),
    )


PLAIN = Arm("plain", "plain LLaVA (its tower never trains)", train_tower="frozen")
# What fusions are to be compared with: stock LLaVA never trains its tower.
TOWER = Arm("tower", "plain LLaVA, its tower trained", "SkipLinks", NO_TAPS, "no taps")
ARMS = (
    PLAIN,
    TOWER,
    *_pair("skiplinks", "SkipLinks", "SkipLinks", 2, "blocks 2, 4", 0, layers=(2, 4, 6)),
    *_pair("dense", "DenseConnector", "DenseConnector", (0,), "blocks 0-3", (), kind="dci",
           groups=((0, 1, 2, 3), (4, 5, 6, 7))),
    *_pair("direct", "DirectFusion", "DirectFusion", (1,), "block 6", (), layers=(1, 6)),
    *_pair("deepstack", "DeepStack", "DeepStack", (0, 1), "blocks 2, 4", (), taps=(2, 4, 6, 7), start=1, interval=1),
)  # fmt: skip
# Not one of the table's ten: it tells what a fusion gives from what training the tower gives.
FROZEN = Arm(
    "skiplinks_frozen", "SkipLinks, tower frozen", "SkipLinks", (("layers", (2, 4, 6)),), "all (frozen)", "frozen"
)
BY_NAME = {arm.name: arm for arm in (*ARMS, FROZEN)}


def choose(names: str | None) -> list[Arm]:
    """The arms named, comma-separated; None or "" for the ten.

    Raises:
        ValueError: an unknown name.
    """
    if not names:
        return list(ARMS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(wanted) - set(BY_NAME))
    if unknown:
        raise ValueError(f"--arms: no arm {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    if not wanted:
        raise ValueError(f"--arms {names!r} names no arm; there are {', '.join(BY_NAME)}")
    return [arm for arm in BY_NAME.values() if arm.name in wanted]
