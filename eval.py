"""Evaluates a trained model under any attention: `eval.py --checkpoint runs/a --attention dense,leverage --k 8,32`.

A data set that has some of the model's classes is judged on these: its folders are named by WordNet ids, or as the
config of the checkpoint names classes, or `--classes FILE` tells. Writes the table to the terminal and, as results.csv,
results.md and results.json, to `--out` (default: the workdir of the checkpoint). Further options of the attention:
`--option keep_prefix=1 --option local_window=3x3`. The same for frozen features, without classes: `--config
configs/retrofit.py:probe=CHECKPOINT,source=stamps`. A k for each layer from 32 images: `--attention leverage --k 32
--calibrate 32`, and then `--budgets OUT/budgets.json`.
"""

from absl import flags
from ml_collections import config_flags

from levattn.analysis.evaluation import run_evaluation
from levattn.training.cli import read_literal, run
from levattn.training.config import EvalConfig, from_config_dict

# Each flag is a field of `EvalConfig` and goes before what the config file says of it.
CONFIG = config_flags.DEFINE_config_file("config", None, "Of a probe.", lock_config=False, accept_new_attributes=True)
FLAGS = [
    flags.DEFINE_string("checkpoint", None, "Workdir of a run, an exported file, a published checkpoint; owner/name."),
    flags.DEFINE_string("arch", None, "Published model that tells heads, activation, input: vit_base_patch16_224, ..."),
    flags.DEFINE_list("attention", [], "Methods to put into all layers. None: as the model was trained."),
    flags.DEFINE_list("k", [], "Numbers of keys for each method; None: as many as eps can keep. 32 without eps."),
    flags.DEFINE_multi_string("option", [], "name=value for a field of AttentionSpec; may be repeated."),
    flags.DEFINE_string("budgets", None, "A budgets.json: its k by layer is evaluated beside the others."),
    flags.DEFINE_string("source", None, "Data, in place of the run's: stamps, folder:PATH, tfds:NAME, ..."),
    flags.DEFINE_string("split", None, "Split, in place of the run's evaluation split; slices such as test[:100]."),
    flags.DEFINE_integer("image_size", None, "Side of the images in pixels, if not as the model was trained."),
    flags.DEFINE_string("classes", None, "File: which output (number or name) each class of the data is, a line each."),
    flags.DEFINE_integer("batch_size", None, "Examples at a time. None: as in training."),
    flags.DEFINE_integer("calibrate", None, "Write budgets.json instead: a k for each layer, --k on average."),
    flags.DEFINE_boolean("calibrate_heads", None, "Calibrate a k for each head of each layer."),
    flags.DEFINE_float("target_error", None, "Calibrate to the smallest k of each layer with this relative error."),
    flags.DEFINE_string("out", None, "Folder for the results."),
]


def main() -> None:
    given = {flag.name: flag.value for flag in FLAGS if flag.present}
    if "k" in given:
        given["k"] = [read_literal(text) for text in given["k"]]
    if "option" in given:
        given["option"] = {name: read_literal(text) for name, _, text in (o.partition("=") for o in given["option"])}
    config = {} if CONFIG.value is None else CONFIG.value.to_dict()
    run_evaluation(from_config_dict(EvalConfig, config | given, name="the evaluation"))


if __name__ == "__main__":
    run(main)
