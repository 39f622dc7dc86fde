"""Which part of a model each parameter belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from llava_patch.hosts.anatomy import Anatomy
from llava_patch.patching.handle import get_handle
from llava_patch.routing.schedule import LayerMode
from llava_patch.routing.side_branch import SIDE_BRANCH

EMBEDDING, BLOCK, AFTER, PROJECTOR, STACK = (
    "tower embeddings", "tower block", "tower, after blocks", "projector", "DeepStack projector",
)  # fmt: skip
TOKENS, LAYER, SIDE, NORM, HEAD, OTHER = (
    "token embeddings", "decoder layer", "side branch layer", "final norm", "head", "other",
)  # fmt: skip
LORA = " LoRA"  # behind a part's name: what peft has put into it
_ROLES = {
    LayerMode.TEXT: "text only",
    LayerMode.FUSE: "fusion",
    LayerMode.RESET: "image reset",
    LayerMode.KEYS: "image keys",
    LayerMode.STOCK: "",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of a model, the smallest that the measurement tells apart.

    Attributes:
        kind: one of the names above.
        number: of a tower block (from 1), decoder or side-branch layer (from 0); None for the others.
        role: what a decoder layer does with the image: "below split", "text only", "fusion", "image reset" (PC),
            "image keys" (KV); "" in a model that is not routed.
    """

    kind: str
    number: int | None = None
    role: str = ""


def parts_of(anatomy: Anatomy) -> dict[str, Part]:
    """The part of every parameter, by name, in the model's order from the image to the head."""
    places: dict[int, Part] = {}

    def place(parameters: Iterable[nn.Parameter], part: Part) -> None:
        for parameter in parameters:
            places.setdefault(id(parameter), part)

    if anatomy.vision_model is not None:
        tower = anatomy.vision_parts()
        for module in tower.before:
            place(module.parameters(), Part(EMBEDDING))
        place(tower.own, Part(EMBEDDING))
        for number, block in enumerate(tower.blocks, 1):
            place(block.parameters(), Part(BLOCK, number))
        for module in tower.after:
            place(module.parameters(), Part(AFTER))
    place(anatomy.projector.parameters(), Part(PROJECTOR))
    stack = getattr(anatomy.projector_owner, anatomy.stack_name, None)
    if stack is not None:
        place(stack.parameters(), Part(STACK))
    place(anatomy.embed_tokens.parameters(), Part(TOKENS))
    roles = roles_of(anatomy)
    for number, layer in enumerate(anatomy.layers):
        place(layer.parameters(), Part(LAYER, number, roles[number]))
    for number, layer in enumerate(getattr(anatomy.decoder, SIDE_BRANCH, [])):
        place(layer.parameters(), Part(SIDE, number))
    place(anatomy.norm.parameters(), Part(NORM))
    place(anatomy.lm_head.parameters(), Part(HEAD))
    order = {part: place for place, part in enumerate(dict.fromkeys(places.values()))}
    found = {n: places.get(id(p), Part(OTHER)) for n, p in anatomy.model.named_parameters()}
    named = {
        name: Part(part.kind + LORA, part.number, part.role) if "lora_" in name else part
        for name, part in found.items()
    }
    names = sorted(named, key=lambda n: (order.get(found[n], len(order)), named[n].kind))  # stable within a part
    return {name: named[name] for name in names}


def roles_of(anatomy: Anatomy) -> list[str]:
    """What each decoder layer does with the image; see `Part.role`."""
    handle = get_handle(anatomy.model)
    layers = len(anatomy.layers)
    if handle is None or handle.program().split >= layers:
        return [""] * layers
    program = handle.program()
    return ["below split" if i < program.split else _ROLES[program.modes[i]] for i in range(layers)]
