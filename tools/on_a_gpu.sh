#!/bin/sh
# Ten minutes on a CUDA card: the tests marked `gpu`, then speeds, in OUT/results.json. Never run on a GPU so far.
#   tools/on_a_gpu.sh [OUT]     PYTHON names the interpreter, MODEL a folder of the 1.5B model
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python3
OUT=${1:-runs/on-a-gpu}
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)' 2>/dev/null || {
    echo "on_a_gpu.sh needs a CUDA device, a CUDA build of torch and gateskip: $PYTHON finds none." >&2
    exit 2
}
failed=0
"$PYTHON" -m pytest -m gpu -q tests/gateskip || failed=1
"$PYTHON" tools/on_a_gpu.py --out "$OUT" ${MODEL:+--model "$MODEL"}
exit $failed
