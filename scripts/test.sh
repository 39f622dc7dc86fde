#!/usr/bin/env bash
# Everything from nothing: environment, lint, types, the whole suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh dev
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false PYTHONPATH=
unset LLAVA_PATCH_GIN_FILE LLAVA_PATCH_GIN_PARAM LLAVA_PATCH_DISABLE
echo "== ruff =="
ruff format --check .
ruff check .
echo "== mypy =="
mypy
seed=${HYPOTHESIS_SEED:-$RANDOM}
echo "== pytest (HYPOTHESIS_SEED=$seed) =="
python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal --hypothesis-seed="$seed" "$@"
