"""Where what a patch adds is kept when its checkpoint is opened with a `device_map` that was written for the base."""

from typing import Any

from llava_patch.patching.handle import Handle
from llava_patch.routing.side_branch import SIDE_BRANCH


def complete(device_map: dict[str, Any], handle: Handle) -> None:
    """Give what a patch adds the place of what it is a copy of, unless the map names it (in place).

    A map that does not say where the original is stays as it is: the host's own loader reports that.
    """
    found = handle.anatomy
    names = {id(module): name for name, module in found.model.named_modules()}
    copies = [(getattr(found.projector_owner, found.stack_name, None), found.projector)]
    copies += zip(getattr(found.decoder, SIDE_BRANCH, ()), found.layers[handle.program().split :], strict=False)
    for added, original in copies:
        if added is None or _places(device_map, names[id(added)]):
            continue
        if places := _places(device_map, names[id(original)]):
            device_map[names[id(added)]] = places[0]


def _places(device_map: dict[str, Any], name: str) -> list[Any]:
    """What a map says of a module: by the innermost module that holds it, else of the parts in it."""
    around = [key for key in device_map if key == "" or f"{name}.".startswith(f"{key}.")]
    inside = [key for key in device_map if key.startswith(f"{name}.")]
    return [device_map[key] for key in sorted(around, key=len)[-1:] or inside]
