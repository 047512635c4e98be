"""Sets prepared as ArrayRecord files are read without TensorFlow, ImageNet's official archives included."""

import dataclasses
import importlib.util
import io
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from levattn.data import DataConfig, ImageError, eval_batches, open_source, train_batches

tfds = pytest.importorskip("tensorflow_datasets")


def jpeg(seed, size=(30, 20)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        file, "JPEG"
    )
    return file.getvalue()


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["ant", "bee"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": jpeg(number), "label": number % 2}


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def tiny_photos(data_dir):
    TinyPhotos(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return DataConfig(source="tfds:tiny_photos", image_size=16, crop="random_resized", flip=True)


def load_script():
    path = Path(__file__).parent.parent / "scripts" / "prepare_imagenet.py"
    spec = importlib.util.spec_from_file_location("prepare_imagenet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) if isinstance(path, Path) else tarfile.open(fileobj=path, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_image_bytes_and_labels_come_back_as_they_went_in(tiny_photos):
    source = open_source(tiny_photos, "train")
    label_of = {jpeg(number): number % 2 for number in range(12)}
    assert {source[i]["image"]: source[i]["label"] for i in range(12)} == label_of
    assert source.class_names == ("ant", "bee")
    assert "tensorflow" not in sys.modules


def test_slices_and_batches_work_as_for_any_source(tiny_photos):
    source = open_source(tiny_photos, "train")
    part = open_source(tiny_photos, "train[25%:75%]")
    assert [part[i] for i in range(6)] == [source[i] for i in range(3, 9)]
    assert part.fingerprint != source.fingerprint
    batches = train_batches(source, tiny_photos, global_batch_size=4, seed=0)
    assert next(batches)["image"].shape == (4, 16, 16, 3)
    batches.close()
    assert sum(batch["mask"].sum() for batch in eval_batches(source, tiny_photos, batch_size=5)) == 12


@pytest.mark.slow
def test_worker_processes_read_the_same_records(tiny_photos):
    config = dataclasses.replace(tiny_photos, num_workers=1)
    streams = [train_batches(open_source(c, "train"), c, global_batch_size=4, seed=0) for c in (tiny_photos, config)]
    for _ in range(3):
        threads, processes = (next(stream) for stream in streams)
        np.testing.assert_array_equal(threads["image"], processes["image"])
    for stream in streams:
        stream.close()


def test_a_set_that_is_not_prepared_says_how_to_prepare_it(data_dir):
    with pytest.raises(FileNotFoundError, match=r"scripts/prepare_imagenet\.py imagenet2012"):
        open_source(DataConfig(source="tfds:imagenet2012"), "train")
    with pytest.raises(FileNotFoundError, match="tfds build cifar10 --file_format=array_record"):
        open_source(DataConfig(source="tfds:cifar10"), "train")


def test_an_unknown_split_is_refused_with_those_there_are(tiny_photos):
    with pytest.raises(ValueError, match=r"must be one of .*test"):
        open_source(tiny_photos, "validation")


def test_imagenet_is_prepared_from_its_official_archives(tmp_path, data_dir):
    archives = tmp_path / "archives"
    archives.mkdir()
    with pytest.raises(FileNotFoundError, match="ILSVRC2012"):
        load_script().prepare("imagenet2012", archives, data_dir)

    classes = {}
    for label, name in ((1, "n01443537"), (0, "n01440764")):
        inner = io.BytesIO()
        write_tar(inner, {f"{name}_{number}.JPEG": jpeg(10 * label + number) for number in range(3)})
        classes[f"{name}.tar"] = inner.getvalue()
    write_tar(archives / "ILSVRC2012_img_train.tar", classes)
    # Stored out of order: the labels belong to the sorted names.
    write_tar(archives / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(20 + n) for n in (3, 1, 2)})
    load_script().prepare("imagenet2012", archives, data_dir)

    config = DataConfig(source="tfds:imagenet2012", image_size=16, eval_resize=18)
    train = open_source(config, "train")
    assert train.num_classes == 1000
    expected = {jpeg(10 * label + number): label for label in (0, 1) for number in range(3)}
    assert {train[i]["image"]: train[i]["label"] for i in range(6)} == expected
    validation = open_source(config, "validation")
    # The first three validation labels of the challenge: n01751748, n09193705, n02105855.
    names = [validation.class_names[validation[i]["label"]] for i in range(3)]
    by_image = {validation[i]["image"]: names[i] for i in range(3)}
    assert [by_image[jpeg(20 + n)] for n in (1, 2, 3)] == ["n01751748", "n09193705", "n02105855"]
    assert next(eval_batches(validation, config, batch_size=3))["image"].shape == (3, 16, 16, 3)


def test_imagenet_v2_keeps_the_numeric_class_of_its_folders(tmp_path, data_dir):
    folder = "imagenetv2-matched-frequency-format-val"
    members = {f"{folder}/{label}/a{label}.jpeg": jpeg(label) for label in (0, 7, 999)}
    write_tar(tmp_path / "imagenetv2-matched-frequency.tar.gz", members, "w:gz")
    load_script().prepare("imagenet_v2", tmp_path, data_dir)
    source = open_source(DataConfig(source="tfds:imagenet_v2"), "test")
    assert {source[i]["label"]: source[i]["image"] for i in range(3)} == {label: jpeg(label) for label in (0, 7, 999)}
    assert "tensorflow" not in sys.modules


def test_a_damaged_record_is_found_by_its_checksum_and_named(tiny_photos, data_dir):
    (file,) = data_dir.rglob("*train.array_record*")
    data = bytearray(file.read_bytes())
    data[data.index(jpeg(3)[-50:]) + 20] ^= 1
    file.write_bytes(data)
    source, damaged = open_source(tiny_photos, "train"), []
    for index in range(len(source)):
        try:
            source[index]
        except ImageError as error:
            damaged.append(str(error))
    assert damaged
    assert re.fullmatch(r"tfds:tiny_photos train record \d+: .*orrupt.*; prepare the set again", damaged[0])
