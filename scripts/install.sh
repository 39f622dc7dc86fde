#!/usr/bin/env bash
# Makes the virtual environment that quickstart.sh and test.sh run in: .venv, or $LLAVA_PATCH_VENV. Safe to run again.
# Usage: source scripts/install.sh   (with LLAVA_PATCH_LOCK=newest: what scripts/locks/newest.txt says, in .venv-newest;
# with LLAVA_PATCH_LOCK=llava_pinned: what LLaVA pins, and of main.txt what the tests need beside it)
_stack=${LLAVA_PATCH_LOCK:-main}
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LLAVA_PATCH_VENV:-$_root/.venv}
[ "$_stack" = main ] || VENV=$VENV-$_stack
_stamp=$VENV/.llava_patch
_lock=$_root/scripts/locks/$_stack.txt
_main=$_root/scripts/locks/main.txt
_tests='gin-config|pytest|pytest-timeout|pytest-xdist|execnet|iniconfig|pluggy|hypothesis|sortedcontainers|exceptiongroup|tomli|hatchling|editables|pathspec|trove-classifiers'
_wanted=$(cat "$_lock" "$_main" "$_root/scripts/install.sh" "$_root/scripts/locks/install.sh" "$_root/pyproject.toml" | sha256sum)$_root

if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
  echo "== installing into $VENV ($([ "$_stack" = llava_pinned ] && echo 6 || echo 2) GB, a few minutes the first time) =="
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  bash "$_root/scripts/locks/install.sh" "$VENV/bin/python" "$_lock"
  if [ "$_stack" = llava_pinned ]; then
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      --requirement <(grep -E "^($_tests)==" "$_main")
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$_root"
  echo "$_wanted" >"$_stamp"
fi
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV=$VENV
