#!/usr/bin/env bash
# The main job on a fresh machine: environment, small model, both training stages, evaluation, one table.
# Usage: bash scripts/quickstart.sh [OUTPUT_FOLDER]   (default: quickstart_out). Safe to run again: it goes on where it was.
set -euo pipefail
out=$(realpath -m "${1:-"$(dirname "$0")/../quickstart_out"}")
cd "$(dirname "$0")/.."
source scripts/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_DISABLED=true PYTHONPATH="$PWD/scripts"
# Small kernels: threads that spin while they wait cost more than they bring as soon as anything else runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
unset LLAVA_PATCH_GIN_FILE LLAVA_PATCH_GIN_PARAM LLAVA_PATCH_DISABLE
exec python -m quickstart.run "$out"
