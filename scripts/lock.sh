#!/usr/bin/env bash
# Renews the locks in scripts/locks from their .in and .overrides files.
# Usage: bash scripts/lock.sh [main|newest|llava_pinned ...]
# A lock holds what was published before today, or before $LLAVA_PATCH_LOCK_DATE: the same day gives the same file.
set -euo pipefail
cd "$(dirname "$0")/.."
date=${LLAVA_PATCH_LOCK_DATE:-$(date -u +%F)}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
[ $# -gt 0 ] || set -- main newest llava_pinned
for stack in "$@"; do
  inputs=("scripts/locks/$stack.in")
  python=3.10
  [ "$stack" != newest ] || python=3.11  # which its transformers asks for
  # The suite's environments also hold what our own extras ask for.
  case $stack in main | newest) inputs+=(pyproject.toml --extra all --extra eval --extra demo --extra docs --extra dev) ;; esac
  # --universal: one file with markers for every Python from the oldest that the stack runs on and every platform, not for this machine's alone.
  UV_PYTHON_DOWNLOADS=never "$tools/bin/uv" --quiet --system-certs --no-config pip compile "${inputs[@]}" \
    --override "scripts/locks/$stack.overrides" --python-version "$python" --universal --prerelease disallow \
    --exclude-newer "$date" --no-annotate --no-header >"$tools/resolved"
  {
    echo "# By scripts/lock.sh, of what was published before $date. GPU packages are not here: torch pins its own."
    sed -E '/^nvidia-ml-py==/!{/^(nvidia-|cuda-|triton==)/d}' "$tools/resolved"
  } >"scripts/locks/$stack.txt"
  echo "scripts/locks/$stack.txt: $(grep -c == "scripts/locks/$stack.txt") packages"
done
