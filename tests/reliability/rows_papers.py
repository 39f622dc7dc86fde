"""Rows for the settings by which a run follows a paper: DeepStack's projector, direct fusion's sets, a run's stop."""

from __future__ import annotations

from tests.reliability.place import Row, open_stock

KIND = "papers' settings"


def _bound(binding, *more):
    """A command that reads these bindings."""

    def make(place):
        words = [word for one in (binding, *more) for word in ("--gin-param", one)]
        return place.command("gradients", place.stock(), *words)

    return make


def _in_a_file(text):
    """The same of a gin file."""

    def make(place):
        return place.command("gradients", place.stock(), "--gin-file", place.file("mine.gin", text))

    return make


def _patched(name, **values):
    """A call of `patch` on the stock model, whose tower has three blocks."""

    def make(place):
        model = open_stock()

        def call():
            import llava_patch

            llava_patch.patch(model, fusion=getattr(llava_patch, name)(**values)).remove()

        return call

    return make


def _merged(place):
    from llava_patch import DeepStack, patch

    with patch(open_stock(), fusion=DeepStack(taps=(1, 2), start=0, interval=1, projector="shared")) as handle:
        saved = handle.save(place.root / "shared", form="full")
    return place.command("merge", saved, "--output", place.root / "plain")


def _recorded(place):
    folder = place.adapter()
    fusion = {"method": "DeepStack", "taps": [1, 2], "start": 0, "interval": 1, "detach": [], "projector": "main"}
    place.edit(
        folder / "llava_patch.json", fusion=fusion, version=None, checksum=None, weights_checksum=None
    )  # as before there were checksums
    (folder / "config.json").unlink()
    return place.command("inspect", folder)


ROWS = [
    Row(KIND, "a projector that is not known", _bound('DeepStack.projector = "main"'),
        ("DeepStack.projector = 'main'", '"own"', '"shared"')),
    Row(KIND, "a projector of None in a gin file", _in_a_file("DeepStack.projector = None\n"),
        ("DeepStack.projector = None", '"shared"')),
    Row(KIND, "a projector that is a number, in Python", _patched("DeepStack", projector=1),
        ("DeepStack.projector = 1", '"own"')),
    Row(KIND, "a projector that is not known in a record", _recorded, ("DeepStack.projector = 'main'", '"shared"')),
    Row(KIND, "merging what goes through a shared projector", _merged, ("DeepStack.projector", "keep it patched")),
    Row(KIND, "a set that is not published", _bound('DirectFusion.layers = "3-20"'),
        ("DirectFusion.layers = '3-20'", "3-20-25", "a tuple of blocks")),
    Row(KIND, "SigLIP's set on a small tower", _patched("DirectFusion", layers="3-20-25"),
        ("DirectFusion.layers", "block 20", "1..3")),
    Row(KIND, "a stop of 0", _bound("Gradients.stop = 0"), ("Gradients.stop = 0", "an integer >= 1")),
    Row(KIND, "a stop that is a word", _bound('Gradients.stop = "end"'), ("Gradients.stop", "an integer")),
    Row(KIND, "a stop of half a step", _in_a_file("Gradients.stop = 1.5\n"), ("Gradients.stop = 1.5", "an integer")),
    Row(KIND, "a stop before the last measured step", _bound("Gradients.stop = 5", "Gradients.steps = 10"),
        ("Gradients.stop = 5", "Gradients.steps = 10", "stop later")),
    Row(KIND, "a stop before the first measured step", _bound("Gradients.stop = 5", "Gradients.start = 6"),
        ("Gradients.stop = 5", "Gradients.start = 6", "stop later")),
    Row(KIND, "a stop that is misspelt", _bound("Gradients.stops = 5"), ("Gradients", "stops")),
]  # fmt: skip
