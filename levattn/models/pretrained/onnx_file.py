"""The weights in an ONNX file, under the names that they had in the PyTorch model it was exported from."""

import collections
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

_QUANTIZED, _SCALE, _ZERO_POINT = "_quantized", "_scale", "_zero_point"  # as onnxruntime's quantizer names them
_GENERATED = re.compile(r"onnx::\w+")  # an array that the exporter made out of a weight
_ACTIVATIONS = {"Erf": "gelu", "Gelu": "gelu", "Tanh": "gelu_pytorch_tanh", "Sigmoid": "quick_gelu"}
_FIRST_MLP = re.compile(r"layers?\.0/(mlp|intermediate)/")


def read_onnx(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the initializers of a model; nothing of it is run.

    Most parameters keep their names in an export by `torch.onnx.export`. What it and onnxruntime's quantizer do to the
    others is undone: weights in integers are scaled back to real numbers; the weight of a linear layer, stored
    transposed under a number, is named by the node that multiplies by it; of equal arrays each gets its own name back;
    a position embedding that was split into that of the class token and those of the patches is joined.

    Args:
      path: The file.

    Returns:
      Names to arrays, linear weights as (out, in), as PyTorch has them; and, under "config", the `hidden_act` of the
      first block in the terms of the transformers library.

    Raises:
      ImportError: The package onnx is not installed.
      ValueError: Not an ONNX file, or one whose tensors lie in other files.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError(f"{str(path)!r} needs the package onnx: pip install -r requirements-onnx.txt") from error
    try:
        graph = onnx.load(path, load_external_data=False).graph  # a path in the file could lead to any file
    except DecodeError as error:
        raise ValueError(f"no ONNX model: {error}") from error
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError(
                f"tensor {tensor.name!r} lies in another file, which is not opened: put all into one by "
                "`onnx.save(onnx.load(path), new_path)`"
            )
        if min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) > 8 * tensor.ByteSize():  # a bit a number at least
            raise ValueError(f"tensor {tensor.name!r} of shape {[*tensor.dims]} has {tensor.ByteSize():,} bytes")

    stored = _real({tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer})
    arrays = {name: array for name, array in stored.items() if not _GENERATED.fullmatch(name)}
    generated = collections.defaultdict(dict)  # by the module that uses it, and the operation
    for node in graph.node:
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for name in (name.removesuffix(_QUANTIZED) for name in node.input):
            if name in arrays and node.op_type == "Identity":
                arrays[node.output[0]] = arrays[name]
            elif _GENERATED.fullmatch(name) and name in stored:
                generated[module][node.op_type] = stored[name]
    for module, by_operation in generated.items():
        for operation in by_operation.keys() & {"MatMul", "MatMulInteger"}:
            arrays[f"{module}.weight"] = by_operation[operation].T
        if by_operation.keys() == {"Concat", "Reshape"}:
            positions = by_operation["Concat"], by_operation["Reshape"]
            arrays[f"{module}.position_embeddings"] = np.concatenate(positions, axis=1)
    return arrays, {"config": {"hidden_act": _activation(graph)}}


def _real(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays of real numbers, those among them that are stored as integers, a zero point and a scale."""
    real = {}
    for name, array in stored.items():
        base = name.removesuffix(_QUANTIZED)
        if base != name:
            scale, zero_point = stored[base + _SCALE], stored[base + _ZERO_POINT]
            if array.ndim > 2:  # a convolution has its outputs first, a matrix has them last
                scale, zero_point = (x.reshape(-1, *[1] * (array.ndim - 1)) for x in (scale, zero_point))
            real[base] = (array.astype(np.float32) - zero_point.astype(np.float32)) * scale
        elif array.dtype.kind not in "iub" and name.removesuffix(_SCALE) + _QUANTIZED not in stored:
            real[name] = array
    return real


def _activation(graph: Any) -> str:
    """Of the first MLP, by the operations that make it up; the exact GELU if none of them tells."""
    for node in graph.node:
        if node.op_type in _ACTIVATIONS and _FIRST_MLP.search(node.name):
            approximate = any(attribute.s == b"tanh" for attribute in node.attribute)
            return "gelu_pytorch_tanh" if approximate else _ACTIVATIONS[node.op_type]
    return "gelu"
