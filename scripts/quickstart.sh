#!/usr/bin/env bash
# From a bare machine to a trained Vision Transformer, LevAttention beside it, and a report.
#   scripts/quickstart.sh [WORKDIR] [--dataset digits|fashion_mnist] [--epochs N]
# Makes .venv if there is none; PYTHON chooses the interpreter (3.11 to 3.13).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/environment.sh"
(cd "$root" && install requirements.txt)
PYTHONPATH=$root exec "$root/.venv/bin/python" -m scripts.quickstart "$@"
