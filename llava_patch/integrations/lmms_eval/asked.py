"""What an lmms-eval command asks for, read from its arguments: evaluations, and whether llava_patch takes part in them.

Nothing heavy is imported here: this module is loaded before lmms-eval's own.
"""

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OUTPUT_TYPE = "llava_patch_"  # how the output types of our tasks begin
_LISTS = ("list", "list_groups", "list_tags", "list_subtasks")
_NO_EVALUATION = {"-h", "--help", "--tui", "--power-analysis"}
_OPTIONS = ("config", "model", "tasks", "model_args", "include_path", "output_path")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def evaluations(words: Sequence[str], given: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The evaluations that lmms-eval's arguments ask for, one a configuration in `--config`; none for its other jobs.

    Of each there is what matters here, where it is given: `tasks`, `model_args`, `include_path`, `output_path`, `env`.
    Arguments that are `given` parsed count before the words.
    """
    words = list(words[1:] if words and words[0] == "eval" else words)
    if (not given and not words) or (words and not words[0].startswith("-")) or _NO_EVALUATION & set(words):
        return []
    parser = _Parser(add_help=False, exit_on_error=False)
    for name in _OPTIONS:  # --model: else it would be taken for an abbreviation
        parser.add_argument(f"--{name}")
    try:
        typed = vars(parser.parse_known_args(words)[0])
    except (argparse.ArgumentError, ValueError):
        return []  # nothing that lmms-eval could parse: it says so and exits with 2
    options = {k: v for k, v in {**typed, **(given or {})}.items() if k in _OPTIONS and v is not None}
    path = options.pop("config", None)
    configured = [one for one in _listed(path and _read_yaml(Path(path))) if isinstance(one, dict)] or [{}]
    return [one for one in ({**own, **options} for own in configured) if one.get("tasks") not in _LISTS]


def involves_us(words: Sequence[str], asked: Sequence[dict[str, Any]]) -> bool:
    """Whether a patch is configured, or an evaluation asks for a task of ours or a checkpoint that carries a patch."""
    from llava_patch.settings import active

    if not asked:
        return False
    flags = {word.partition("=")[0] for word in words} & set(active.FLAGS)  # they may be taken out of sys.argv by now
    environments = [env for one in asked if isinstance(env := one.get("env"), dict)]
    values = [str(env.get(name) or "") for env in environments for name in active.VARIABLES]
    configured = bool(flags) or active.asked() or any(value.strip(" ;") for value in values)
    return configured or any(map(_names_us, asked))


def _names_us(one: dict[str, Any]) -> bool:
    return _asks_for_ours(one.get("tasks"), one.get("include_path")) or _carries_patch(one.get("model_args"))


def _asks_for_ours(tasks: Any, include_path: Any) -> bool:
    from llava_patch.core.paths import eval_tasks_dir

    wanted = wanted_tasks(tasks)
    given = {name: Path(name) for name in wanted if os.path.exists(name)}  # tasks given by path
    included = [Path(str(path)) for path in _listed(include_path)]
    places = [eval_tasks_dir(), *included, *_plugin_folders(), *given.values()]
    files = [file for place in places for file in (sorted(place.rglob("*.yaml")) if place.is_dir() else [place])]
    ours: set[str] = set()
    groups: list[tuple[set[str], set[str]]] = []
    for path in dict.fromkeys(files):
        config = _task_config(path)
        names = {name for name, place in given.items() if place == path or place in path.parents}
        names |= _names([config.get("group"), config.get("tag")])
        if str(config.get("output_type")).startswith(OUTPUT_TYPE):
            ours |= names | _names(config.get("task"))
        elif isinstance(config.get("task"), list):
            groups.append((names, _names(config["task"])))
    while grown := [names for names, inside in groups if inside & ours and not names <= ours]:
        ours = ours.union(*grown)
    return any(name in ours or fnmatch.filter(ours, name) for name in wanted)


def wanted_tasks(tasks: Any) -> list[str]:
    """The names in the argument `--tasks`, or in a configuration's list."""
    return [name.strip() for part in _listed(tasks) for name in str(part).split(",") if name.strip()]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _names(value: Any) -> set[str]:
    """The tasks, groups and tags that a part of a task's YAML names."""
    if isinstance(value, dict):
        return _names([value.get("task"), value.get("group")])
    if isinstance(value, list):
        return set().union(*map(_names, value))
    return set() if value is None else {str(value)}


def _plugin_folders() -> Iterator[Path]:
    for plugin in filter(None, os.environ.get("LMMS_EVAL_PLUGINS", "").split(",")):
        with contextlib.suppress(ImportError, ValueError):  # lmms-eval imports it and says so
            spec = importlib.util.find_spec(plugin)
            for folder in (spec and spec.submodule_search_locations) or ():
                yield Path(folder, "tasks")


def _task_config(path: Path, depth: int = 0) -> dict[str, Any]:
    """A task's YAML with what it includes, without its functions."""
    own = _read_yaml(path)
    if not isinstance(own, dict):
        return {}
    merged: dict[str, Any] = {}
    for name in map(str, reversed(_listed(own.get("include")))):  # the first one counts most
        if depth < 10:
            merged |= _task_config(Path(name) if os.path.isfile(name) else path.parent / name, depth + 1)
    return merged | own


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds; None for one that cannot be read, of which lmms-eval complains itself."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # Functions and Python's own types, which are not needed here.
    Loader.add_constructor(None, lambda loader, node: None)  # type: ignore[type-var]
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except Exception:  # whatever a constructor raises: ValueError for a date that there is not
        return None


def _carries_patch(model_args: Any) -> bool:
    """Whether a checkpoint that the model's arguments name is patched: in its config, or as an adapter."""
    from llava_patch.core.records import CONFIG_KEY, SETTINGS_FILE

    if isinstance(model_args, dict):
        values = list(model_args.values())
    else:
        values = [pair.partition("=")[2] for pair in str(model_args or "").split(",")]
    for checkpoint in (value for value in values if isinstance(value, str) and value):
        if _find(checkpoint, SETTINGS_FILE) is not None:
            return True
        config = _find(checkpoint, "config.json")
        with contextlib.suppress(OSError, ValueError, TypeError):
            if config is not None and CONFIG_KEY in json.loads(config.read_text(encoding="utf-8")):
                return True
    return False


def _find(checkpoint: str, name: str) -> Path | None:
    """A file of a checkpoint, in its folder or in the hub's cache; None where it has none."""
    found: Any = os.path.join(checkpoint, name)
    if not os.path.isdir(checkpoint):
        from huggingface_hub import try_to_load_from_cache

        with contextlib.suppress(ValueError):  # no name of a repository
            found = try_to_load_from_cache(checkpoint, name)
    return Path(found) if isinstance(found, str) and os.path.isfile(found) else None
