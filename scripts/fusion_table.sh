#!/usr/bin/env bash
# The table of fusions: plain LLaVA, Skip-Links, Dense Connector, direct fusion and DeepStack, with and without detach.
# Usage: bash scripts/fusion_table.sh [OUTPUT_FOLDER] [--arms plain,skiplinks] [--steps 32,160] [--publish]
# (default: fusion_table_out). Safe to run again: finished arms are kept. About 35 minutes on two quiet cores.
set -euo pipefail
out=$(dirname "$0")/../fusion_table_out
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then out=$1; shift; fi
out=$(realpath -m "$out")
cd "$(dirname "$0")/.."
source scripts/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_DISABLED=true PYTHONPATH="$PWD/scripts"
# Small kernels: threads that spin while they wait cost more than they bring as soon as anything else runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
unset LLAVA_PATCH_GIN_FILE LLAVA_PATCH_GIN_PARAM LLAVA_PATCH_DISABLE
exec python -m fusion_table.run "$out" "$@"
