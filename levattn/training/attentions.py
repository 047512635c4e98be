"""What can be put into a trained model in place of its attention: one spec for all layers, or one for each."""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxtyping import PyTree

from levattn.attention import AttentionSpec, get_method
from levattn.attention.budgets import heads_by_budget
from levattn.attention.select import num_kept
from levattn.models import ModelConfig, attention_specs, scan_to_unrolled, unrolled_to_scan

# A tuple holds a spec for each layer, from the first to the last.
Attention = AttentionSpec | tuple[AttentionSpec, ...]


def expand(base: AttentionSpec, methods: Sequence[str], ks: Sequence[int | None]) -> Iterator[AttentionSpec]:
    """The specs of every method with every k; dense attention has no k and comes once.

    Args:
      base: The other options, for all of them.
      methods: Names in the registry.
      ks: Numbers of keys; None: as many as `base.eps` can keep.

    Raises:
      ValueError: For an unknown method.
    """
    for method in methods:
        get_method(method)
        for k in ks if method != "dense" else ks[:1]:
            yield dataclasses.replace(base, method=method, k=k)


def with_attention(model: ModelConfig, attention: Attention) -> ModelConfig:
    """The model with other attention in all of its layers; its parameters fit as they are.

    Args:
      model: Of any attention; with `scan=False` where `attention` differs among layers, see `unrolled`.
      attention: What to put in.

    Raises:
      ValueError: A tuple of another length than the model is deep, or for a model that is scanned.
    """
    if isinstance(attention, AttentionSpec):
        return dataclasses.replace(model, attention=attention, attention_by_layer=())
    if len(attention) != model.dims.depth:
        raise ValueError(f"attention of {len(attention)} layers does not fit a model of {model.dims.depth}")
    rules = tuple((str(layer), spec) for layer, spec in enumerate(attention))
    return dataclasses.replace(model, attention=attention[0], attention_by_layer=rules)


def unrolled(model: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
    """The same model with every layer by itself, so that each may have attention of its own."""
    if not model.scan:
        return model, params
    return dataclasses.replace(model, scan=False), scan_to_unrolled(params)


def scanned(model: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
    """The same model with one traced block for all layers: it compiles in a fraction of the time."""
    if model.scan or model.attention_by_layer:
        return model, params
    return dataclasses.replace(model, scan=True), unrolled_to_scan(params)


def describe(attention: Attention) -> str:
    """A short name: "dense", "leverage k=16", "leverage eps=0.1", "leverage k=16 by head", "leverage by layer"."""
    if isinstance(attention, tuple):
        return method_name(attention)
    if attention.method == "dense":
        return "dense"
    size = f"k={attention.k}" if attention.eps is None else f"eps={attention.eps}"
    if attention.k_per_head is not None:
        size = f"k={sum(attention.k_per_head) / len(attention.k_per_head):g} by head"
    return f"{attention.method} {size}"


def method_name(attention: Attention) -> str:
    """The method without its k: "leverage", "leverage by layer" where k differs, "by layer" where methods do."""
    specs = set(attention) if isinstance(attention, tuple) else {attention}
    methods = {spec.method for spec in specs}
    return " ".join([*(methods if len(methods) == 1 else ()), *(["by layer"] if len(specs) > 1 else ())])


def describe_options(attention: Attention) -> str:
    """The fields that are not as `AttentionSpec` has them, method and k apart, as eval.py takes them by `--option`:
    "keep_prefix=1 local_window=3x3". "by layer" where they differ."""
    specs = attention if isinstance(attention, tuple) else (attention,)
    dense = all(spec.method == "dense" for spec in specs)
    texts = []
    for field in dataclasses.fields(AttentionSpec):
        values = {getattr(spec, field.name) for spec in specs}
        skipped = field.name in ("method", "k") or (dense and field.name not in ("causal", "power"))
        if not skipped and values != {field.default}:
            texts.append(f"{field.name}={_option(values.pop()) if len(values) == 1 else 'by layer'}")
    return " ".join(texts)


def _option(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def mean_kept(attention: Attention, num_tokens: int, head_dim: int) -> int:
    """Keys that a query sees, local tokens apart, rounded to a whole number where they differ among layers or heads.

    Raises:
      ValueError: A k that exceeds the number of tokens.
    """
    specs = attention if isinstance(attention, tuple) else (attention,)
    kept = [_mean_over_heads(spec, num_tokens, head_dim) for spec in specs]
    return round(sum(kept) / len(kept))


def _mean_over_heads(spec: AttentionSpec, num_tokens: int, head_dim: int) -> int | float:
    if spec.method == "dense":
        return num_tokens
    groups = heads_by_budget(spec, len(spec.k_per_head or (spec.k,)))
    kept = [num_kept(of_group, num_tokens, head_dim) * len(heads) for of_group, heads in groups]
    return sum(kept) / sum(len(heads) for _, heads in groups)


def attention_of(model: ModelConfig) -> Attention:
    """The attention that a model has: undoes `with_attention`."""
    specs = attention_specs(model)
    return specs[0] if len(set(specs)) == 1 else specs
