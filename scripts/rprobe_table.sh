#!/usr/bin/env bash
# What R-Probe tells apart on the quickstart's small model: region seen or masked, text or none, sharp or blurred features.
# Usage: bash scripts/rprobe_table.sh [OUTPUT_FOLDER] [--seeds 0,1,2] [--publish]
# (default: rprobe_table_out). Safe to run again: finished probes are kept. About 15 minutes on two quiet cores.
set -euo pipefail
out=$(dirname "$0")/../rprobe_table_out
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then out=$1; shift; fi
out=$(realpath -m "$out")
cd "$(dirname "$0")/.."
source scripts/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD/scripts"
# Small kernels: threads that spin while they wait cost more than they bring as soon as anything else runs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
unset LLAVA_PATCH_GIN_FILE LLAVA_PATCH_GIN_PARAM LLAVA_PATCH_DISABLE
exec python -m rprobe_table.run "$out" "$@"
