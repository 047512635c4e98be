"""One call reads runs, exports and published checkpoints; training starts from any of them."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_params, save_torch, to_old_naming, to_timm
from flax.traverse_util import flatten_dict, unflatten_dict

import levattn
from levattn.models import ModelConfig, ViT
from levattn.models.pretrained import Preprocess
from levattn.models.pretrained.posemb import resize_positions
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.export import export_params, load_params
from levattn.training.finetune import EXPORT_FILE, read_fitting
from levattn.training.loop import train

SMALL = {"width": 128, "depth": 2, "num_heads": 2, "mlp_dim": 24}
MODEL = ModelConfig("B/4", 5, **SMALL, pool="cls")
TINY = ModelConfig("mu/2", 3, pool="cls")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of vision_transformer for grey images of 16 pixels, with three classes."""
    path = tmp_path_factory.mktemp("published") / "mu_2.npz"
    np.savez(path, **to_old_naming(random_params(TINY, 16, channels=1)))
    return path


@pytest.fixture(scope="module")
def config(published):
    """Of a run on images of 8 pixels with ten classes that starts from the file and hardly moves."""
    fields = {
        "data": {"source": "digits", "mean": (0.3,), "std": (0.25,)},
        "model": {"variant": "mu/2", "num_classes": 10, "pool": "cls", "attention": {"method": "leverage", "k": 8}},
        "optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0},
        "batch_size": 64,
        "total_steps": 1,
        "init_from": str(published),
    }
    return from_config_dict(TrainConfig, fields)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("runs") / "lev8"
    train(config, workdir)
    return workdir


