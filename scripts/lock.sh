#!/usr/bin/env bash
# Renews the locks in scripts/locks from their .in and .overrides files. Usage: bash scripts/lock.sh [main|llava_pinned ...]
# A lock holds what was published before today, or before $LLAVA_PATCH_LOCK_DATE: the same day gives the same file.
set -euo pipefail
cd "$(dirname "$0")/.."
date=${LLAVA_PATCH_LOCK_DATE:-$(date -u +%F)}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
[ $# -gt 0 ] || set -- main llava_pinned
for stack in "$@"; do
  inputs=("scripts/locks/$stack.in")
  # The suite's environment also holds what our own extras ask for.
  [ "$stack" != main ] || inputs+=(pyproject.toml --extra all --extra eval --extra dev)
  # --universal: one file with markers for every Python from 3.10 and every platform, not for this machine's alone.
  UV_PYTHON_DOWNLOADS=never "$tools/bin/uv" --quiet --system-certs --no-config pip compile "${inputs[@]}" \
    --override "scripts/locks/$stack.overrides" --python-version 3.10 --universal --prerelease disallow \
    --exclude-newer "$date" --no-annotate --no-header >"$tools/resolved"
  {
    echo "# By scripts/lock.sh, of what was published before $date. GPU packages are not here: torch pins its own."
    sed -E '/^nvidia-ml-py==/!{/^(nvidia-|cuda-|triton==)/d}' "$tools/resolved"
  } >"scripts/locks/$stack.txt"
  echo "scripts/locks/$stack.txt: $(grep -c == "scripts/locks/$stack.txt") packages"
done
