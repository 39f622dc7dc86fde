#!/usr/bin/env bash
# Which of the papers' claims hold on small models: `llava-patch evidence` in the locked environment, from nothing.
# Usage: bash scripts/evidence.sh [OUTPUT_FOLDER] [--publish] [OPTIONS OF llava-patch evidence]
# (default: evidence_out). Safe to run again: finished runs are kept. Up to 90 minutes on two quiet cores, --quick 15.
# --publish writes what was found into docs/measured and README.md.
set -euo pipefail
out=$(dirname "$0")/../evidence_out
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then out=$1; shift; fi
out=$(realpath -m "$out")
publish=
if [ "${1-}" = --publish ]; then publish=1; shift; fi
cd "$(dirname "$0")/.."
source scripts/install.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive
unset LLAVA_PATCH_GIN_FILE LLAVA_PATCH_GIN_PARAM LLAVA_PATCH_DISABLE
llava-patch evidence --output "$out" "$@"
[ -z "$publish" ] || PYTHONPATH="$PWD/scripts" python -m evidence.publish "$out/evidence.json"
