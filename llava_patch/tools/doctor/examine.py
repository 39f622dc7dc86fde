"""All of the doctor's checks, in the order in which they are read, and what loading one checkpoint here would do."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_patch.core.errors import LlavaPatchError
from llava_patch.core.version import __version__
from llava_patch.fusion.base import Fusion, differs
from llava_patch.settings.gin_config import Configuration
from llava_patch.settings.methods import AUTO
from llava_patch.tools.doctor import NOTE, PROBLEM, Row, configured, machine, software


def examine(checkpoint: str = "", gin_file: Sequence[str] = (), gin_param: Sequence[str] = ()) -> list[Row]:
    """Look at everything."""
    return [*at_once(gin_file, gin_param), *by_importing(checkpoint, gin_file, gin_param)]


def at_once(gin_file: Sequence[str] = (), gin_param: Sequence[str] = ()) -> list[Row]:
    """What is known without importing torch or a host: packages, what is configured, the disk."""
    hook = software.check_hook()
    asked, error = configured.read(gin_file, gin_param)
    return [
        *software.check_packages(), *software.check_measured(), hook, *configured.check_configured(asked, error),
        *configured.check_ignored(asked, hook), *configured.check_deepspeed(), machine.check_disk(),
    ]  # fmt: skip


def by_importing(checkpoint: str = "", gin_file: Sequence[str] = (), gin_param: Sequence[str] = ()) -> list[Row]:
    """What only importing tells: whether torch and the hosts work, what commands import, the machine, a checkpoint."""
    imports = software.start_imports()  # processes of their own, beside what this one imports
    broken = software.check_torch()
    if broken is not None:
        software.stop_imports(imports)
        return [broken]
    hosts = software.check_hosts()
    asked, _ = configured.read(gin_file, gin_param)
    rows = [_supported(), software.check_torchvision(), *hosts, *software.check_attention()]
    rows += [*machine.check_device(), *machine.check_memory()]
    if checkpoint:
        rows += check_checkpoint(checkpoint, asked, {row.what.removeprefix("host "): row for row in hosts})
    return [*rows, *software.check_imports(imports)]


def _supported() -> Row:
    """Whether these versions can be patched."""
    from llava_patch.hosts.compat import unsupported

    try:
        reason = unsupported()
    except ImportError as error:  # no transformers
        reason = str(error)
    return Row("supported versions", "yes") if reason is None else Row("supported versions", "no", PROBLEM, reason)


def check_checkpoint(checkpoint: str, asked: Configuration | None, hosts: dict[str, Row]) -> list[Row]:
    """Host, form, what a load would patch, and whether it fits."""
    from llava_patch.core import memory
    from llava_patch.tools.inspect import inspect_checkpoint
    from llava_patch.tools.inspect.result import FORMS

    try:
        found = inspect_checkpoint(checkpoint)
    except LlavaPatchError as error:
        return [Row("checkpoint", checkpoint, PROBLEM, str(error))]
    rows = [Row("checkpoint", f"{found.host or 'no config.json'}: {FORMS[found.form]}")]
    host = None if found.host is None else hosts.get(found.host)
    if host is not None and (host.state == PROBLEM or host.found == "not installed"):
        rows.append(Row("checkpoint: host", f"{found.host}: {host.found}", PROBLEM, host.advice))
    carried, wanted = found.methods(), {} if asked is None else asked.lasting()
    rows += _patched_on_load(carried, wanted)
    if found.host is not None and found.form in ("full", "adapter"):
        rows.append(_rehearsal(checkpoint, found.host, {**wanted, **carried}))
    if found.match is not None and found.match.same is False:
        rows.append(Row("checkpoint: base", found.match.note, PROBLEM, "load the adapter on the base it was made on"))
    elif found.form == "adapter" and found.base and Path(found.base).is_absolute() and not Path(found.base).is_dir():
        where = f'change "base" in {Path(checkpoint) / "llava_patch.json"} to where it is now'
        rows.append(Row("checkpoint: base", f"{found.base} is not there", PROBLEM, where))
    size, room = found.weight_bytes, memory.machine_memory()
    if room is not None and size > room:
        sizes = f"{size / 1e9:.1f} GB of weights, {room / 1e9:.0f} GB of memory"
        advice = "does not fit into main memory: load it on a GPU, or on a larger machine"
        rows.append(Row("checkpoint: memory", sizes, NOTE, advice))
    return rows


def _rehearsal(checkpoint: str, host: str, methods: dict[str, Any]) -> Row:
    """Patch the checkpoint's model without its weights, so that what a load would refuse is known before it."""
    from llava_patch.hosts import anatomy, configs, known
    from llava_patch.patching.patch import patch

    routing = methods.get("routing")
    if routing is not None and routing.split == AUTO:  # any layer will do
        methods = {**methods, "routing": dataclasses.replace(routing, split=0)}
    try:
        model = configs.skeleton(configs.read(checkpoint).config, host)
        if methods:
            patch(model, **methods, loading=True)
        else:
            known.check_decoder(anatomy.find(model).decoder, "routing")
    except LlavaPatchError as error:
        state, advice = PROBLEM, "load it without the patch, or mend what it names"
        if not methods:
            state, advice = NOTE, "as a stock model it works"
        return Row("checkpoint: patching it", str(error), state, advice)
    kind = type(anatomy.find(model).decoder).__name__
    return Row("checkpoint: patching it", f"tried without its weights, on {kind}: works")


def _patched_on_load(carried: dict[str, Any], wanted: dict[str, Any]) -> list[Row]:
    rows = []
    for kind in sorted({*carried, *wanted}):
        own, other = carried.get(kind), wanted.get(kind)
        same = own is None or other is None or own == other
        if isinstance(own, Fusion) and isinstance(other, Fusion):
            same = not differs(other, own)
        whose = "the checkpoint's own" if own is not None else "configured"
        if same:
            rows.append(Row(f"load would patch: {kind}", f"{own or other} ({whose})"))
        else:
            advice = "leave the binding out: the checkpoint carries its own"
            rows.append(Row(f"load would refuse: {kind}", f"it carries {own}, {other} is configured", PROBLEM, advice))
    return rows or [Row("load would patch", "nothing: a stock model")]


def summary(rows: Sequence[Row]) -> str:
    """The outcome in one line."""
    problems, notes = (sum(row.state == state for row in rows) for state in (PROBLEM, NOTE))
    if problems:
        return f"{problems} problem{'s' * (problems != 1)}: something above cannot work; {notes} to note"
    return f"nothing in the way; {notes} to note" if notes else "all well"


def to_json(rows: Sequence[Row]) -> str:
    """For machines: format 1, which only grows."""
    problems = sum(row.state == PROBLEM for row in rows)
    found = [vars(row) for row in rows]
    return json.dumps({"format": 1, "llava_patch": __version__, "problems": problems, "rows": found}, indent=1)
