"""Every source gives the same kind of examples, says who it is, and refuses what it does not hold."""

import gzip
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from levattn.data import DataConfig, eval_batches, open_source
from levattn.data.sources import fashion_mnist, stamps


def open_named(source, split):
    return open_source(DataConfig(source=source), split)


def write_image(path, value, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number in range(10):
        for label, name in enumerate(("ant", "bee")):
            write_image(tmp_path / "pets" / "train" / name / f"{number}.{'png' if number % 2 else 'JPEG'}", label * 100)
    write_image(tmp_path / "pets" / "val" / "bee" / "inner" / "0.jpg", 100)
    (tmp_path / "pets" / "train" / "ant" / "notes.txt").write_text("not an image")
    return tmp_path / "pets"


@pytest.fixture
def idx_files(tmp_path, monkeypatch):
    images = np.arange(5 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(5, 28, 28)
    labels = np.array([9, 0, 3, 3, 1], np.uint8)
    for name, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    monkeypatch.setenv("LEVATTN_DATA", str(tmp_path))
    return tmp_path, images, labels


def test_digits_are_split_by_class_into_all_of_the_package():
    train, test = open_named("digits", "train"), open_named("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (8, 8, 1)
    assert train.images.max() == 255
    np.testing.assert_allclose(np.bincount(test.labels) / np.bincount(train.labels), 0.25, atol=0.01)
    both = {image.tobytes() for image in train.images} | {image.tobytes() for image in test.images}
    assert len(both) == len(np.unique(np.concatenate([train.images, test.images]), axis=0))
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


def test_fashion_mnist_is_read_from_idx_files(idx_files):
    _, images, labels = idx_files
    source = open_named("fashion_mnist", "test")
    assert len(source) == 5
    np.testing.assert_array_equal(source[2]["image"][:, :, 0], images[2])
    assert [source[i]["label"] for i in range(5)] == labels.tolist()
    assert source.class_names[9] == "Ankle boot"


def test_a_damaged_idx_file_is_named(idx_files):
    path = idx_files[0] / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="t10k-images"):
        open_named("fashion_mnist", "test")


def test_missing_fashion_mnist_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("LEVATTN_DATA", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        open_named("fashion_mnist", "train")


def test_a_folder_has_its_classes_sorted_and_every_image_once(folder):
    source = open_named(f"folder:{folder}", "train")
    assert source.class_names == ("ant", "bee")
    assert len(source) == 20
    assert sorted(source.files) == sorted(str(p.relative_to(folder / "train")) for p in folder.glob("train/*/*.[pJ]*"))
    batch = next(eval_batches(source, DataConfig(image_size=4), batch_size=20))
    np.testing.assert_array_equal(batch["image"].max(axis=(1, 2, 3)), batch["label"] * 100)


def test_slices_of_a_folder_are_disjoint_samples_of_all_classes(folder):
    first, rest = (open_named(f"folder:{folder}", f"train[{part}]") for part in (":50%", "50%:"))
    assert len(set(first.files) | set(rest.files)) == 20
    assert not set(first.files) & set(rest.files)
    assert set(first.labels.tolist()) == {0, 1}


def test_test_finds_the_val_folder_and_its_labels_are_those_of_train(folder):
    source = open_named(f"folder:{folder}", "test")
    assert [source[i]["label"] for i in range(len(source))] == [1]


def test_a_folder_without_splits_is_all_train(folder):
    source = open_named(f"folder:{folder / 'train'}", "train")
    assert len(source) == 20
    with pytest.raises(ValueError, match="split='test'") as error:
        open_named(f"folder:{folder / 'train'}", "test")
    assert "train[:90%]" in str(error.value)


def test_unusable_folders_are_refused_with_the_reason(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_named("folder:/nowhere", "train")
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match=r"source='folder:.*one folder of images for each class"):
        open_named(f"folder:{tmp_path / 'flat'}", "train")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"source='folder:.*cat"):
        open_named(f"folder:{tmp_path / 'hollow'}", "train")
    write_image(folder / "val" / "wasp" / "0.png", 0)
    with pytest.raises(ValueError, match=r"source='folder:.*wasp"):
        open_named(f"folder:{folder}", "val")


@pytest.fixture
def stamps_folder(tmp_path, monkeypatch):
    """Two stamps in each of the seven categories, of every kind that PNG knows, among what is left out."""
    monkeypatch.setenv("LEVATTN_DATA", str(tmp_path))
    for category in stamps.DEFAULT_CATEGORIES:
        for name in ("a.png", "deeper/b.png", "cartoon/drawn.png", "drawn.svg"):
            path = tmp_path / "stamps" / category / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((4, 10, 4), np.uint8)
            pixels[:, :5] = (200, 100, 0, 255)
            Image.fromarray(pixels).save(path, format="PNG")
    return tmp_path / "stamps"


def test_stamps_are_photographs_by_category_in_the_middle_of_a_white_square(stamps_folder):
    source = open_named("stamps", "train")
    assert source.class_names == ("mammals", "birds", "insects", "fruit", "flowers", "vegetables", "vehicles")
    assert len(source) == 14
    assert not [file for file in source.files if "cartoon" in file or file.endswith("svg")]
    for i in range(len(source)):
        assert f"/{source.class_names[source[i]['label']]}/" in f"/{source.files[i]}"
    expected = np.full((10, 10, 3), 255, np.uint8)
    expected[3:7, :5] = (200, 100, 0)
    np.testing.assert_array_equal(source[0]["image"], expected)


def test_half_transparent_grey_and_palette_stamps_are_laid_on_white(stamps_folder):
    folder = stamps_folder / "vehicles"
    (folder / "deeper" / "b.png").unlink()
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    grey = Image.new("LA", (2, 2), (0, 51))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 204, 204, 204])
    for image in (half, grey, palette):
        image.save(folder / "a.png")
        (pixels,) = (open_named("stamps:vehicles", "train")[i]["image"] for i in range(1))
        np.testing.assert_allclose(pixels, np.full((2, 2, 3), 204), atol=1)


