"""A model is loaded with the preprocessing it was trained with, whoever trained it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from levattn.models import ModelConfig, ViT
from levattn.models.pretrained import LoadOptions
from levattn.training.config import ProbeConfig, to_dict
from levattn.training.export import export_params
from levattn.training.loaded import find_eval_split, load_model
from levattn.training.retrofit import evaluate_retrofit
from tests.retrofits import CONFIG, tiny_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "params.npz"
    export_params(path, tiny_model().params, to_dict(CONFIG))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """As big_vision saves them: no config, the model follows from names and shapes."""
    model = ModelConfig("mu/4", width=64, depth=1, num_heads=1, mlp_dim=64, num_classes=3, head_zero_init=False)
    params = jax.jit(ViT(model).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    path = tmp_path_factory.mktemp("published") / "vit_mu.npz"
    np.savez(path, **{f"params/{name}": leaf for name, leaf in flatten_dict(params, sep="/").items()})
    return path


@pytest.fixture
def photographs(tmp_path):
    for number in range(6):
        for name in "abc":
            (tmp_path / name).mkdir(exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return f"folder:{tmp_path}"


def test_an_export_is_loaded_with_its_own_data(exported):
    loaded = load_model(exported)
    assert loaded.config == CONFIG
    assert loaded.is_classifier
    assert load_model(exported, split="test[:5]").config.data.eval_split == "test[:5]"


def test_other_data_are_seen_as_the_run_saw_its_own(exported):
    data = load_model(exported, "fake:num_classes=10,size=28,channels=1").config.data
    assert (data.image_size, data.mean, data.std, data.eval_split) == (8, (0.5,), (0.5,), "test")


def test_a_published_checkpoint_brings_its_preprocessing_and_needs_data(published, photographs):
    with pytest.raises(ValueError, match="comes without data: name a source"):
        load_model(published)
    loaded = load_model(published, photographs)
    assert loaded.is_classifier
    assert loaded.name == "vit_mu"
    data = loaded.config.data
    assert (data.source, data.image_size, data.eval_split) == (photographs, 8, "train")
    assert len(data.mean) == 3
    rows, _ = evaluate_retrofit(loaded, [], config=ProbeConfig(folds=2, seeds=1, error_images=4))
    assert rows[0]["agreement"] == 1
    assert rows[0]["examples"] == 18


def test_images_of_another_size_get_resized_positions(published, exported, photographs):
    assert load_model(published, photographs, options=LoadOptions(16)).params["pos_embedding"].shape == (1, 16, 64)
    larger = load_model(exported, options=LoadOptions(12))
    assert larger.params["pos_embedding"].shape == (1, 36, 32)
    assert larger.config.data.image_size == 12


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: name a run's workdir"):
        load_model(tmp_path / "none")


def test_the_split_to_evaluate_on_is_the_first_of_test_validation_and_train(photographs, tmp_path):
    data = CONFIG.data
    assert find_eval_split(data) == "test"
    assert find_eval_split(dataclasses.replace(data, source=photographs)) == "train"
    with pytest.raises(FileNotFoundError):
        find_eval_split(dataclasses.replace(data, source=f"folder:{tmp_path}/none"))
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="one folder of images for each class"):
        find_eval_split(dataclasses.replace(data, source=f"folder:{tmp_path}/flat"))
