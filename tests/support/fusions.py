"""Every fusion at the tiny towers' depth (8 blocks, main feature 7), and small tools around the hosts."""

import torch

from llava_patch import DeepStack, DenseConnector, DirectFusion, SkipLinks
from llava_patch.hosts import anatomy

ZERO_START = {
    "skip": SkipLinks(stride=2),
    "skip-all-detached": SkipLinks(layers=(1, 5, 8), detach=3),
    "dci": DenseConnector(),
    "sci": DenseConnector(kind="sci", groups=(2, 5), detach=1),
    "free": DenseConnector(groups=((0, 1, 2), 4, (6, 7, 8)), detach=(1,)),
    "direct": DirectFusion(layers=(3, 6), detach=(1,)),
    "direct-all": DirectFusion(layers="all", detach=(0,)),
    "stack": DeepStack(start=1, interval=1, detach=(0,)),
    "stack-one": DeepStack(taps=(8,), start=0),
}
OTHER_TOKENS = {
    "sti": DenseConnector(kind="sti", groups=(2, 5)),
    "merge-alone": SkipLinks(layers=(), merge_size=2),
    "merge-skip": SkipLinks(stride=2, merge_size=2),
    "merge-dci": DenseConnector(merge_size=2),
    "merge-direct": DirectFusion(layers=(3, 6), merge_size=2),
    "merge-stack": DeepStack(start=1, interval=1, merge_size=2),
}
SHARED = {"shared-stack": DeepStack(start=1, interval=1, detach=(0,), projector="shared")}  # other from the start
ALL = {**ZERO_START, **SHARED, **OTHER_TOKENS}
TOKENS = {"sti": 16 + 2 * 2, **dict.fromkeys((n for n in OTHER_TOKENS if n.startswith("merge")), 4)}


def randomise(handle, seed=1):
    """Give what the fusion adds weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    own = getattr(handle.anatomy.projector_owner, handle.anatomy.stack_name, None)
    added = own if own is not None else handle.anatomy.first_linear()[2]
    with torch.no_grad():
        for parameter in added.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def pixels(host, batch):
    return batch.inputs["images" if host.name == "llava" else "pixel_values"]


def hidden_states(host, images):
    """The tower run by hand: h[0] to h[N], each [images, 1 + patches, channels]."""
    vision = anatomy.find(host.model).vision_model
    return vision(images, output_hidden_states=True).hidden_states
