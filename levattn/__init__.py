"""LevAttention for JAX: Vision Transformers that attend to the keys of highest leverage."""

from levattn.attention import AttentionSpec as AttentionSpec
from levattn.attention import Coreset as Coreset
from levattn.attention import LevAttention as LevAttention
from levattn.attention import LevSelfAttention as LevSelfAttention
from levattn.attention import attend as attend
from levattn.attention import lev_attention as lev_attention
from levattn.core import leverage_scores as leverage_scores
