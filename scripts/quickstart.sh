#!/usr/bin/env bash
# The main job on a fresh machine: environment, small model, both training stages, evaluation, one table.
# Usage: bash scripts/quickstart.sh [OUTPUT_FOLDER]   (default: quickstart_out). Safe to run again: it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_DISABLED=true PYTHONPATH="$PWD/scripts"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
unset LLAVA_PATCH_GIN_FILE LLAVA_PATCH_GIN_PARAM LLAVA_PATCH_DISABLE
exec python -m quickstart.run "${1:-quickstart_out}"
