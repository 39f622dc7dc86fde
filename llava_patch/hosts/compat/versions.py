"""Which versions of transformers are taken."""

from types import ModuleType

from llava_patch.core.errors import HostError

SUPPORTED_TRANSFORMERS = ("4.37", "5.25")
"""Lowest supported version (inclusive) and first unsupported one (exclusive)."""


def unsupported() -> str | None:
    """Why nothing can be patched on the installed versions; None where it can."""
    import transformers
    from packaging.version import Version

    low, high = SUPPORTED_TRANSFORMERS
    if Version(low) <= Version(transformers.__version__) < Version(high):
        return None
    return (
        f"transformers {transformers.__version__} is outside the supported range >={low},<{high}; install one that is "
        "in it, for example: pip install 'transformers==4.57.*'"
    )


def check_versions() -> None:
    """Refuse host versions that llava_patch was never run on, with the command that mends it (HostError)."""
    if (reason := unsupported()) is not None:
        raise HostError(reason)


def brings_towers(builder: ModuleType) -> bool:
    """Whether a `llava` package, by its module of `build_vision_tower`, has towers besides CLIP, as LLaVA-NeXT's."""
    package = builder.__name__.partition(".")[0]
    classes = [c for c in vars(builder).values() if isinstance(c, type) and c.__module__.partition(".")[0] == package]
    return any(not c.__name__.startswith("CLIPVisionTower") for c in classes)
