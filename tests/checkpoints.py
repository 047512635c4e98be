"""Small checkpoints in true formats, made without the libraries that publish such files."""

import pickle
import struct
import zipfile

import numpy as np

from levattn.models import ModelConfig
from levattn.models.pretrained.shapes import param_shapes

_STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def random_params(model: ModelConfig, image_size: int, channels: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of a model, by names joined with "/"; none is zero or one."""
    rng = np.random.default_rng(seed)
    shapes = param_shapes(model, image_size, channels)
    return {name: rng.normal(0.5, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def save_torch(path, arrays, *, wrapped_in=(), beside=None, pickled=None, byteorder="little"):
    """A file as `torch.save` writes a state dict, opcode by opcode; `wrapped_in` are the names of dicts around it.

    Arrays may be of any strides and share memory with nothing. `beside` are further entries of those dicts. `pickled`
    goes in place of the pickle.
    """
    others = b"".join(_text(name) + pickle.dumps(value, 2)[2:-1] for name, value in (beside or {}).items())
    storages = []
    state = b"}("
    for name, array in arrays.items():
        storages.append(np.ascontiguousarray(array).ravel())
        state += _text(name) + _tensor(len(storages) - 1, array)
    state += b"u"
    for name in reversed(wrapped_in):
        state = b"}(" + _text("epoch") + _int(3) + _text(name) + state + others + b"u"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled or b"\x80\x02" + state + b".")
        archive.writestr("archive/byteorder", byteorder)
        for key, storage in enumerate(storages):
            order = "<" if byteorder == "little" else ">"
            archive.writestr(f"archive/data/{key}", storage.astype(storage.dtype.newbyteorder(order)).tobytes())
        archive.writestr("archive/version", "3\n")


def _tensor(key: int, array: np.ndarray) -> bytes:
    kind = f"ctorch\n{_STORAGES[array.dtype.name]}\n".encode()
    storage = b"(" + _text("storage") + kind + _text(str(key)) + _text("cpu") + _int(array.size) + b"tQ"
    strides = [n // array.itemsize for n in np.ascontiguousarray(array).reshape(array.shape).strides]
    sizes = [b"(" + b"".join(map(_int, numbers)) + b"t" for numbers in (array.shape, strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _int(0) + b"".join(sizes) + b"\x89" + hooks + b"tR"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def to_old_naming(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model with a class token as vision_transformer names and stores it: the token has a position too."""
    old = {}
    for name, array in params.items():
        for ours, theirs in (
            ("/LayerNorm_1/", "/LayerNorm_2/"),
            ("/MlpBlock_0/", "/MlpBlock_3/"),
            ("/MultiHeadDotProductAttention_0/", "/MultiHeadDotProductAttention_1/"),
        ):
            name = name.replace(ours, theirs)
        old[name] = array
    positions = old.pop("pos_embedding")
    cls_position = np.full_like(positions[:, :1], 0.25)
    old["Transformer/posembed_input/pos_embedding"] = np.concatenate([cls_position, positions], axis=1)
    old["cls"] = old["cls"] - cls_position
    return old


def to_timm(params: dict[str, np.ndarray], *, class_position: bool = True) -> dict[str, np.ndarray]:
    """A model as timm names and stores it: linear weights as (out, in), queries, keys and values in one."""
    state = {}
    for name, array in params.items():
        *path, kind = name.replace("Transformer/encoderblock_", "blocks.").split("/")
        match path:
            case [block, "MultiHeadDotProductAttention_0", part]:
                width = params["embedding/bias"].shape[0]
                if part == "out":
                    array = array.reshape(width, width).T if kind == "kernel" else array
                    state[f"{block}.attn.proj.{_torch(kind)}"] = array
                elif part == "query":
                    parts = [params[name.replace("query", part)] for part in ("query", "key", "value")]
                    rows = [x.reshape(width, width).T if kind == "kernel" else x.ravel() for x in parts]
                    state[f"{block}.attn.qkv.{_torch(kind)}"] = np.concatenate(rows)
            case [block, "MlpBlock_0", dense]:
                state[f"{block}.mlp.fc{int(dense[-1]) + 1}.{_torch(kind)}"] = array.T
            case [block, part] if block.startswith("blocks."):
                number = int(part[-1]) + 1
                name = f"norm{number}.{_torch(kind)}" if part.startswith("LayerNorm") else f"ls{number}.gamma"
                state[f"{block}.{name}"] = array
            case ["embedding"]:
                if kind == "kernel" or "pre_norm/bias" not in params:
                    array = array.transpose(3, 2, 0, 1) if kind == "kernel" else array
                    state[f"patch_embed.proj.{_torch(kind)}"] = array
            case ["Transformer", "encoder_norm"]:
                state[f"norm.{_torch(kind)}"] = array
            case [other]:
                other = {"pre_norm": "norm_pre"}.get(other, other)
                state[f"{other}.{_torch(kind)}"] = array.T
            case []:
                state[{"cls": "cls_token", "registers": "reg_token", "pos_embedding": "pos_embed"}[kind]] = array
    if class_position and "cls_token" in state:
        position = np.full_like(state["cls_token"], 0.25)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = np.concatenate([position, state["pos_embed"]], axis=1)
    return state


def _torch(kind: str) -> str:
    return {"kernel": "weight", "scale": "weight"}.get(kind, kind)
