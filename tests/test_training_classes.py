"""A classifier is judged on the classes that a data set has, by their names or by a list; else it is refused."""

import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from reference_vit import golden_arrays
from test_pretrained_hugging_face import DISTILLED, VIT, save_case

from levattn.analysis.evaluation import run_evaluation
from levattn.attention import AttentionSpec
from levattn.data import open_source
from levattn.models.pretrained import read_pretrained
from levattn.training.classes import imagenet_classes, on_classes_of, read_classes
from levattn.training.config import EvalConfig
from levattn.training.evaluate import prepare
from levattn.training.loaded import load_model
from tests.retrofits import tiny_model

WNIDS = ("n02102040", "n01440764", "n03888257")


def save_photographs(folder, names):
    """A folder of four images for each class."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(4 * number + i).integers(0, 256, size=(20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def save_model(folder, num_classes=1000, case=VIT, **config):
    """A classifier of transformers; of a distilled one both heads."""
    rng = np.random.default_rng(0)
    heads = [name for name in case["shapes"] if "classifier" in name]
    shapes = {name: (num_classes, *golden_arrays(case["shapes"])[name].shape[1:]) for name in heads}
    changed = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    return save_case(folder, case, changed=changed, config=case["config"] | config), changed


def load_on(path, source):
    trained = load_model(path, source)
    return trained, open_source(trained.config.data, trained.config.data.eval_split)


@pytest.mark.parametrize("case", [VIT, DISTILLED], ids=["ViT", "DeiT"])
def test_wordnet_ids_are_outputs_of_a_head_of_imagenet(tmp_path, case):
    path, heads = save_model(tmp_path / "vit", case=case)
    trained, source = load_on(path, save_photographs(tmp_path / "imagenette", WNIDS))
    found = on_classes_of(trained, source)
    outputs = [imagenet_classes().index(name) for name in sorted(WNIDS)]
    assert outputs[:2] == [0, 217]  # tench, and English springer
    assert found.config.model == dataclasses.replace(trained.config.model, num_classes=3)
    ours = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
    for name, array in heads.items():
        module, kind = name.rsplit(".", 1)
        kept = found.params[ours[module]]["kernel" if kind == "weight" else "bias"]
        np.testing.assert_array_equal(kept, array[outputs].T)
    assert "3 of its 1000 classes can be predicted" in found.notes[-1]
    assert trained.params["head"]["bias"].shape == (1000,)


@pytest.mark.parametrize("key", ["id2label", "label_names"])
def test_names_in_the_config_are_outputs_in_any_spelling_that_is_of_one_alone(tmp_path, key):
    names = ["tench, Tinca tinca", "crane, bird", "crane, machine", "great white shark"]
    told = {"id2label": {str(i): name for i, name in enumerate(names)}} if key == "id2label" else {key: names}
    path, heads = save_model(tmp_path / "vit", 4, **told)
    source = save_photographs(tmp_path / "images", ["Great_White_Shark", "Tinca tinca", "machine"])
    found = on_classes_of(*load_on(path, source))
    np.testing.assert_array_equal(found.params["head"]["bias"], heads["classifier.bias"][[3, 0, 2]])
    with pytest.raises(ValueError, match="which output 'crane' is"):
        on_classes_of(*load_on(path, save_photographs(tmp_path / "birds", ["crane", "tench"])))
    with pytest.raises(ValueError, match=r"output 0 would be 2 classes of"):
        on_classes_of(*load_on(path, save_photographs(tmp_path / "fish", ["tench", "tinca tinca"])))


@pytest.mark.parametrize("told", [5, "abcd", {"0": "a"}, ["a", "b", 3, "d"], dict.fromkeys("0123", 1), {}])
@pytest.mark.parametrize("key", ["id2label", "label_names"])
def test_what_the_config_has_in_place_of_names_is_no_harm(tmp_path, key, told):
    path, _ = save_model(tmp_path / "vit", 4, **{key: told})
    assert read_pretrained(path).class_names is None


@pytest.mark.parametrize("lines", ["2\n0\n\n1\n", "c\na\nb\n"], ids=["numbers", "names"])
def test_a_list_says_which_outputs_the_classes_are(tmp_path, lines):
    path, heads = save_model(tmp_path / "vit", 5, id2label={str(i): name for i, name in enumerate("abcde")})
    (tmp_path / "classes.txt").write_text(lines)
    trained, source = load_on(path, save_photographs(tmp_path / "images", ["x", "y", "z"]))
    found = on_classes_of(trained, source, read_classes(tmp_path / "classes.txt"))
    np.testing.assert_array_equal(found.params["head"]["bias"], heads["classifier.bias"][[2, 0, 1]])


def test_classes_that_nothing_tells_are_refused_with_the_next_step(tmp_path):
    path, _ = save_model(tmp_path / "vit", 5)
    trained, source = load_on(path, save_photographs(tmp_path / "images", ["x", "y", "z"]))
    with pytest.raises(ValueError, match=r"3 classes, .* trained on 5, .* which output 'x' is: give --classes=FILE"):
        on_classes_of(trained, source)
    for listed, message in (
        (("0", "1"), "classes lists 2 outputs, and .* has 3 classes"),
        (("0", "1", "5"), "which output '5' is"),
        (("0", "1", "1"), "output 1 would be 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            on_classes_of(trained, source, listed)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty: a line for each"):
        read_classes(tmp_path / "empty.txt")


@pytest.mark.parametrize("names", [("x", "y", "z"), ("0", "1", "2")])
def test_as_many_classes_of_unknown_names_are_taken_to_be_the_same(tmp_path, names):
    path, _ = save_model(tmp_path / "vit", 3)
    trained, source = load_on(path, save_photographs(tmp_path / "images", names))
    assert on_classes_of(trained, source) is trained


def test_all_classes_of_imagenet_leave_the_model_as_it_is(tmp_path):
    path, _ = save_model(tmp_path / "vit")
    trained = load_model(path, "fake:num_classes=1000,size=20,channels=3,examples=8")
    source = open_source(trained.config.data, "test")
    assert on_classes_of(trained, source) is trained
    assert on_classes_of(trained, dataclasses.replace(source, class_names=imagenet_classes())) is trained
    assert (len(set(imagenet_classes())), list(imagenet_classes())) == (1000, sorted(imagenet_classes()))


def test_an_evaluation_predicts_the_classes_of_the_data_alone(tmp_path):
    """Every image is right where outputs of other classes, far larger, cannot be predicted."""
    path, heads = save_model(tmp_path / "vit")
    tench = imagenet_classes().index("n01440764")
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    bias = heads["classifier.bias"] + 1e4
    bias[[imagenet_classes().index(name) for name in WNIDS]] = 0
    bias[tench] = 1e3
    safetensors.numpy.save_file(arrays | {"classifier.bias": bias}, path / "model.safetensors")
    source = save_photographs(tmp_path / "imagenette", WNIDS[:2])
    run_evaluation(EvalConfig(str(path), source=source, batch_size=8, out=str(tmp_path / "out")))
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert (row["accuracy"], row["top5"], row["examples"]) == (0.5, 1.0, 8)


# What else tells rows apart


def test_rows_under_other_options_say_so():
    trained = tiny_model()
    specs = [
        AttentionSpec("leverage", k=8),
        AttentionSpec("leverage", k=8, keep_prefix=1, local_window=(3, 3)),
        AttentionSpec("dense", keep_prefix=1),
        AttentionSpec("leverage", k=None, eps=0.25),
        tuple(AttentionSpec("leverage", k=k, keep_prefix=k % 2, centre=True) for k in (3, 4, 5)),
    ]
    source = open_source(trained.config.data, trained.config.data.eval_split)
    _, _, rows = prepare(trained.config, trained.params, specs, source)
    options = [row["options"] for row in rows]
    assert options == ["", "keep_prefix=1 local_window=3x3", "", "eps=0.25", "keep_prefix=by layer centre=True"]
    assert all(re.fullmatch(r"(\w+=\S+( layer)?( |$))*", text) for text in options)
