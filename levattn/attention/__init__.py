"""Attention over coresets: the type, the methods that choose one, and the layer."""

from levattn.attention.coreset import Coreset as Coreset
from levattn.attention.coreset import attend as attend
from levattn.attention.layer import LevAttention as LevAttention
from levattn.attention.layer import LevSelfAttention as LevSelfAttention
from levattn.attention.layer import lev_attention as lev_attention
from levattn.attention.registry import METHODS as METHODS
from levattn.attention.registry import get_method as get_method
from levattn.attention.sequence_parallel import sequence_parallel_attention as sequence_parallel_attention
from levattn.attention.spec import AttentionSpec as AttentionSpec
