#!/usr/bin/env bash
# Does llava_patch still work with what users have? Makes throw-away environments (several GB each) and tries it in each.
# Usage: bash scripts/canary.sh [--keep] [newest|oldest|llava-pinned ...]   (default: all). Writes docs/measured/canary.*
set -euo pipefail
cd "$(dirname "$0")/.."
exec env PYTHONPATH=scripts "${PYTHON:-python3}" -m canary.run "$@"
