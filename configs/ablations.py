"""What nobody has published of LevAttention: one change at a time, trained from scratch with it, on Fashion-MNIST.

    python train.py --config configs/ablations.py:name=window_3x3 --workdir runs/window_3x3
    python scripts/ablations.py --workdir runs/ablations        # all of them, with their evaluation, a CSV and plots

Each is a name below and changes the attention of `fashion_mnist.py` (or, with `source=digits`, of `quickstart.py`);
everything else stays. `leverage` keeps 32 keys a head, the class token always among them; all others differ from it, or
from `dense`, in what their group is called. A new one is a line here.

Hardware: one H100.  Wall time, accuracy: unmeasured.
"""

from ml_collections import ConfigDict

from configs import common, fashion_mnist, quickstart

_LEVERAGE = {"method": "leverage", "k": 32, "keep_prefix": 1}
_CLASS_TOKEN_ALONE = {**_LEVERAGE, "k": 1}
_WINDOWS = ("9", "cross", "3x3", "5x5", "7x7")
_RULES = (
    *("row_norm", "random", "kmeans", "oracle"),
    *("leverage_merged", "pivoted", "leverage_groups", "groups", "matched"),
)


def _window(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _dense_layers(*rules: str) -> list[tuple[str, dict]]:
    return [(rule, {"method": "dense"}) for rule in rules]


def _k_by_layer(first: int, middle: int, last: int) -> list[tuple[str, dict]]:
    """A k for each third of 12 layers; their mean is 32."""
    return [(rule, {**_LEVERAGE, "k": k}) for rule, k in (("0-3", first), ("4-7", middle), ("8-11", last))]


# Names to fields of `AttentionSpec` for all layers, or to pairs of a rule for layers and fields that go on top.
REFERENCES = {"dense": {"method": "dense"}, "leverage": _LEVERAGE}
GROUPS = {
    "keys": {f"k_{k}": {**_LEVERAGE, "k": k} for k in (4, 8, 16, 64, 96, 128)},
    "threshold in place of k": {f"eps_{eps}": {**_LEVERAGE, "k": None, "eps": eps} for eps in (0.25, 0.5, 0.75)},
    "local tokens": {f"window_{text}": {**_LEVERAGE, "local_window": _window(text)} for text in _WINDOWS}
    | {f"only_window_{text}": {**_CLASS_TOKEN_ALONE, "local_window": _window(text)} for text in _WINDOWS},
    "class token": {"class_token_not_forced": {**_LEVERAGE, "keep_prefix": 0}},
    "scores": {
        "centred": {**_LEVERAGE, "centre": True},
        "ridge_0.1": {**_LEVERAGE, "ridge": 0.1},
        "ridge_1": {**_LEVERAGE, "ridge": 1.0},
        "refined": {**_LEVERAGE, "score_method": "refined"},
    },
    "k by layer": {"k_falling": _k_by_layer(56, 28, 12), "k_rising": _k_by_layer(12, 28, 56)},
    "rule": {rule: {**_LEVERAGE, "method": rule} for rule in _RULES},
    "dense layers": {
        "first_dense": _dense_layers("0"),
        "first_2_dense": _dense_layers("0-1"),
        "first_4_dense": _dense_layers("0-3"),
        "last_2_dense": _dense_layers("-2--1"),
    },
    "x^2 in place of exp": {
        "power_dense": {"method": "dense", "power": 2},
        "power_leverage": {**_LEVERAGE, "power": 2},
        "power_eps_0.1": {**_LEVERAGE, "k": None, "eps": 0.1, "power": 2},
    },
}
ABLATIONS = REFERENCES | {name: change for group in GROUPS.values() for name, change in group.items()}


def get_config(arg: str | None = None) -> ConfigDict:
    defaults = {"name": "", "source": "fashion_mnist", "patch": 2, "variant": "S", "epochs": 45, "dtype": "bfloat16"}
    arg = common.parse_arg(arg, **defaults, **common.ATTENTION)
    match arg.source:
        case "fashion_mnist":
            shape = f"patch={arg.patch},variant={arg.variant},epochs={arg.epochs},dtype={arg.dtype}"
            config = fashion_mnist.get_config(shape)
        case "digits":
            config = quickstart.get_config("source=digits")
        case _:
            raise ValueError(f"source={arg.source!r} must be 'fashion_mnist' or 'digits'")
    config.model.attention.update(common.attention(arg))
    if arg.name:
        if arg.name not in ABLATIONS:
            raise ValueError(f"name={arg.name!r} must be one of {', '.join(ABLATIONS)}")
        change = ABLATIONS[arg.name]
        is_by_layer = isinstance(change, list)
        config.model.attention.update(_LEVERAGE if is_by_layer else change)
        config.model.attention_by_layer = tuple(change) if is_by_layer else ()
    return config
