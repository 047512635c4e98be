#!/usr/bin/env bash
# From a bare machine to a trained Vision Transformer, LevAttention beside it, and a report.
#   scripts/quickstart.sh [WORKDIR] [--dataset digits|fashion_mnist] [--epochs N]
# Makes .venv if there is none; PYTHON chooses the interpreter (3.11 to 3.13).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
install requirements.txt
exec .venv/bin/python -m scripts.quickstart "$@"
