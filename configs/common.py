"""What the config files share: reading `file.py:k=32,attention=leverage`, and the parts that follow from it."""

import difflib
from typing import Any

from ml_collections import ConfigDict

from levattn.training.cli import read_literal
from levattn.training.config import TrainConfig, sections

# k=None stands for 32, or with eps for its bound head_dim / eps.
ATTENTION = {"attention": "dense", "k": None, "eps": None, "keep_prefix": 0, "local_window": None, "centre": False}


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """The text behind the colon of `--config file.py:...`, as values of the types of the defaults.

    Args:
      arg: Such as "k=32,attention=leverage"; None or "" for the defaults. A name alone stands for `name=True`. Where
        the default is None, numbers are read as numbers, "None" as None, and the rest as text.
      **defaults: Every name that may be given.

    Raises:
      ValueError: For a name that is not among the defaults, with the nearest that is, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, has_value, text = item.partition("=")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"the config takes no argument {name!r}{hint}. It takes {', '.join(defaults)}; a value with a comma in "
                f"it is set by the name of its field, such as --config.data.source='fake:num_classes=10,size=8'"
            )
        values[name] = _convert(name, text if has_value else "True", defaults[name])
    return ConfigDict(values, convert_dict=False)


def _convert(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    value = read_literal(text)
    if value is None or default is None:  # what the field may be is known where the config is validated
        return value
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name}={text!r} must be of type {type(default).__name__}, such as {default!r}")
    return value


def new_config(arg: ConfigDict) -> ConfigDict:
    """A config with a section for every part of `TrainConfig`, its attention filled in from the parsed argument."""
    config = sections(TrainConfig)
    config.model.attention.update(attention(arg))
    return config


def attention(arg: ConfigDict) -> ConfigDict:
    """The attention of a parsed argument, under the names of `AttentionSpec`."""
    fields = {name: arg[name] for name in ATTENTION if name != "attention"} | {"method": arg.attention}
    if arg.k is None and arg.eps is None:
        fields["k"] = 32
    return ConfigDict(fields)
