"""From what is asked of eval.py to tables and files."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from levattn.analysis.results import write_results
from levattn.analysis.tables import print_by_layer, print_table
from levattn.attention import AttentionSpec
from levattn.data import Source, open_source
from levattn.models.pretrained import LoadOptions
from levattn.training.agreement import first_images
from levattn.training.attentions import Attention, attention_of, expand
from levattn.training.calibrate import calibrate, read_budgets, write_budgets
from levattn.training.classes import on_classes_of, read_classes
from levattn.training.config import EvalConfig, from_config_dict
from levattn.training.evaluate import evaluate_attention
from levattn.training.loaded import LoadedModel, load_model
from levattn.training.retrofit import evaluate_retrofit
from levattn.training.trained import split_step
from levattn.training.workdir import prepare_workdir

BUDGETS_FILE = "budgets.json"


def run_evaluation(config: EvalConfig) -> None:
    """Evaluates or calibrates a trained model, prints a table, and writes it with its provenance.

    An evaluation writes `results.csv`, `results.md` and `results.json`, a calibration `budgets.json`.

    Args:
      config: What to do.

    Raises:
      OSError: The model, the data or the budgets are missing, or the folder for the results cannot be written.
      ValueError: Something does not fit something else; the message says what.
    """
    trained = load_model(
        config.checkpoint,
        config.source,
        config.split,
        LoadOptions(config.image_size, allow_zero_head=config.probe is not None, arch=config.arch),
    )
    out = _folder_for_results(config, trained)
    data = trained.config.data
    source = open_source(data, data.eval_split)
    attentions = chosen_attentions(config, trained)
    if config.probe is None and config.calibrate is None:
        _refuse_without_classes(trained, config.checkpoint)
        listed = () if config.classes is None else read_classes(config.classes)
        trained = on_classes_of(trained, source, listed)
    print(describe_model(trained))
    print(f"{trained.name}: {len(source)} images of {source.name}, split {source.split}", flush=True)
    prepare_workdir(out, flag="out")  # before the work that would be lost
    if config.calibrate is not None:
        _calibrate(config, trained, attentions[0], source, out)
    elif config.probe is not None:
        rows, layers = evaluate_retrofit(
            trained, attentions, source=source, config=config.probe, batch_size=config.batch_size
        )
        print_table(rows)
        print_by_layer("relative error of each layer's attention", layers)
        write_results(rows, out, error_by_layer=layers)
    else:
        run, params = trained.config, trained.params
        rows = evaluate_attention(run, params, attentions, source=source, batch_size=config.batch_size)
        rows = [row | {"model": trained.name} for row in rows]
        print_table(rows)
        write_results(rows, out)


def describe_model(trained: LoadedModel) -> str:
    """What a model was taken to be, for people: how much of it is a guess, and what was chosen."""
    model, data, dims = trained.config.model, trained.config.data, trained.config.model.dims
    marks = dict.fromkeys(trained.guessed, " (a guess)")
    mean, std = (", ".join(f"{x:.3g}" for x in values) for values in (data.mean, data.std))
    size = "its own size" if data.image_size is None else f"{data.image_size} x {data.image_size} pixels"
    size += marks.get("shape of images", "")
    lines = [
        f"{trained.name}: {model.variant}, {dims.depth} blocks, width {dims.width}, {dims.num_heads} heads"
        f"{marks.get('heads', '')}, {model.activation}{marks.get('activation', '')}, output: "
        f"{trained.head or 'features'}{marks.get('head', '')}",
        f"{trained.name}: images at {size}, cut from a short side of {data.eval_resize or data.image_size or 'that'}, "
        f"{data.interpolation}{marks.get('resize', '')}, mean {mean}, std {std}{marks.get('mean and std', '')}",
        *(f"{trained.name}: {note}" for note in trained.notes),
    ]
    if marks:
        lines.append(
            f"{trained.name}: no config and no published name tells what is a guess: keep the JSON that was published "
            "with it (config.json, preprocessor_config.json) beside the file, or (timm, transformers ViT, open_clip) "
            "name what it was trained as: --arch=deit_small_patch16_224"
        )
    return "\n".join(lines)


def _folder_for_results(config: EvalConfig, trained: LoadedModel) -> Path:
    if config.out:
        return Path(config.out)
    checkpoint, step = split_step(Path(config.checkpoint).expanduser())
    if step is not None:  # nothing goes into a checkpoint: its manifest says what is there
        return checkpoint / f"step-{step}"
    if not checkpoint.exists():  # a repository in a cache, where nothing else is to be put
        return Path("runs") / trained.name
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def chosen_attentions(config: EvalConfig, trained: LoadedModel) -> list[Attention]:
    """The attentions that are asked for: every method with every k, then the budgets; by default that of the model.

    Raises:
      ValueError: A field of the attention that cannot be used, an unknown method.
    """
    own = attention_of(trained.config.model)
    first = own[0] if isinstance(own, tuple) else own
    if config.k and config.option.get("k_per_head") is not None:
        raise ValueError("k and option k_per_head must not both be given: k_per_head goes in place of k")
    own_budgets = {"k_per_head": None} if config.k else {}
    fields = dataclasses.asdict(first) | own_budgets | config.option
    needs_k = fields["eps"] is None and fields["k_per_head"] is None
    bases = [
        from_config_dict(AttentionSpec, fields | {"k": k}, name="--k and --option")
        for k in config.k or (32 if needs_k else None,)
    ]
    # Options by themselves go to the method that the model was trained with.
    methods = config.attention or ([bases[0].method] if config.option or config.k else [])
    attentions: list[Attention] = list(expand(bases[0], methods, [base.k for base in bases])) or [own]
    return attentions if config.budgets is None else [*attentions, read_budgets(config.budgets)]


def _refuse_without_classes(trained: LoadedModel, checkpoint: str | os.PathLike) -> None:
    if not trained.is_classifier:
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} has no classes, it gives {trained.head or 'feature'} vectors: judge those "
            f"by --config=configs/retrofit.py:probe={checkpoint},source=..."
        )


def _calibrate(config: EvalConfig, trained: LoadedModel, spec: Attention, source: Source, out: Path) -> None:
    if isinstance(spec, tuple):
        raise ValueError("calibrate needs one attention for all layers to start from: name it with --attention")
    images = first_images(source, trained.config.data, config.calibrate)
    budgets = calibrate(
        trained.config.model,
        trained.params,
        images,
        spec,
        classifier=trained.is_classifier,
        by_head=config.calibrate_heads,
        target_error=config.target_error,
        seed=trained.config.seed,
    )
    columns: dict[str, Any] = {
        "k": budgets.k,
        "error": budgets.error,
        f"error, k={spec.k}": budgets.uniform_error,
        "influence": budgets.influence,
    }
    each = "layer and head" if config.calibrate_heads else "layer"
    print_by_layer(f"{spec.method}, k by {each}: {np.mean(budgets.k):g} on average", columns)
    asked = "" if budgets.num_images == config.calibrate else f", all there are: {config.calibrate} were asked for"
    print(f"calibrated on {budgets.num_images} images{asked}")
    uniform = f"{budgets.uniform_cosine:.4f} with k={spec.k} in every layer"
    print(f"cosine of the embedding to dense attention: {budgets.cosine:.4f}; {uniform}")
    if all(layer == spec for layer in budgets.attention):
        print(f"no other choice came nearer to dense attention: k={spec.k} is kept in every layer")
    write_budgets(out / BUDGETS_FILE, budgets)
    print(f"written to {out / BUDGETS_FILE}: evaluate it with --budgets")