def test_stamps_can_be_of_other_categories_and_their_slices_mix_the_classes(stamps_folder):
    source = open_named("stamps:food+animals/birds", "train")
    assert (source.class_names, len(source)) == (("food", "birds"), 6)
    halves = [open_named("stamps", split) for split in ("train[:50%]", "train[50%:]")]
    assert sorted(halves[0].files + halves[1].files) == sorted(open_named("stamps", "train").files)
    assert len(set(halves[0].labels.tolist())) > 3
    with pytest.raises(ValueError, match="did you mean 'animals/birds'"):
        open_named("stamps:animals/bird", "train")
    with pytest.raises(ValueError, match="split='test' must be one of train"):
        open_named("stamps", "test")


def test_missing_stamps_say_what_to_install_and_a_damaged_one_its_name(stamps_folder, tmp_path, monkeypatch):
    for path in (stamps_folder / "vehicles").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    source = open_named("stamps:vehicles", "train")
    with pytest.raises(ValueError, match=r"vehicles/.*\.png: .*install tuxpaint-stamps-default"):
        source[0]
    monkeypatch.delenv("LEVATTN_DATA")
    monkeypatch.setattr(stamps, "_DEBIAN_FOLDER", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        open_named("stamps", "train")


@pytest.mark.parametrize("source", ["stamps", "fashion_mnist"])
def test_a_data_folder_of_ones_own_that_is_not_there_is_refused_whatever_else_is_installed(
    source, tmp_path, monkeypatch
):
    monkeypatch.setenv("LEVATTN_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"LEVATTN_DATA=.*none"):
        open_named(source, "train")


@pytest.mark.skipif(not stamps._DEBIAN_FOLDER.is_dir(), reason="needs apt-get install tuxpaint-stamps-default")
def test_the_package_has_the_photographs_that_results_are_about(monkeypatch):
    monkeypatch.delenv("LEVATTN_DATA", raising=False)
    source = open_named("stamps", "train")
    assert np.bincount(source.labels).tolist() == [65, 35, 9, 26, 25, 18, 19]
    batch = next(eval_batches(source, DataConfig(image_size=16), batch_size=len(source)))
    assert (batch["image"][:, [0, -1]].max(axis=(1, 2, 3)) > 200).mean() > 0.9


@pytest.mark.parametrize("source", ["digits", "fashion_mnist", "fake:"])
def test_an_unknown_split_is_answered_with_the_nearest(source):
    with pytest.raises(ValueError, match="did you mean 'train'"):
        open_named(source, "trian")


def test_fake_images_are_the_same_each_time_and_show_their_class():
    train = open_named("fake:num_classes=4,size=16,examples=40", "train")
    test = open_named("fake:num_classes=4,size=16,examples=40", "test")
    np.testing.assert_array_equal(train[7]["image"], train[7]["image"])
    means = np.stack([np.mean([train[i]["image"] for i in range(c, 40, 4)], axis=0) for c in range(4)])
    for index in range(40):
        distances = ((means - test[index]["image"]) ** 2).mean(axis=(1, 2, 3))
        assert distances.argmin() == test[index]["label"]


def test_mistyped_fake_options_are_refused():
    with pytest.raises(ValueError, match="did you mean 'num_classes'"):
        open_named("fake:num_class=3", "train")
    with pytest.raises(ValueError, match="size"):
        open_named("fake:size=big", "train")


def test_fingerprints_follow_the_content_and_survive_pickling(folder):
    names = ["digits", "fake:", "fake:size=16", f"folder:{folder}"]
    sources = [open_named(name, split) for name in names for split in ("train", "test", "train[:5]")]
    prints = [source.fingerprint for source in sources]
    assert len(set(prints)) == len(prints)
    assert [pickle.loads(pickle.dumps(source)).fingerprint for source in sources] == prints
    assert [repr(open_named(name, "train")) for name in names] == [repr(open_named(name, "train")) for name in names]
    write_image(folder / "train" / "ant" / "0.JPEG", 7, size=(60, 60))
    assert open_named(f"folder:{folder}", "train").fingerprint != sources[9].fingerprint


def test_importing_the_package_loads_no_other_framework():
    heavy = ("tensorflow", "torch", "tensorflow_datasets", "sklearn")
    code = f"import sys, levattn.data; sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "[]"
