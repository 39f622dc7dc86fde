"""A table of multi-layer fusions on the small LLaVA-1.5, each with and without detached taps.

Modules, in the order they are used:
    arms         which fusions, with which taps of the small tower
    train        the launch commands of both stages, LLaVA's own train.py under DeepSpeed ZeRO-2 on two CPU ranks
    on_cpu       what lets DeepSpeed start on a machine without a GPU (runs train.py)
    measure      losses, trained parameters and exact match of a finished arm
    table        the table as Markdown and JSON, and its figure
    run          all of it (`python -m fusion_table.run OUT`, which `scripts/fusion_table.sh` calls)
"""

import quickstart  # noqa: F401  (sets how torch's threads wait, before torch is imported)
