"""What is left of a trained model when its attention is replaced, with no training at all."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from levattn.attention import AttentionSpec
from levattn.data import Source, open_source
from levattn.training.agreement import cosine_similarity, first_images, layer_errors, top1_agreement
from levattn.training.attentions import Attention, describe
from levattn.training.config import ProbeConfig
from levattn.training.evaluate import prepare
from levattn.training.features import embed
from levattn.training.loaded import LoadedModel
from levattn.training.probe import DEFAULTS, ProbeResult, TooFewImages, probe

DENSE = AttentionSpec("dense")


def evaluate_retrofit(
    trained: LoadedModel,
    attentions: Sequence[Attention],
    *,
    source: Source | None = None,
    config: ProbeConfig = DEFAULTS,
    batch_size: int | None = None,
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Compares a model under each attention with itself under dense attention, by its features.

    Labels are needed for the probes alone: a source whose images are all of one class, such as a folder with one
    subfolder, counts as unlabelled and gets no probe.

    Args:
      trained: The model.
      attentions: What to put into the layers. Dense attention is always compared with.
      source: The images; None: the evaluation split of `trained`.
      config: Of the probes.
      batch_size: Images at a time; None: as in training.

    Returns:
      One row an attention: dataset, model, tokens, attention, k, options, trained_with, examples, seconds,
      ms_per_image, cosine (mean similarity of the embedding to that under dense attention), agreement (share of images
      that get the same class; of classifiers only), error (mean over the layers of the relative error of the
      attention output), and where there are labels probe, probe_std and knn, see `levattn.training.probe.probe`.
      Then the relative error of each layer, by the name of the attention and the mean number of keys.

    Raises:
      ValueError: Images that do not fit the model; k exceeds the tokens.

    Warns:
      UserWarning: Too few images of a class for the folds: the rows have no probe.
    """
    data, model, params = trained.config.data, trained.config.model, trained.params
    source = open_source(data, data.eval_split) if source is None else source
    attentions = [DENSE, *(attention for attention in attentions if describe(attention) != "dense")]
    models, params, rows = prepare(trained.config, params, attentions, source)
    outputs, labels = embed(
        trained.config,
        params,
        models,
        source,
        classifier=trained.is_classifier,
        batch_size=batch_size or trained.config.batch_size // trained.config.accumulate_steps,
    )
    images = first_images(source, data, config.error_images)
    errors = np.sqrt(layer_errors(model, trained.params, images, attentions, seed=trained.config.seed))
    dense = outputs[0]
    for row, output, error in zip(rows, outputs, errors, strict=True):
        row |= {
            "model": trained.name,
            "examples": len(labels),
            "seconds": output.seconds,
            "ms_per_image": 1000 * output.seconds / len(labels),
            "cosine": float(cosine_similarity(output.embedding, dense.embedding).mean()),
            "error": float(error.mean()),
        }
        if dense.predicted is not None:
            row["agreement"] = top1_agreement(output.predicted, dense.predicted)
    results = _probe([output.embedding for output in outputs], labels, config)
    if results is not None:
        for row, result in zip(rows, results, strict=True):
            row |= {"probe": result.linear, "probe_std": result.linear_std, "knn": result.knn}
    return rows, {
        _label(attention, row): error.tolist() for attention, row, error in zip(attentions, rows, errors, strict=True)
    }


def _probe(embeddings, labels, config: ProbeConfig) -> list[ProbeResult] | None:
    """None where the labels do not allow one: what needs none of them, and took the time, stands."""
    if len(np.unique(labels)) < 2:
        return None
    try:
        return probe(embeddings[0], embeddings, labels, config)
    except TooFewImages as error:
        warnings.warn(f"no probe: {error}", stacklevel=3)
        return None


def _label(attention: Attention, row: dict[str, Any]) -> str:
    name = f"{describe(attention)} k={row['k']}" if isinstance(attention, tuple) else describe(attention)
    return f"{name} {row['options']}".rstrip()
