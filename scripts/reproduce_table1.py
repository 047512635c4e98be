"""The paper's table: softmax attention, other attention put into it at inference, and leverage trained from scratch.

    python scripts/reproduce_table1.py --dataset fashion_mnist --dry_run      # what it costs, from measured images/s
    python scripts/reproduce_table1.py --dataset fashion_mnist --workdir runs/table1
    python scripts/reproduce_table1.py --dataset fashion_mnist --seeds_of S/1=0 --workdir runs/table1   # one at 785
    python scripts/reproduce_table1.py --dataset imagenet2012 --models S/16,L/16,L/8 --seeds 0 --workdir runs/imagenet
    python scripts/reproduce_table1.py --dataset folder:PATH --models S/16 --workdir runs/mine

Every training and every evaluation is a process of its own. The same command goes on where it was interrupted, a
training from its checkpoint; models and seeds may be added. A second one on the same workdir, with another device in
CUDA_VISIBLE_DEVICES, shares the work. `--minutes 9` saves and stops in time. After each job `table.csv`, `table.md` and
`table.json` in the workdir have what there is so far and what is missing. The recipes are those of configs/; `--set
total_epochs=20.0` changes a field in all trainings, `--set S/1:accumulate_steps=2` in those of one model (less memory).
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from levattn.analysis.seeds import hardware_of
from levattn.analysis.table1 import Line, table1_cells, write_table1
from levattn.attention import get_method
from levattn.data import DataConfig, open_source
from levattn.models.variants import decode
from levattn.training.sweep import Run, add_arguments, parse_seeds, run_sweep

# The paper's two, the floor, pre-scoring's, and those that make up for what they leave out.
INFERENCE = "leverage,row_norm,random,kmeans,leverage_merged,pivoted,leverage_groups,groups,matched"
# Side of the images; models of the table.
DATASETS = {
    "fashion_mnist": (28, "S/2,S/1"),
    "imagenet2012": (224, "S/16,L/16,L/8"),
    "folder": (224, "S/16,L/16,L/8"),
    "digits": (8, "mu/1"),
}


def models_of(args: argparse.Namespace) -> list[str]:
    """The models of the table: as named, or of one variant at each number of tokens, a class token among them."""
    side, models = DATASETS[args.dataset.partition(":")[0]]
    if args.models and (args.tokens or args.variant):
        raise ValueError("give either models or tokens and variant")
    if args.models:
        models = args.models
    elif args.tokens or args.variant:
        variant = args.variant or models.partition("/")[0]
        patches = []
        for text in (args.tokens or "197,785").split(","):
            grid = math.isqrt(max(int(text) - 1, 0)) if text.isdecimal() else 0
            if not grid or grid**2 + 1 != int(text) or side % grid:
                raise ValueError(f"tokens={text!r} must be a class token and the patches of a {side}x{side} image")
            patches.append(side // grid)
        models = ",".join(f"{variant}/{patch}" for patch in patches)
    for model in models.split(","):
        if side % decode(model).patch:
            raise ValueError(f"models={model!r} must have patches that divide the {side}x{side} images")
    return models.split(",")


def runs_of(args: argparse.Namespace) -> Iterator[tuple[tuple[str, str, int | None], int, Run]]:
    """Every training with its evaluation: (model, method trained with, k), seed and run."""
    side = DATASETS[args.dataset.partition(":")[0]][0]
    options = f"keep_prefix={args.keep_prefix}"
    inference = (f"--attention=dense,{args.inference}", f"--k={args.k}", f"--option={options}")
    models = models_of(args)
    texts = [text.strip() for text in args.scratch.split(",") if text.strip()]
    if not all(text.isdecimal() and int(text) for text in texts):
        raise ValueError(f"scratch={args.scratch!r} must be numbers of keys, such as 32,64,128")
    trained = dict.fromkeys(map(int, texts))
    seeds_of = dict(text.split("=", 1) for text in args.seeds_of if "=" in text)
    if len(seeds_of) < len(args.seeds_of) or not set(seeds_of) <= set(models):
        raise ValueError(f"seeds_of={args.seeds_of} must be such as {models[-1]}=0, of one of {', '.join(models)} each")
    for model in models:
        tokens = (side // decode(model).patch) ** 2 + 1
        if args.k > tokens:
            raise ValueError(f"k={args.k} must be at most {tokens}, the tokens of {model}")
        for k in (None, *(k for k in trained if k < tokens)):
            attention = "attention=dense" if k is None else f"attention=leverage,k={k},{options}"
            name = "dense" if k is None else f"leverage_{k}"
            config, settings = config_of(args.dataset, model, attention)
            settings += tuple(_settings_of(model, models, args.settings))
            for seed in parse_seeds(seeds_of.get(model, args.seeds)):
                all_settings = (*settings, f"seed={seed}")
                folder = f"{model.replace('/', '-')}/{name}/seed{seed}"
                run = Run(folder, config, all_settings, inference if k is None else ())
                yield (model, "dense" if k is None else "leverage", k), seed, run


def _settings_of(model: str, models: list[str], settings: list[str]) -> Iterator[str]:
    """Those of all models, and those behind the name of this one: "S/1:accumulate_steps=2"."""
    for setting in settings:
        name, _, rest = setting.partition(":")
        if name not in models:
            yield setting
        elif name == model:
            yield rest


def config_of(dataset: str, model: str, attention: str) -> tuple[str, tuple[str, ...]]:
    """The config file with its argument, and fields beside it."""
    kind = dataset.partition(":")[0]
    variant, _, patch = model.partition("/")
    match kind:
        case "fashion_mnist":
            return f"configs/fashion_mnist.py:variant={variant},patch={patch},{attention}", ()
        case "digits":
            return f"configs/quickstart.py:source=digits,{attention}", (f"model.variant={model}",)
        case "imagenet2012":
            return f"configs/imagenet.py:variant={model},{attention}", ()
        case "folder":
            classes = open_source(DataConfig(source=dataset), "train").num_classes
            fields = (f"data.source={dataset}", f"model.num_classes={classes}")
            fields += ("optimizer.warmup_steps=0", "optimizer.warmup_fraction=0.1")  # those of ImageNet may be too many
            return f"configs/imagenet.py:variant={model},{attention}", fields
    raise ValueError(dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="fashion_mnist", help=f"{', '.join(DATASETS)}:PATH; default: fashion_mnist"
    )
    parser.add_argument("--models", help="such as S/2,S/1; default: by the data set")
    parser.add_argument("--variant", help="in place of --models, with --tokens: Ti, S, B or L")
    parser.add_argument("--tokens", help="such as 197,785, a class token and patches")
    parser.add_argument("--seeds_of", action="append", default=[], metavar="MODEL=SEEDS", help="in place of --seeds")
    parser.add_argument("--k", type=int, default=32, help="at inference; default: 32")
    parser.add_argument("--scratch", default="32,64,128", help="k trained from scratch; default: 32,64,128")
    parser.add_argument("--inference", default=INFERENCE, help="methods put into the dense model")
    parser.add_argument("--keep_prefix", type=int, default=1, help="1 always keeps the class token; default: 1")
    add_arguments(parser, "runs/table1", seeds="0,1,2")
    args = parser.parse_args()
    try:
        sys.exit(reproduce(args))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def reproduce(args: argparse.Namespace) -> int:
    """Runs the table; an exit code."""
    if args.dataset.partition(":")[0] not in DATASETS or args.dataset in ("folder", "folder:"):
        raise ValueError(f"dataset={args.dataset!r} must be one of {', '.join(DATASETS)}:PATH")
    if args.dataset.startswith("folder:"):  # the jobs run elsewhere
        args.dataset = f"folder:{Path(args.dataset.removeprefix('folder:')).expanduser().absolute()}"
    methods = args.inference.split(",")
    for method in methods:
        get_method(method)
    planned = sorted(runs_of(args), key=lambda one: one[1])  # the first seed of everything comes first
    folders: dict[tuple, dict] = {}
    for key, seed, run in planned:
        folders.setdefault(key, {})[seed] = args.workdir / run.name
    lines = [Line("dense", None, "dense"), *(Line(method, args.k, "dense") for method in methods)]
    lines += [Line("leverage", k, "leverage") for k in dict.fromkeys(key[2] for key in folders) if k is not None]

    def write() -> None:
        write_table1(
            table1_cells(lines, folders),
            args.workdir,
            title=f"Table 1 on {args.dataset}",
            command=shlex.join(["python", *sys.argv]),
            hardware=hardware_of(folder for seeds in folders.values() for folder in seeds.values()),
        )

    code = run_sweep(args, [run for _, _, run in planned], write)
    if not (args.list or args.dry_run):
        print((args.workdir / "table.md").read_text())
    return code


if __name__ == "__main__":
    main()
