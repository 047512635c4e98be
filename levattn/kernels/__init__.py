"""Pallas kernels of LevAttention for GPUs: from keys to the chosen ones to the output, in a few launches.

`levattn.attention.fused` says which inputs they take. The same results come from plain JAX in `levattn.core` and
`levattn.attention`, on any device.
"""
