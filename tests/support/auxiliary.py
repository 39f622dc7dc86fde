"""Batches with regions for the tiny hosts."""

import torch

from tests.support.models import IMAGE

SAMPLES = [(3, IMAGE, 5), (4,), (2, IMAGE, 4)]


def image_numbers(host):
    """Number, among the batch's images, of the first and the last sample's image; `llava` counts dummies."""
    return (0, 2) if host.name == "llava" else (0, 1)


def regions(host):
    """A region of two tokens in the first sample's image, and one of three in the last's."""
    target = torch.zeros(2, 16, dtype=torch.bool)
    target[0, 5:7] = True
    target[1, [0, 4, 15]] = True
    text = torch.tensor([[4, 5, 6], [7, 0, 0]])
    return {"image": torch.tensor(image_numbers(host)), "target": target, "text": text, "counts": torch.tensor([3, 1])}


def batch(host, **more):
    """A training batch's arguments."""
    return {**host.batch(SAMPLES, labels=True).inputs, **more}


def pixels(host):
    """What the batch's images are: [images, 3, 56, 56]."""
    given = host.batch(SAMPLES).inputs
    return given["images"] if host.name == "llava" else given["pixel_values"]
