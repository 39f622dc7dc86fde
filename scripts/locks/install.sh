#!/usr/bin/env bash
# Installs exactly what a lock says; pip resolves nothing but torch's own GPU packages.
# Usage: bash scripts/locks/install.sh PYTHON LOCK
set -euo pipefail
python=$1 lock=$2
pip=("$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation)
# torch first, alone: which GPU packages it needs depends on the wheel that this machine gets, and torch pins those
# itself. What builds the rest comes with it, so that no build fetches a version of its own choice.
first=$(grep -oE '^(torch|setuptools|wheel|hatchling|editables)==[^ ;]+' "$lock")
"${pip[@]}" --constraint "$lock" $first
# DeepSpeed's kernels are built where they are used; LLaVA's saving code imports it even on one process.
DS_BUILD_OPS=0 "${pip[@]}" --no-deps --requirement "$lock"