def test_a_run_starts_where_the_published_checkpoint_is(workdir, published):
    trained, start = (flatten_dict(levattn.load_pretrained(path).params, sep="/") for path in (workdir, published))
    assert start["head/kernel"].shape != trained["head/kernel"].shape
    start["pos_embedding"] = resize_positions(start["pos_embedding"], (8, 8), (4, 4), "bilinear_corners")
    for name in start.keys() - {"head/kernel", "head/bias"}:
        np.testing.assert_allclose(trained[name], start[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["workdir", "unfinished", "export", "npz"])
def test_a_run_comes_with_its_attention_and_its_input_in_whatever_form(workdir, config, tmp_path, kind):
    params, exported_config = load_params(workdir / EXPORT_FILE)
    path = {"workdir": workdir, "unfinished": tmp_path / "lev8", "export": workdir / EXPORT_FILE}.get(kind)
    if kind == "unfinished":  # checkpoints and no export
        shutil.copytree(workdir, path)
        (path / EXPORT_FILE).unlink()
    elif kind == "npz":
        path = tmp_path / "lev8.npz"
        export_params(path, params, exported_config)
    pretrained = levattn.load_pretrained(path)
    assert (pretrained.model, pretrained.head, pretrained.layout) == (config.model, "classifier", "levattn")
    assert pretrained.name == "lev8"
    assert pretrained.preprocess == Preprocess(8, 8, "bicubic", (0.3,), (0.25,))
    jax.tree.map(np.testing.assert_array_equal, dict(pretrained.params), params)


def test_a_run_at_another_image_size(workdir):
    small, large = (levattn.load_pretrained(workdir, image_size=size) for size in (8, 12))
    assert large.preprocess == Preprocess(12, 12, "bicubic", (0.3,), (0.25,))
    expected = resize_positions(small.params["pos_embedding"], (4, 4), (6, 6), "bilinear_corners")
    np.testing.assert_array_equal(large.params["pos_embedding"], expected)
    images = jnp.zeros((1, 12, 12, 1))
    assert jax.eval_shape(ViT(large.model).apply, {"params": large.params}, images).shape == (1, 10)


def test_a_published_checkpoint_comes_with_dense_attention(tmp_path):
    np.savez(tmp_path / "B_16.npz", **to_old_naming(random_params(MODEL, 16)))
    pretrained = levattn.load_pretrained(str(tmp_path / "B_16.npz"), image_size=24)
    assert (pretrained.layout, pretrained.model.attention.method) == ("big_vision", "dense")
    assert pretrained.params["pos_embedding"].shape == (1, 36, 128)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist.*nothing is downloaded"):
        levattn.load_pretrained("timm/vit_base_patch16_224")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        levattn.load_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        levattn.load_everything  # noqa: B018


def test_the_library_stays_light_until_it_is_asked_for():
    code = "import sys, levattn\nprint({'orbax', 'grain', 'cv2'} & {m.split('.')[0] for m in sys.modules})"
    root = Path(levattn.__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "set()"


# init_from


def shapes_of(model, image_size):
    return unflatten_dict(random_params(model, image_size, seed=1), sep="/")


@pytest.mark.parametrize("kind", ["old", "timm", "own"])
def test_training_starts_from_any_of_them_on_its_own_grid_and_classes(tmp_path, kind):
    exact = dataclasses.replace(MODEL, activation="gelu_exact")
    params = random_params(exact if kind == "timm" else MODEL, 16)
    path = tmp_path / {"old": "vit.npz", "timm": "vit_base_patch4_16.pth", "own": "vit.safetensors"}[kind]
    if kind == "old":
        np.savez(path, **to_old_naming(params))
    elif kind == "timm":
        save_torch(path, to_timm(params))
    else:
        export_params(path, unflatten_dict(params, sep="/"), {})
    model = dataclasses.replace(exact if kind == "timm" else MODEL, num_classes=7)
    fitting = read_fitting(shapes_of(model, 24), path, model)
    assert params.keys() - fitting.keys() == {"head/kernel", "head/bias"}
    method = "bicubic_antialias" if kind == "timm" else "bilinear_corners"
    params["pos_embedding"] = resize_positions(params["pos_embedding"], (4, 4), (6, 6), method)
    for name, array in fitting.items():
        np.testing.assert_allclose(array, params[name], rtol=1e-5, err_msg=name)


def test_positions_that_are_no_square_cannot_start_a_run(tmp_path):
    """Files that name tensors as this project does are of square images."""
    params = random_params(MODEL, 16)
    params["pos_embedding"] = params["pos_embedding"][:, :15]
    export_params(tmp_path / "own.npz", unflatten_dict(params, sep="/"), {})
    with pytest.raises(ValueError, match=r"15 position embeddings are not those of \(3, 3\) patches"):
        read_fitting(shapes_of(MODEL, 16), tmp_path / "own.npz", MODEL)


def test_a_scanned_model_starts_from_a_published_one(tmp_path):
    params = random_params(MODEL, 16)
    np.savez(tmp_path / "vit.npz", **to_old_naming(params))
    fitting = read_fitting(shapes_of(dataclasses.replace(MODEL, scan=True), 16), tmp_path / "vit.npz")
    name = "MlpBlock_0/Dense_0/kernel"
    stacked = np.stack([params[f"Transformer/encoderblock_{i}/{name}"] for i in (0, 1)])
    np.testing.assert_array_equal(fitting[f"Transformer/encoderblock/{name}"], stacked)


def test_a_head_of_zeros_may_start_a_run(tmp_path):
    params = random_params(MODEL, 16)
    params["head/kernel"] = np.zeros_like(params["head/kernel"])
    np.savez(tmp_path / "vit.npz", **to_old_naming(params))
    assert "head/kernel" in read_fitting(shapes_of(MODEL, 16), tmp_path / "vit.npz", MODEL)


def test_all_that_does_not_fit_is_listed_what_no_shape_shows_too(tmp_path):
    path = tmp_path / "vit_base_patch4_16.pth"
    save_torch(path, to_timm(random_params(MODEL, 16)))
    other = dataclasses.replace(MODEL, mlp_dim=32, pre_norm=True, activation="quick_gelu", pool="gap")
    with pytest.raises(ValueError, match="does not fit the model") as error:
        read_fitting(shapes_of(other, 16), path, other)
    message = str(error.value)
    assert "encoderblock_1/MlpBlock_0/Dense_0/kernel is (128, 24) there, (128, 32) in the model" in message
    assert "pre_norm/scale (128,) is missing there" in message
    assert "cls is not in the model" in message
    assert "activation is 'gelu_exact' there, 'quick_gelu' in the model: set model.activation to that" in message


def test_a_run_may_be_told_the_published_model_that_a_nameless_file_is_of(tmp_path):
    """The name goes before what the width would say of heads; without it a guess is told to whoever trains."""
    model = dataclasses.replace(MODEL, activation="quick_gelu", pre_norm=True, layer_norm_eps=1e-5)
    params = random_params(model, 16)
    params["embedding/bias"] *= 0
    save_torch(tmp_path / "best.pth", to_timm(params))
    shapes = shapes_of(model, 16)
    found = read_fitting(shapes, tmp_path / "best.pth", model, arch="vit_medium_patch4_clip_quickgelu_224")
    assert found.keys() == params.keys()
    other = dataclasses.replace(model, activation="gelu_exact")
    with pytest.warns(UserWarning, match=r"heads, activation.*guessed.*init_arch='"):
        read_fitting(shapes, tmp_path / "best.pth", other)
    with pytest.raises(ValueError, match="no published model's name"):
        read_fitting(shapes, tmp_path / "best.pth", model, arch="quick_gelu")
    export_params(tmp_path / "own.npz", unflatten_dict(params, sep="/"), {})
    with pytest.raises(ValueError, match="init_arch='vit_base_patch4_224' tells nothing of"):
        read_fitting(shapes, tmp_path / "own.npz", model, arch="vit_base_patch4_224")
