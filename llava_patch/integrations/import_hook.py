"""One lazy import hook, installed at interpreter start or by `import llava_patch`.

It watches for a few host modules and calls `startup.on_import` once such a module has been executed; until then nothing
of llava_patch, torch or transformers is loaded. Written by hand because it runs at every interpreter start: importing a
post-import-hook library alone costs more than ten times the 5 ms that this may take.
"""

import sys

WATCHED = frozenset(
    {
        "transformers.modeling_utils",
        "transformers.models.llama.tokenization_llama",
        "transformers.trainer",
        "llava",
        "llava.model.llava_arch",
        "llava.model.multimodal_encoder.clip_encoder",
        "llava.model.multimodal_encoder.siglip_encoder",
        "llava.model.language_model.llava_llama",
        "llava.model.language_model.llava_mistral",
        "llava.model.language_model.llava_qwen",
        "llava.train.llava_trainer",
        "lmms_eval",
        "lmms_eval.__main__",
        "lmms_eval.tasks",
        "peft.peft_model",
        "peft.tuners.lora.bnb",
    }
)


class _PostImportFinder:
    """Finds a watched module with the other finders and runs our code after the module's own."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name not in WATCHED or name in self.busy:
            return None
        self.busy.add(name)
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(name, path, target)  # type: ignore[arg-type]
                if spec is not None:
                    return _after_execution(spec, name)
            return None
        finally:
            self.busy.discard(name)


def _after_execution(spec, name):  # type: ignore[no-untyped-def]
    loader = spec.loader
    if loader is None or not hasattr(loader, "exec_module"):
        return spec
    execute = loader.exec_module

    def exec_module(module):  # type: ignore[no-untyped-def]
        del loader.exec_module  # the module's loader looks as it did before
        execute(module)
        _notify(name, module)

    loader.exec_module = exec_module
    return spec


def _notify(name: str, module: object) -> None:
    from llava_patch.integrations import startup

    startup.on_import(name, module)


class _MovedFinder:
    """Finds modules by the paths that they had in earlier versions; asked last, so it costs nothing until then."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        if not name.startswith("llava_patch."):
            return None
        from llava_patch.integrations import moved

        return moved.find_spec(name)


def disabled() -> bool:
    """Whether LLAVA_PATCH_DISABLE=1 switches everything off."""
    import os

    return os.environ.get("LLAVA_PATCH_DISABLE") == "1"


def installed() -> bool:
    """Whether the import hook is in place."""
    return any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path)


def install() -> None:
    """Install the hook once; modules that are already loaded are handled at once."""
    if _MovedFinder not in sys.meta_path:
        sys.meta_path.append(_MovedFinder)  # type: ignore[arg-type]
    if disabled() or installed():
        return
    sys.meta_path.insert(0, _PostImportFinder())  # type: ignore[arg-type]
    for name in sorted(WATCHED & set(sys.modules)):
        spec = getattr(sys.modules[name], "__spec__", None)
        if not getattr(spec, "_initializing", False):
            _notify(name, sys.modules[name])
