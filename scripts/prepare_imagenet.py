"""Prepares ImageNet-1k or ImageNet-V2 for `tfds:imagenet2012` and `tfds:imagenet_v2`, without TensorFlow.

    python scripts/prepare_imagenet.py imagenet2012 --archives /downloads
    python scripts/prepare_imagenet.py imagenet_v2 --archives /downloads

/downloads holds the official archives: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from
https://image-net.org/download-images (either is enough for its split), or imagenetv2-matched-frequency.tar.gz from
https://huggingface.co/datasets/vaishaal/ImageNetV2. Files go to --data_dir ($TFDS_DATA_DIR, else
~/tensorflow_datasets); ImageNet-1k needs 150 GB there and as much again while it is being shuffled.

Names, labels and the order of examples are those of TensorFlow Datasets, so that sets prepared by it serve as well.
Image bytes are kept as they are, where TensorFlow Datasets re-encodes 22 CMYK files and one PNG: levattn.data
decodes these too.
"""

import argparse
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

Examples = Iterator[tuple[str, dict[str, object]]]


def _features() -> tfds.features.FeaturesDict:
    names_file = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names_file=names_file),
            "file_name": tfds.features.Text(),
        }
    )


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile():
            yield member.name, archive.extractfile(member).read()


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """ImageNet-1k from the official tar files."""

    VERSION = tfds.core.Version("5.1.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = __doc__

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=_features(), homepage="https://image-net.org/")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        train = Path(dl_manager.manual_dir) / "ILSVRC2012_img_train.tar"
        validation = Path(dl_manager.manual_dir) / "ILSVRC2012_img_val.tar"
        splits = {}
        if train.is_file():
            splits["train"] = self._generate_examples(train)
        if validation.is_file():
            splits["validation"] = self._generate_validation(validation)
        return splits

    def _generate_examples(self, path: Path) -> Examples:
        with tarfile.open(path) as archive:
            for class_tar, data in _members(archive):  # One tar for each class, of at most 250 MB.
                with tarfile.open(fileobj=io.BytesIO(data)) as images:
                    for name, image in _members(images):
                        yield name, {"image": image, "label": Path(class_tar).stem, "file_name": name}

    def _generate_validation(self, path: Path) -> Examples:
        # The labels belong to the file names in alphabetic order.
        labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
        with tarfile.open(path) as archive:
            names = sorted(member.name for member in archive if member.isfile())
        label_of = dict(zip(names, labels, strict=False))
        with tarfile.open(path) as archive:
            for name, image in _members(archive):
                yield name, {"image": image, "label": label_of[name], "file_name": name}


class ImagenetV2(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The matched-frequency test set of ImageNet-V2 (Recht et al., 2019), 10,000 images."""

    VERSION = tfds.core.Version("3.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = __doc__
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="matched-frequency")]  # noqa: RUF012 (TFDS reads a list)

    def _info(self) -> tfds.core.DatasetInfo:
        homepage = "https://github.com/modestyachts/ImageNetV2"
        return tfds.core.DatasetInfo(builder=self, features=_features(), homepage=homepage)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        path = Path(dl_manager.manual_dir) / "imagenetv2-matched-frequency.tar.gz"
        return {"test": self._generate_examples(path)} if path.is_file() else {}

    def _generate_examples(self, path: Path) -> Examples:
        with tarfile.open(path) as archive:
            for member, image in _members(archive):  # .../CLASS_NUMBER/NAME.jpeg
                *_, label, name = Path(member).parts
                yield f"{label}_{name}", {"image": image, "label": int(label), "file_name": f"{label}/{name}"}


def prepare(name: str, archives: Path, data_dir: Path | None) -> tfds.core.DatasetInfo:
    """Writes one set as ArrayRecord files; a set that is there already is left alone.

    Raises:
      FileNotFoundError: when `archives` holds none of the set's archives.
    """
    builder = {"imagenet2012": Imagenet2012, "imagenet_v2": ImagenetV2}[name](
        data_dir=data_dir, file_format="array_record"
    )
    expected = {"imagenet2012": "ILSVRC2012_img_*.tar", "imagenet_v2": "imagenetv2-matched-frequency.tar.gz"}[name]
    if not any(archives.glob(expected)):
        raise FileNotFoundError(f"--archives {archives} holds no {expected}; see --help for where to get it")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(archives)))
    return builder.info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["imagenet2012", "imagenet_v2"])
    parser.add_argument("--archives", type=Path, required=True, help="folder with the official archives")
    parser.add_argument("--data_dir", type=Path, default=os.environ.get("TFDS_DATA_DIR"))
    args = parser.parse_args()
    info = prepare(args.name, args.archives, args.data_dir)
    for split in info.splits.values():
        print(f"{info.full_name} {split.name}: {split.num_examples:,} examples in {len(split.filepaths)} files")
    print(f"in {info.data_dir}")


if __name__ == "__main__":
    main()
