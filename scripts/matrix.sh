#!/usr/bin/env bash
# What works on which transformers, which host and for which job: one table, from real runs. docs/measured/matrix.*
# Usage: bash scripts/matrix.sh [-l] [-s SESSION ...] [-- PYTEST_ARGUMENTS]   (default: every session; words go to nox)
# With PYTEST_ARGUMENTS, such as `--jobs generate,resume`, the table of that part is printed, and the files stay as they are.
# LLAVA_PATCH_LLAVA_TREE=/path/to/LLaVA adds the session `llava-head`, a checkout of LLaVA in front of its release,
# LLAVA_PATCH_NEXT_TREE=/path/to/LLaVA-NeXT the session `llava-next`, with a checkout of LLaVA-NeXT in its place.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=.matrix/tools
[ -x $tools/bin/nox ] || { "${PYTHON:-python3}" -m venv $tools && $tools/bin/python -m pip install --quiet nox==2026.10.20; }
exec $tools/bin/nox --noxfile scripts/matrix/noxfile.py "$@"
