"""A published checkpoint as a model of this project."""

import dataclasses
import math
import os
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from levattn.models.config import ModelConfig, patch_grid
from levattn.models.pretrained.files import read_content
from levattn.models.pretrained.hub_config import class_names
from levattn.models.pretrained.layout import AS_PUBLISHED, Content, ImageSize, Layout, LoadOptions, Pretrained, sides_of
from levattn.models.pretrained.layouts import LAYOUTS
from levattn.models.pretrained.posemb import Resize, resize_positions
from levattn.models.pretrained.shapes import param_shapes
from levattn.models.pretrained.tensors import Tensors, find_nonfinite

# What training code puts before all names: wrappers of models, and the attribute that holds one.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
# Where an average of the weights over training stands beside them.
_AVERAGES = ("ema_model.module.", "ema_model.", "model_ema.module.", "model_ema.", "ema.module.", "ema.")


def read_pretrained(path: str | os.PathLike, options: LoadOptions = AS_PUBLISHED) -> Pretrained:
    """Reads a checkpoint that somebody else published.

    What its names and shapes leave open (heads, the activation, normalisation of the input) is taken from the config
    beside it and from its name, so keep both as they were published.

    Args:
      path: As for `levattn.models.pretrained.files.read_content`: a file, or a folder as Hugging Face has them.
      options: What is not to be as published, and what the file leaves open.

    Returns:
      The model with dense attention, its parameters as NumPy arrays in float32, and the input it expects.

    Raises:
      FileNotFoundError: There is nothing to read.
      ValueError: Not a checkpoint that is known here, or one that does not fit the model it is of; lists all of that.
    """
    return convert(read_content(path), options)


def convert(content: Content, options: LoadOptions = AS_PUBLISHED) -> Pretrained:
    """`read_pretrained` from where the file has been read."""
    arrays, notes = _without_wrappers(content.arrays)
    content = dataclasses.replace(content, arrays=arrays, options=options)
    layout, arch = _layout_of(content), options.arch
    if arch is not None and not layout.takes_arch:
        raise ValueError(
            f"{str(content.path)!r}: {arch=} tells nothing of a model of {layout.name}; its file and the config.json "
            "beside it do"
        )
    tensors = Tensors(content.arrays)
    if len(weights := content.metadata.get("training", {}).get("weights", [])) > 1:
        notes.append(f"it holds weights under {', '.join(weights)}: those under {weights[0]} are read")
    try:
        model, params, preprocess, head = layout.convert(tensors, content)
    except (AttributeError, LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{str(content.path)!r}: recognised as {layout.name}, but its tensors or the JSON beside it are not of the "
            f"form that these have there: {type(error).__name__}: {error}"
        ) from error
    tensors.finish(layout.name)
    zero = [name for name in ("head/kernel", "head_dist/kernel") if name in params and not np.any(params[name])]
    if zero and not options.allow_zero_head:
        raise ValueError(
            f"{str(content.path)!r}: {zero[0]} is all zeros, so every class gets the same logit: the checkpoint was "
            "published for fine-tuning, without a trained head. Take one that was fine-tuned, or allow_zero_head=True "
            "for its features"
        )
    pretrained = Pretrained(
        model,
        unflatten_dict(params, sep="/"),
        preprocess,
        head,
        layout.name,
        content.name,
        tuple(tensors.guessed),
        tuple(notes),
        class_names(content, model.num_classes) if head == "classifier" else None,
    )
    pretrained = with_image_size(pretrained, options.image_size or preprocess.image_size, layout.resize)
    recognised = f"recognised as {layout.name}"
    check_params(pretrained.model, pretrained.params, pretrained.preprocess.image_size, recognised)
    return pretrained


def warn_of_guesses(pretrained: Pretrained, path: str | os.PathLike, *, arch: str = "arch") -> None:
    """Warns whoever called the caller of what nothing told, and of what was chosen.

    Args:
      pretrained: What was read.
      path: From where.
      arch: What the option is called there that names the published model.
    """
    remarks = list(pretrained.notes)
    if pretrained.guessed:
        remarks.append(
            f"no config and no published name tells its {', '.join(pretrained.guessed)}: guessed. Keep the JSON that "
            "was published with it (config.json, preprocessor_config.json) beside the file, or (timm, transformers "
            f"ViT, open_clip) name the published model that it was trained as, as in {arch}='deit_small_patch16_224'"
        )
    if remarks:
        warnings.warn(f"{os.fspath(path)!r}: {'; '.join(remarks)}", stacklevel=3)


