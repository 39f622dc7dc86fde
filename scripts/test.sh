#!/usr/bin/env bash
# Everything from nothing: environment, lint, types, the whole suite, every job on the newest transformers, and what
# LLaVA's own environment does.
# Arguments go to the suite's pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false PYTHONPATH=
unset LLAVA_PATCH_GIN_FILE LLAVA_PATCH_GIN_PARAM LLAVA_PATCH_DISABLE
# The report is looked at in a real browser; without one that test is skipped and says so.
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "== installing chromium and chromedriver (apt-get), for the report's browser test =="
    _patience=(-o Acquire::http::Timeout=20 -o Acquire::Retries=1)
    { apt-get update -qq "${_patience[@]}" &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${_patience[@]}" \
        chromium chromium-driver; } >/dev/null || echo "chromium cannot be installed: the browser test will be skipped"
  else
    echo "no chromium and chromedriver, and no apt-get as root to install them: the browser test will be skipped"
  fi
fi
echo "== ruff =="
ruff format --check .
ruff check .
echo "== mypy =="
mypy
echo "== import-linter =="
lint-imports
seed=${HYPOTHESIS_SEED:-$RANDOM}
python_is() { python -c "import sys; sys.exit(not (3, $1) <= sys.version_info[:2] <= (3, $2))"; }
jobs_on() {  # LOCK PYTEST_ARGUMENTS: in an environment of its own
  LLAVA_PATCH_LOCK=$1 source scripts/install.sh
  echo "== pytest on $1: tests/support/jobs.py =="
  python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal --hypothesis-seed="$seed" -p tests.support.jobs "${@:2}"
}
if [ $# -eq 0 ]; then  # otherwise somebody wants some tests, not everything
  if python_is 11 99; then
    (jobs_on newest)
  else
    echo "Python 3.10: the newest transformers asks for 3.11, and its jobs are left out"
  fi
  free=$(python -c "import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free >> 30)" "$VENV")
  if ! python_is 10 11; then
    echo "LLaVA pins torch 2.1, which has no wheel for this Python: its own environment (llava_pinned) is left out"
  elif [ ! -x "$VENV-llava_pinned/bin/python" ] && [ "$free" -lt 9 ]; then
    echo "LLaVA's own environment (llava_pinned) takes 6 GB and pip's cache 3, here are $free GB: it is left out"
  else
    (jobs_on llava_pinned --jobs "import with nothing configured,identities,generate,save and load,train both stages")
  fi
fi
echo "== pytest (HYPOTHESIS_SEED=$seed) =="
python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal --hypothesis-seed="$seed" "$@"
