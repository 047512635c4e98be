"""Draws the times of a run of `scripts/bench_attention.py`.

python scripts/plot_attention.py results/attention/h100_bfloat16.json docs/attention_speed.png
"""

import argparse
import json
from pathlib import Path

from levattn.analysis.speed import plot_times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file of the run")
    parser.add_argument("picture", type=Path, help="a .png or .svg to write")
    args = parser.parse_args()
    try:
        plot_times(json.loads(args.results.read_text())["rows"], args.picture)
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"{args.results}: {error}")


if __name__ == "__main__":
    main()
