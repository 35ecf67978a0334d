#!/usr/bin/env bash
# Parity, speed and learning on one GPU in a few minutes: see gpu.py.    bash benchmarks/gpu.sh [FILE]
exec "${PYTHON:-python}" "$(dirname "$0")/gpu.py" "$@"
