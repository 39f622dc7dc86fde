"""Makes our tasks known to lmms-eval with no flag.

Two ways lead here: the start-up hook on the import of `lmms_eval.tasks`, and, where no hook runs (an editable install
without the `.pth` file), the entry point group `lmms_eval.models` of lmms-eval 0.7.3 and later.
"""

import functools
import logging
from pathlib import Path
from typing import Any

from llava_patch.core.paths import eval_tasks_dir
from llava_patch.integrations import import_hook as autostart

logger = logging.getLogger("llava_patch")
_MARK = "_llava_patch_registers_tasks"


def register_tasks() -> None:
    """Let every TaskManager index our tasks beside lmms-eval's own; calling it again changes nothing.

    Modifications: `TaskManager.initialize_tasks`, and through `fail_fast.install` lmms-eval's `evaluate` and
    `simple_evaluate` once its evaluator is loaded.
    """
    import lmms_eval
    from lmms_eval.tasks import TaskManager

    original = TaskManager.initialize_tasks
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def initialize_tasks(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from llava_patch.integrations.lmms_eval import fail_fast

        fail_fast.install()  # by now the evaluator is loaded, and simple_evaluate not yet called
        index = original(self, *args, **kwargs)
        if not kwargs.get("include_defaults", args[1] if len(args) > 1 else True):
            return index
        ours, stock = self._get_task_and_group(str(eval_tasks_dir())), Path(lmms_eval.__file__).resolve().parent
        for name in sorted(set(ours) & set(index)):
            path = str(index[name].get("yaml_path", ""))
            if stock in Path(path).resolve().parents:
                logger.warning("lmms-eval has a task %r of its own (%s); llava_patch's is hidden", name, path)
        return {**ours, **index}  # a folder named by --include_path wins

    setattr(initialize_tasks, _MARK, True)
    TaskManager.initialize_tasks = initialize_tasks


def entry_point() -> list[Any]:
    """For the entry point group `lmms_eval.models`: registers the tasks, watches the command and offers no model."""
    from llava_patch.integrations.lmms_eval import command

    if not autostart.disabled():
        command.watch()
        register_tasks()
    return []
