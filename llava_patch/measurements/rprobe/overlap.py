"""Held-out documents that are trained on: what a probe knows by heart is no measurement."""

from __future__ import annotations

from collections.abc import Sequence

from llava_patch.core.errors import InputError
from llava_patch.measurements.rprobe.store.key import Contents
from llava_patch.probe.sample import Sample


def trained_on(train: Sequence[Sample], heldout: Sequence[Sample]) -> tuple[list[str], int]:
    """Held-out documents one of whose images is a training sample's too, by what is in the image and not by its name.

    Args:
        train: training samples; every image file is read once, which costs little beside its way through the tower.
        heldout: likewise.

    Returns:
        (names of these documents in order, number of all held-out documents).

    Raises:
        InputError: all held-out documents are trained on.
    """
    drawn = [data.identity() for data in (train, heldout) if hasattr(data, "identity")]
    if drawn:  # samples that draw themselves are told apart by what they are, and not drawn here
        if len(drawn) == 2 and drawn[0] == drawn[1]:
            raise InputError("R-Probe: the held-out samples are the training samples: give others, or none")
        return [], len(heldout)
    content_of = Contents()
    known = {content_of(train[i]) for i in range(len(train))}
    documents: dict[str, bool] = {}
    for i in range(len(heldout)):
        sample = heldout[i]
        name = sample.document or sample.id
        documents[name] = content_of(sample) in known or documents.get(name, False)
    shared = [name for name, found in documents.items() if found]
    if shared and len(shared) == len(documents):
        raise InputError(
            f"R-Probe: all {len(documents)} held-out documents are trained on, such as {shared[0]}: hold out "
            "documents whose images are not among the training samples"
        )
    return shared, len(documents)
