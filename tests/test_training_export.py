import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from levattn.training.export import export_params, load_params

CONFIG = {"model": {"variant": "S/16", "k": [8, 16]}, "name": "é"}
SUFFIXES = (".npz", ".safetensors")


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "embedding": {"kernel": rng.normal(size=(4, 4, 3, 8)).astype(dtype)},
        "Transformer": {"encoderblock_0": {"bias": np.array([0.0, -0.0, np.pi, 1e-42], dtype)}},
        "scalar": rng.normal(size=()).astype(dtype),
    }


def assert_bitwise_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_exported_is_loaded_bit_for_bit_with_its_config(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    export_params(path, jax.tree.map(jnp.asarray, make_params()), CONFIG)
    params, config = load_params(path)
    assert_bitwise_equal(params, make_params())
    assert config == CONFIG
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bfloat16_parameters_are_widened_without_loss(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    export_params(path, make_params(jnp.bfloat16), CONFIG)
    assert_bitwise_equal(load_params(path)[0], jax.tree.map(lambda x: x.astype(np.float32), make_params(jnp.bfloat16)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_split_over_devices_are_exported_whole(tmp_path, suffix):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = np.arange(64, dtype=np.float32).reshape(16, 4)
    path = tmp_path / f"model{suffix}"
    export_params(path, {"w": jax.device_put(weights, NamedSharding(mesh, PartitionSpec("fsdp")))}, {})
    np.testing.assert_array_equal(load_params(path)[0]["w"], weights)


def test_a_safetensors_export_is_read_by_the_library_itself(tmp_path):
    path = tmp_path / "model.safetensors"
    export_params(path, make_params(), CONFIG)
    flat = safetensors.numpy.load_file(path)
    assert set(flat) == {"embedding/kernel", "Transformer/encoderblock_0/bias", "scalar"}
    np.testing.assert_array_equal(flat["embedding/kernel"], make_params()["embedding"]["kernel"])
    with safetensors.safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["config"]) == CONFIG


def test_an_npz_export_is_read_by_numpy_under_big_visions_names(tmp_path):
    path = tmp_path / "model.npz"
    export_params(path, make_params(), CONFIG)
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["params/embedding/kernel"], make_params()["embedding"]["kernel"])
        assert [name for name in file.files if not name.startswith("params/")] == ["__config__"]


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_npz_files_from_elsewhere_are_read_with_and_without_the_prefix(tmp_path, prefix):
    """With the prefix, a file may hold optimizer state beside the parameters, which is left out."""
    path = tmp_path / "model.npz"
    other = {"opt/mu/kernel": np.zeros(2)} if prefix else {}
    np.savez(path, **{f"{prefix}head/kernel": np.ones((2, 3)), **other})
    params, config = load_params(path)
    assert_bitwise_equal(params, {"head": {"kernel": np.ones((2, 3))}})
    assert config == {}


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


@pytest.mark.parametrize("how", ["member", "whole file"])
def test_pickles_are_refused_and_not_executed(tmp_path, how):
    path = tmp_path / "model.npz"
    if how == "member":
        np.savez(path, kernel=np.array([Bomb()], dtype=object))
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"model\.npz.*cannot be read.*(allow_pickle|bare pickle)"):
        load_params(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["empty", "truncated", "html"])
def test_damaged_files_are_refused_by_name(tmp_path, suffix, damage):
    path = tmp_path / f"model{suffix}"
    export_params(path, make_params(), CONFIG)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "html": b"<!doctype html>" * 9}[damage])
    with pytest.raises(ValueError, match=rf"model\{suffix}.*cannot be read"):
        load_params(path)


def test_other_suffixes_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.npz"):
        export_params(tmp_path / "model.pth", make_params(), {})
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.npz"):
        load_params(tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match=r"model\.npz"):
        load_params(tmp_path / "model.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_that_fails_leaves_the_earlier_one(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    export_params(path, make_params(), CONFIG)
    with pytest.raises((TypeError, ValueError)):
        export_params(path, {"w": np.zeros(3)}, {"not JSON": object()})
    assert_bitwise_equal(load_params(path)[0], make_params())
    assert list(tmp_path.iterdir()) == [path]
