"""Trains a small ViT densely and with LevAttention, puts other attention into the dense one, and writes a report.

    python -m scripts.quickstart [WORKDIR] [--dataset digits|fashion_mnist] [--epochs N]

An interrupted run goes on where it stopped; a finished one only evaluates again.
"""

import dataclasses
import itertools
from pathlib import Path

from absl import flags

from configs import quickstart
from levattn.analysis import plot_accuracy, plot_attention, print_table, write_report, write_results
from levattn.attention import AttentionSpec
from levattn.data import eval_batches, open_source
from levattn.training.cli import run
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.evaluate import evaluate_attention, expand, load_trained
from levattn.training.loop import train

EPOCHS = flags.DEFINE_float("epochs", None, "Length of both trainings. None: that of the config.")
DATASET = flags.DEFINE_enum("dataset", "digits", ["digits", "fashion_mnist"], "What to train on.")

DEFAULT_WORKDIRS = {"digits": "runs/quickstart", "fashion_mnist": "runs/quickstart_fashion_mnist"}
RETROFITTED = ("leverage", "row_norm", "random", "kmeans")
SIZES = (8, 16, 32)
FROM_SCRATCH = {"dense": "attention=dense", "leverage_k16": "attention=leverage,k=16"}


def main(workdir: str | None = None) -> None:
    workdir = Path(workdir or DEFAULT_WORKDIRS[DATASET.value])
    runs = {name: workdir / name for name in FROM_SCRATCH}
    for name, attention in FROM_SCRATCH.items():
        print(f"\ntraining {name} on {DATASET.value}", flush=True)
        config = quickstart.get_config(f"source={DATASET.value},{attention}")
        if EPOCHS.value is not None:
            config.total_epochs = EPOCHS.value
        train(from_config_dict(TrainConfig, config), runs[name])

    print("\nevaluating", flush=True)
    dense, dense_params = load_trained(runs["dense"])
    leverage, leverage_params = load_trained(runs["leverage_k16"])
    retrofits = list(expand(AttentionSpec(), RETROFITTED, SIZES))
    rows = evaluate_attention(dense, dense_params, [dense.model.attention, *retrofits])
    rows += evaluate_attention(leverage, leverage_params)
    rows = write_results(rows, workdir)
    print_table(rows)

    source = open_source(dense.data, dense.data.eval_split)
    batch = next(itertools.islice(eval_batches(source, dense.data, batch_size=1), 3, None))
    plot_accuracy(rows, workdir / "accuracy.png", num_classes=source.num_classes)
    retrofit = dataclasses.replace(dense.model, attention=AttentionSpec("leverage", k=16))
    plot_attention(retrofit, dense_params, batch["image"][0], workdir / "attention.png", data_config=dense.data)
    report = write_report(
        workdir,
        rows,
        title=f"Dense attention and LevAttention on {DATASET.value}",
        figures={
            "Accuracy against the number of keys": workdir / "accuracy.png",
            "What the last layer of the dense model keeps under leverage k=16": workdir / "attention.png",
        },
        runs=runs,
    )
    print(f"\n{report}: table, plots and how to go on")


if __name__ == "__main__":
    run(main)
