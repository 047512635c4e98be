"""A published checkpoint as a model of this project."""

import dataclasses
import math
import os

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from levattn.models.config import patch_grid
from levattn.models.pretrained.files import read_content
from levattn.models.pretrained.layout import Content, Layout, Pretrained
from levattn.models.pretrained.layouts import LAYOUTS
from levattn.models.pretrained.posemb import Resize, resize_positions
from levattn.models.pretrained.shapes import param_shapes
from levattn.models.pretrained.tensors import Tensors


def read_pretrained(
    path: str | os.PathLike, *, image_size: int | None = None, allow_zero_head: bool = False
) -> Pretrained:
    """Reads a checkpoint that somebody else published.

    What its names and shapes leave open (heads, the activation, normalisation of the input) is taken from the config
    beside it and from its name, so keep both as they were published.

    Args:
      path: As for `levattn.models.pretrained.files.read_content`: a file, or a folder as Hugging Face has them.
      image_size: Side in pixels of the images to come, if not as published: position embeddings are resized as the
        family's own code does it, and the preprocessing in proportion.
      allow_zero_head: Take a head that is all zeros, which is published where there is no trained one.

    Returns:
      The model with dense attention, its parameters as NumPy arrays in float32, and the input it expects.

    Raises:
      FileNotFoundError: There is nothing to read.
      ValueError: Not a checkpoint that is known here, or one that does not fit the model it is of; lists all of that.
    """
    return convert(read_content(path), image_size=image_size, allow_zero_head=allow_zero_head)


def convert(content: Content, *, image_size: int | None = None, allow_zero_head: bool = False) -> Pretrained:
    """`read_pretrained` from where the file has been read."""
    layout = _layout_of(content)
    tensors = Tensors(content.arrays)
    model, params, preprocess, head = layout.convert(tensors, content)
    tensors.finish(layout.name)
    zero = [name for name in ("head/kernel", "head_dist/kernel") if name in params and not np.any(params[name])]
    if zero and not allow_zero_head:
        raise ValueError(
            f"{str(content.path)!r}: {zero[0]} is all zeros, so every class gets the same logit: the checkpoint was "
            "published for fine-tuning, without a trained head. Take one that was fine-tuned, or allow_zero_head=True "
            "for its features"
        )
    pretrained = Pretrained(model, unflatten_dict(params, sep="/"), preprocess, head, layout.name, content.name)
    pretrained = with_image_size(pretrained, image_size or preprocess.image_size, layout.resize)
    _check(pretrained)
    return pretrained


def with_image_size(pretrained: Pretrained, image_size: int, method: Resize) -> Pretrained:
    """The model for images of another size: its position embeddings resized, its preprocessing in proportion.

    Args:
      pretrained: Of square images.
      image_size: Side in pixels of the images to come.
      method: How to interpolate, see `levattn.models.pretrained.posemb.resize_matrix`.

    Raises:
      ValueError: If the patch does not divide the image.
    """
    preprocess, params = pretrained.preprocess, dict(pretrained.params)
    grid = patch_grid(pretrained.model, (image_size, image_size, 3))
    if "pos_embedding" in params:
        side = math.isqrt(params["pos_embedding"].shape[1])
        params["pos_embedding"] = resize_positions(params["pos_embedding"], (side, side), grid, method)
    if image_size != preprocess.image_size:
        resize = round(preprocess.resize * image_size / preprocess.image_size)
        preprocess = dataclasses.replace(preprocess, image_size=image_size, resize=resize)
    return dataclasses.replace(pretrained, params=params, preprocess=preprocess)


def _layout_of(content: Content) -> Layout:
    for layout in LAYOUTS:
        if layout.recognises(content):
            return layout
    names = list(content.arrays)
    sample = "\n  ".join(f"{name} {content.arrays[name].shape}" for name in names[:8])
    raise ValueError(
        f"{str(content.path)!r} is of no layout that is known here ({', '.join(layout.name for layout in LAYOUTS)}): "
        f"among its {len(names)} tensors are\n  {sample}\n"
        "Only plain Vision Transformers are read. A new layout is one file in levattn/models/pretrained/layouts"
    )


def _check(pretrained: Pretrained) -> None:
    """Raises, once, whatever keeps the parameters from being those of the model."""
    params = flatten_dict(pretrained.params, sep="/")
    kernel = params.get("embedding/kernel", np.zeros((0, 0, 3)))
    shapes = param_shapes(pretrained.model, pretrained.preprocess.image_size, kernel.shape[2])
    problems = []
    for name in shapes | params:
        if name not in params:
            problems.append(f"{name} {shapes[name]} is missing")
        elif name not in shapes:
            problems.append(f"{name} {params[name].shape} is not in the model")
        elif params[name].shape != shapes[name]:
            problems.append(f"{name} is {params[name].shape}, not {shapes[name]}")
    if problems:
        what = f"recognised as {pretrained.layout}, but the parameters do not fit the model {pretrained.model}:"
        raise ValueError("\n  ".join([what, *problems]))
