"""LevAttention for JAX: Vision Transformers that attend to the keys of highest leverage."""

from levattn.attention import AttentionSpec as AttentionSpec
from levattn.attention import Coreset as Coreset
from levattn.attention import LevAttention as LevAttention
from levattn.attention import LevSelfAttention as LevSelfAttention
from levattn.attention import attend as attend
from levattn.attention import lev_attention as lev_attention
from levattn.core import heavy_entries as heavy_entries
from levattn.core import leverage_scores as leverage_scores
from levattn.universal import universal_set as universal_set


def __getattr__(name: str):
    if name == "load_pretrained":  # brings the data pipeline and the checkpoints along: only for who asks
        from levattn.training.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
