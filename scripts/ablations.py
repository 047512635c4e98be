"""The ablations of configs/ablations.py: every one trained from scratch and evaluated, one CSV, a picture a group.

    python scripts/ablations.py --dry_run                                          # what they cost
    python scripts/ablations.py --names dense,leverage,k_8,k_16 --workdir runs/ablations
    python scripts/ablations.py --groups 'local tokens,rule' --set total_epochs=8.0 --set batch_size=512 --minutes 25

Trainings and evaluations are processes of their own; the same command goes on where it was interrupted, and more names
or seeds may be added. `ablations.csv`, `ablations.json` and the pictures in the workdir are written anew after each
job. Those that do not fit the model, such as more keys than tokens, are named and left out. See also
scripts/reproduce_table1.py, which runs its jobs in the same way.
"""

import argparse
import shlex
import sys
from pathlib import Path

from levattn.analysis.ablations import ablation_rows, write_ablations
from levattn.training.sweep import Run, add_arguments, check, load_config_file, parse_seeds, run_sweep

CONFIG = "configs/ablations.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="fashion_mnist", help="or digits, with a small model")
    parser.add_argument("--patch", type=int, default=2, help="1 for 785 tokens of Fashion-MNIST; default: 2 (197)")
    parser.add_argument("--names", help="of ablations, comma-separated; default: all")
    parser.add_argument("--groups", help="of ablations, comma-separated, in place of --names")
    add_arguments(parser, "runs/ablations", seeds="0")
    args = parser.parse_args()
    try:
        sys.exit(ablate(args))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def ablate(args: argparse.Namespace) -> int:
    """Runs the ablations; an exit code."""
    config = load_config_file(CONFIG)
    references = [*config.REFERENCES]
    wanted = _wanted(args, config)
    runs: dict[str, dict[int, Run]] = {}
    for name in dict.fromkeys([*references, *wanted]):
        shape = f"{CONFIG}:name={name},source={args.source},patch={args.patch}"
        of_name = {
            seed: Run(f"{name}/seed{seed}", shape, (*args.settings, f"seed={seed}")) for seed in parse_seeds(args.seeds)
        }
        try:
            check(next(iter(of_name.values())), needs_data=False)
        except ValueError as error:
            if name in references:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        runs[name] = of_name
    folders = {name: {seed: args.workdir / run.name for seed, run in seeds.items()} for name, seeds in runs.items()}
    groups = {"references": references} | {
        group: [name for name in names if name in runs and name in wanted] for group, names in config.GROUPS.items()
    }

    def write() -> None:
        command = shlex.join(["python", *sys.argv])
        write_ablations(ablation_rows(groups, folders), folders, args.workdir, command=command, references=references)

    code = run_sweep(args, [run for seeds in runs.values() for run in seeds.values()], write)
    if not (args.list or args.dry_run):
        print(f"written to {Path(args.workdir) / 'ablations.csv'}")
    return code


def _wanted(args: argparse.Namespace, config) -> list[str]:
    if args.names and args.groups:
        raise ValueError("give either names or groups")
    if args.groups:
        groups = [group.strip() for group in args.groups.split(",")]
        if unknown := set(groups) - set(config.GROUPS):
            raise ValueError(f"groups={sorted(unknown)} must be of: {', '.join(config.GROUPS)}")
        return [name for group in groups for name in config.GROUPS[group]]
    names = args.names.split(",") if args.names else [*config.ABLATIONS]
    if unknown := set(names) - set(config.ABLATIONS):
        raise ValueError(f"names={sorted(unknown)} must be of: {', '.join(config.ABLATIONS)}")
    return names


if __name__ == "__main__":
    main()
