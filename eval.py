"""Evaluates a trained model under any attention: `eval.py --checkpoint runs/a --attention dense,leverage --k 8,32`.

Writes the table to the terminal and, as results.csv, results.md and results.json, to `--out` (default: the workdir of
the checkpoint). Further options of the attention: `--option keep_prefix=1 --option local_window=3x3`.
"""

import dataclasses
from pathlib import Path

from absl import flags

from configs.common import read_literal
from levattn.analysis import print_table, write_results
from levattn.attention import AttentionSpec
from levattn.data import open_source
from levattn.training.cli import run
from levattn.training.config import from_config_dict
from levattn.training.evaluate import evaluate_attention, expand, load_trained, on_source

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or an exported .safetensors or .npz.")
ATTENTION = flags.DEFINE_list("attention", [], "Methods to put into all layers. None: as the model was trained.")
K = flags.DEFINE_list("k", None, "Numbers of keys for each method; None: as many as eps can keep. 32 without eps.")
OPTION = flags.DEFINE_multi_string("option", [], "name=value for a field of AttentionSpec; may be repeated.")
SOURCE = flags.DEFINE_string("source", None, "Data to evaluate on, in place of the run's: folder:PATH, tfds:NAME, ...")
SPLIT = flags.DEFINE_string("split", None, "Split, in place of the run's evaluation split; slices such as test[:100].")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Examples at a time. None: as in training.")
OUT = flags.DEFINE_string("out", None, "Folder for the results.")
flags.mark_flag_as_required("checkpoint")


def main() -> None:
    config, params = load_trained(CHECKPOINT.value)
    options = {name: read_literal(text) for name, _, text in (item.partition("=") for item in OPTION.value)}
    fields = dataclasses.asdict(config.model.attention) | options
    bases = [
        from_config_dict(AttentionSpec, fields | {"k": read_literal(k)}, name="--k and --option")
        for k in K.value or ["32" if fields["eps"] is None else "None"]
    ]
    # Options by themselves go to the method that the model was trained with.
    methods = ATTENTION.value or ([bases[0].method] if OPTION.value or K.value else [])
    specs = list(expand(bases[0], methods, [base.k for base in bases])) or None
    config = config if SOURCE.value is None else on_source(config, SOURCE.value)
    source = open_source(config.data, SPLIT.value or config.data.eval_split)
    rows = evaluate_attention(config, params, specs, source=source, batch_size=BATCH_SIZE.value)
    print_table(rows)
    checkpoint = Path(CHECKPOINT.value)
    write_results(rows, OUT.value or (checkpoint if checkpoint.is_dir() else checkpoint.parent))


if __name__ == "__main__":
    run(main)
