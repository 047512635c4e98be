"""A classifier on a data set that has some of its classes: which outputs are theirs, and the head of these alone."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import PyTree

from levattn.data import Source
from levattn.training.loaded import LoadedModel

_IMAGENET = 1000  # the only published heads of so many outputs, in the order of the WordNet ids
_HEADS = ("head", "head_dist")


def on_classes_of(trained: LoadedModel, source: Source, listed: Sequence[str] = ()) -> LoadedModel:
    """The classifier with the outputs of the classes of a data set, in their order; the others cannot be predicted.

    So a head of ImageNet-1k is judged on Imagenette, ImageNet-A or -R as is usual: argmax over the classes that there
    are. Classes are found by name: a WordNet id among 1,000 outputs, or what the config beside a checkpoint calls them.

    Args:
      trained: A classifier.
      source: The data set.
      listed: Which output each class of the data set is, in the order of its class names: a number from 0, or a name.
        Empty: by the names of the data set's classes; where these are not the model's, both must have as many classes,
        and are then taken to have the same.

    Raises:
      ValueError: It is not told which of the outputs the classes are, a name is unknown or ambiguous, or two classes
        are one output.
    """
    model = trained.config.model
    numbers, names = _numbers_of(trained), listed or source.class_names
    found = [_find(name, numbers, model.num_classes if listed else 0) for name in names]
    if listed and len(listed) != source.num_classes:
        raise ValueError(
            f"classes lists {len(listed)} outputs, and {source.name} has {source.num_classes} classes: list one for "
            "each, in the order of their sorted names"
        )
    unknown = [name for name, number in zip(names, found, strict=True) if number is None]
    if unknown and not listed and source.num_classes == model.num_classes:
        return trained
    if unknown:
        raise ValueError(
            f"{source.name} has {source.num_classes} classes, the checkpoint was trained on {model.num_classes}, and "
            f"neither WordNet ids nor a config beside the checkpoint tell which output {unknown[0]!r} is: give "
            "--classes=FILE with a line for each class of the data set, in the order of their sorted names: the number "
            "of its output, from 0, or the model's name for it"
        )
    if twice := [number for number, count in collections.Counter(found).items() if count > 1]:
        raise ValueError(f"output {twice[0]} would be {found.count(twice[0])} classes of {source.name}: list each once")
    if found == list(range(model.num_classes)):
        return trained
    config = dataclasses.replace(trained.config, model=dataclasses.replace(model, num_classes=len(found)))
    note = f"{len(found)} of its {model.num_classes} classes can be predicted: those of {source.name}"
    params = _of_outputs(trained.params, found)
    return dataclasses.replace(trained, config=config, params=params, class_names=None, notes=(*trained.notes, note))


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The lines of a file that `on_classes_of` takes; empty ones are left out.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is empty, or no text.
    """
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"classes={str(path)!r} is no text: {error}") from error
    if not any(lines):
        raise ValueError(f"classes={str(path)!r} is empty: a line for each class of the data set")
    return tuple(filter(None, lines))


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k, in the order of the outputs."""
    return tuple(Path(__file__).with_name("imagenet_classes.txt").read_text().split())


def _numbers_of(trained: LoadedModel) -> Mapping[str, int]:
    """Names to outputs. Those that say several things ("tench, Tinca tinca") go by each; those of two by none."""
    numbers: dict[str, set[int]] = collections.defaultdict(set)
    for number, name in enumerate(trained.class_names or ()):
        for part in {name, *name.split(",")}:
            numbers[_plain(part)].add(number)
    if trained.config.model.num_classes == _IMAGENET:
        for number, name in enumerate(imagenet_classes()):
            numbers[name].add(number)
    return {name: found.pop() for name, found in numbers.items() if len(found) == 1}


def _find(name: str, numbers: Mapping[str, int], num_outputs: int) -> int | None:
    """The output of a class: by its name, or its number where it is below `num_outputs`."""
    if name.isdecimal() and int(name) < num_outputs:
        return int(name)
    return numbers.get(_plain(name))


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _of_outputs(params: PyTree, outputs: Sequence[int]) -> PyTree:
    heads = {name: params[name] for name in _HEADS if name in params}
    kept = {name: {leaf: array[..., list(outputs)] for leaf, array in head.items()} for name, head in heads.items()}
    return {**params, **kept}
