"""Sets prepared by TensorFlow Datasets as ArrayRecord files, read without TensorFlow."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from levattn.data.errors import ImageError, unknown_name
from levattn.data.sources.base import Example, Source
from levattn.data.splits import Split

_SCRIPTED = ("imagenet2012", "imagenet_v2")


@dataclass(frozen=True, repr=False, eq=False)
class RecordSource(Source):
    """Records with the features `image` and `label`; images stay encoded."""

    records: Sequence[Any]
    facts: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self.records[index]
        except (RuntimeError, ValueError, LookupError, OSError) as error:  # the checksums of the file do not hold
            raise ImageError(f"{self.describe(index)}: {error}; prepare the set again") from error
        return {"image": bytes(record["image"]), "label": int(record["label"])}

    def describe(self, index: int) -> str:
        return f"{self.name} {self.split} record {index}"

    def _facts(self) -> Iterator[bytes]:
        yield self.facts.encode()


def open_tfds(argument: str, split: Split) -> RecordSource:
    """Opens `tfds:NAME`, `tfds:NAME/CONFIG` or `tfds:NAME/CONFIG:VERSION` in $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Only files are read: the code that prepared the set is not loaded, so any prepared set will do.
    """
    # Slow to import, and only needed here.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    if not argument:
        raise ValueError("source='tfds:' needs the name of a data set, such as tfds:imagenet2012")
    try:
        builder = builder_from_files(argument, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(f"source='tfds:{argument}' is not prepared. {_how_to_prepare(argument)}") from error
    info = builder.info
    if split.name not in info.splits:
        raise unknown_name("split", split.name, info.splits)
    if missing := {"image", "label"} - set(info.features):
        raise ValueError(f"source='tfds:{argument}' has no {' and no '.join(sorted(missing))} among {[*info.features]}")
    part = split.slice(info.splits[split.name].num_examples)
    try:
        records = builder.as_data_source(
            f"{split.name}[{part.start}:{part.stop}]", decoders={"image": tfds.decode.SkipDecoding()}
        )
    except NotImplementedError as error:
        raise ValueError(
            f"source='tfds:{argument}' in {builder.data_path} is not stored as ArrayRecord. {_how_to_prepare(argument)}"
        ) from error
    shape = info.features["image"].shape
    return RecordSource(
        name=f"tfds:{argument}",
        split=split,
        class_names=tuple(info.features["label"].names),
        image_shape=None if None in shape else shape,
        num_channels=shape[-1] or 3,
        records=records,
        facts=json.dumps([info.full_name, split.name, part.start, part.stop, info.splits[split.name].shard_lengths]),
    )


def _how_to_prepare(argument: str) -> str:
    name = argument.partition("/")[0].partition(":")[0]
    if name in _SCRIPTED:
        command = f"python scripts/prepare_imagenet.py {name} --archives FOLDER_OF_TAR_FILES"
    else:
        command = f"tfds build {name} --file_format=array_record"
    return f"Prepare it once with `{command}`, or set TFDS_DATA_DIR to the folder that holds it"