def _without_wrappers(arrays: Mapping[str, np.ndarray]) -> tuple[Mapping[str, np.ndarray], list[str]]:
    """The tensors without what training code put before all names; of two sets of weights the average alone."""
    notes = []
    while True:
        average = next((average for average in _AVERAGES if _is_average(average, arrays)), None)
        if average:
            notes.append(f"it holds the weights twice: those averaged over training, under {average!r}, are read")
            arrays = {name: array for name, array in arrays.items() if name.startswith(average)}
        wrapper = average or _wrapper(arrays)
        if not wrapper:
            return arrays, notes
        arrays = {name.removeprefix(wrapper): array for name, array in arrays.items()}


def _is_average(prefix: str, names: Collection[str]) -> bool:
    """Whether all weights that are not behind the prefix are behind it as well."""
    averaged = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    others = {name for name in names if not name.startswith(prefix.partition(".")[0] + ".")}
    return bool(averaged and others) and averaged >= {name.removeprefix(_wrapper(others)) for name in others}


def _wrapper(names: Collection[str]) -> str:
    return next((prefix for prefix in _WRAPPERS if names and all(name.startswith(prefix) for name in names)), "")


def with_image_size(pretrained: Pretrained, image_size: ImageSize, method: Resize) -> Pretrained:
    """The model for images of another size: its position embeddings resized, its preprocessing in proportion.

    Args:
      pretrained: With positions for the images of its preprocessing, or for square ones.
      image_size: In pixels, of the images to come.
      method: How to interpolate, see `levattn.models.pretrained.posemb.resize_matrix`.

    Raises:
      ValueError: If the patch does not divide the image.
    """
    preprocess, params = pretrained.preprocess, dict(pretrained.params)
    grid = patch_grid(pretrained.model, sides_of(image_size))
    if "pos_embedding" in params:
        old_grid, num = patch_grid(pretrained.model, sides_of(preprocess.image_size)), params["pos_embedding"].shape[1]
        if math.prod(old_grid) != num:  # DINOv2 has positions for other images than it is used at
            old_grid = math.isqrt(num), math.isqrt(num)
        params["pos_embedding"] = resize_positions(params["pos_embedding"], old_grid, grid, method)
    if image_size != preprocess.image_size:
        resize = round(preprocess.resize * min(sides_of(image_size)) / min(sides_of(preprocess.image_size)))
        preprocess = dataclasses.replace(preprocess, image_size=image_size, resize=resize)
    return dataclasses.replace(pretrained, params=params, preprocess=preprocess)


def _layout_of(content: Content) -> Layout:
    for layout in LAYOUTS:
        if layout.recognises(content):
            return layout
    names = list(content.arrays)
    kinds = content.metadata.get("config", {}).get("architectures")
    called = f"a {kinds[0]}, " if isinstance(kinds, list) and kinds else ""
    sample = "\n  ".join(f"{name} {content.arrays[name].shape}" for name in names[:8])
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(
        f"{str(content.path)!r} is {called}of no layout that is known here ({known}): "
        f"among its {len(names)} tensors are\n  {sample}\n"
        "Only plain Vision Transformers are read. A new layout is one file in levattn/models/pretrained/layouts"
    )


def check_params(model: ModelConfig, params: Mapping[str, Any], image_size: ImageSize, what: str) -> None:
    """Refuses parameters that are not those of a model, or not finite.

    Args:
      model: Of which they are to be.
      params: Nested, arrays of NumPy.
      image_size: In pixels, of the images that the position embeddings are for.
      what: Begins the message.

    Raises:
      ValueError: Listing everything that is missing, not in the model, misshapen, NaN or infinite.
    """
    params = flatten_dict(params, sep="/")
    kernel = params.get("embedding/kernel")
    channels = kernel.shape[2] if getattr(kernel, "ndim", 0) == 4 else 3
    try:
        shapes = param_shapes(model, image_size, channels)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{what}, but no arrays can have the sizes of {model}: {error}") from error
    problems = []
    for name in shapes | params:
        if name not in params:
            problems.append(f"{name} {shapes[name]} is missing")
        elif name not in shapes:
            problems.append(f"{name} {params[name].shape} is not in the model")
        elif params[name].shape != shapes[name]:
            problems.append(f"{name} is {params[name].shape}, not {shapes[name]}")
        elif problem := find_nonfinite(params[name]):
            problems.append(f"{name} {problem}")
    if problems:
        raise ValueError("\n  ".join([f"{what}, but the parameters do not fit the model {model}:", *problems]))
