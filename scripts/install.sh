#!/usr/bin/env bash
# Makes the virtual environment that quickstart.sh and test.sh run in: .venv, or $LLAVA_PATCH_VENV. Safe to run again.
# Usage: source scripts/install.sh [dev]
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LLAVA_PATCH_VENV:-$_root/.venv}
_stamp=$VENV/.llava_patch-${1:-run}
_wanted=$(cat "$_root"/scripts/requirements*.txt "$_root/scripts/install.sh" "$_root/pyproject.toml" | sha256sum)$_root

if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
  echo "== installing into $VENV (about 2 GB, a few minutes the first time) =="
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  _pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
  # One call: apart, these resolve to hub clients that refuse each other.
  _files=(-r "$_root/scripts/requirements.txt")
  [ "${1:-}" != dev ] || _files+=(-r "$_root/scripts/requirements-dev.txt")
  "${_pip[@]}" "${_files[@]}"
  # Their own pins are years old (llava) or bring a CUDA torchvision that breaks a CPU torch (lmms-eval).
  "${_pip[@]}" --no-deps llava-torch==1.2.2.post1 lmms-eval==0.7.3 decord==0.6.0
  # Builds against the torch that was just installed; LLaVA's saving code imports it even on one process.
  DS_BUILD_OPS=0 "${_pip[@]}" --no-deps --no-build-isolation deepspeed==0.19.8
  "${_pip[@]}" --no-deps --no-build-isolation -e "$_root"
  echo "$_wanted" >"$_stamp"
fi
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV=$VENV
