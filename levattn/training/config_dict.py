"""The strict way from a ConfigDict to frozen dataclasses, and back."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict, FieldReference

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain dicts; `from_config_dict(type(config), json.loads(json.dumps(...)))` gives it back."""
    return dataclasses.asdict(config)


def from_config_dict(cls: type[T], mapping: Any, *, name: str = "the config") -> T:
    """Builds nested frozen dataclasses from nested mappings, and reports everything that is wrong with them at once.

    Fields that the mapping leaves out take their defaults. Whole numbers are taken where a float is expected, lists and
    text such as "3x5" where a tuple is; nothing else is converted.

    Args:
      cls: A dataclass whose fields are annotated with scalars, literals, tuples, dataclasses or unions of these.
      mapping: A ConfigDict or dict; anything else, as JSON may hold, is refused.
      name: What errors call the mapping.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: One line for each unknown, missing, mistyped or out-of-range field: its dotted name, what was
        expected, what was given and the nearest valid name.
    """
    problems: list[str] = []
    mapping = _plain(mapping)
    if not hasattr(mapping, "items"):  # that of a config file that cannot be read raises the reason
        raise ValueError(f"{name} must be a record of fields, not {type(mapping).__name__}")
    config = _build(cls, mapping, "", list(_dotted_names(cls)), problems)
    if problems:
        raise ValueError("\n  ".join([f"{name} has fields that cannot be used:", *problems]))
    return config


def sections(cls: type) -> ConfigDict:
    """A ConfigDict with a section for each nested dataclass: where a config file starts, so that every field has a
    place and can be set on the command line.

    A ConfigDict holds a field to the type of its first value, and flags cannot set one whose value is None. Fields of
    several types (k, eps, local_window) are therefore here already, at their defaults and open to any value, which
    `from_config_dict` then checks.
    """
    config = ConfigDict()
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            config[field.name] = sections(hint)
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            config[field.name] = FieldReference(field.default, field_type=object)
    return config


def _build(cls: type, mapping: Mapping[str, Any], path: str, known: list[str], problems: list[str]) -> Any:
    hints, values, before = typing.get_type_hints(cls), {}, len(problems)
    for name, value in mapping.items():
        dotted = f"{path}{name}"
        if name in hints:
            values[name] = _convert(hints[name], value, dotted, known, problems)
        else:
            problems.append(f"{dotted}: there is no such field{_nearest(dotted, known)}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in mapping:
            problems.append(f"{path}{field.name}: is missing, expected {_describe(hints[field.name])}")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{path}{error}")
        return None


def _convert(expected: Any, value: Any, path: str, known: list[str], problems: list[str]) -> Any:
    """The value as `expected`; otherwise appends to `problems` why it is not."""
    value = _plain(value)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        attempts = []
        for option in arguments:
            attempts.append([])
            converted = _convert(option, value, path, known, attempts[-1])
            if not attempts[-1]:
                return converted
        # Of a mapping for a dataclass the inner problems say more than "expected A or B".
        inner = [found for option, found in zip(arguments, attempts, strict=True) if _fits_shape(option, value)]
        problems.extend(inner[0] if inner else [_mistyped(expected, value, path)])
        return None
    if dataclasses.is_dataclass(expected) and isinstance(value, Mapping):
        return _build(expected, value, f"{path}.", known, problems)
    if origin is tuple and isinstance(value, str) and re.fullmatch(r"\d+(x\d+)+", value):
        return _convert(expected, tuple(map(int, value.split("x"))), path, known, problems)
    if origin is tuple and isinstance(value, list | tuple):
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = (arguments[0],) * len(value) if many else arguments
        if len(kinds) == len(value):
            parts = zip(kinds, value, strict=True)
            return tuple(_convert(kind, part, f"{path}[{i}]", known, problems) for i, (kind, part) in enumerate(parts))
    elif origin in (dict, Mapping) or expected is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif expected is Any or expected is None:
        if expected is Any or value is None:
            return value
    elif expected is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            return float(value)
    elif isinstance(expected, type) and isinstance(value, expected) and isinstance(value, bool) == (expected is bool):
        return value
    problems.append(_mistyped(expected, value, path))
    return None


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int past every float
        return False


def _plain(value: Any) -> Any:
    if not isinstance(value, ConfigDict):  # which is no Mapping
        return value
    try:
        return value.to_dict()
    except TypeError as error:  # it sorts its names
        raise ValueError(f"names of fields must be text: {error}") from error


def _fits_shape(option: Any, value: Any) -> bool:
    if isinstance(value, Mapping):
        return dataclasses.is_dataclass(option)
    return isinstance(value, list | tuple) and typing.get_origin(option) is tuple


def _mistyped(expected: Any, value: Any, path: str) -> str:
    line = f"{path}: expected {_describe(expected)}, not {value!r} ({type(value).__name__})"
    names = [name for name in typing.get_args(expected) if isinstance(name, str)]
    return line + _nearest(value, names) if isinstance(value, str) and names else line


def _describe(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(repr(option) for option in arguments)
    if expected in (None, types.NoneType):
        return "None"
    return expected.__name__ if isinstance(expected, type) and not arguments else str(expected)


def no_such_field(name: str, classes: Iterable[type]) -> str | None:
    """What to say of a dotted name that is no field of any of these dataclasses; None if it is one."""
    known = [known for cls in classes for known in _dotted_names(cls)]
    return None if name in known else f"{name}: there is no such field{_nearest(name, known)}"


def _dotted_names(expected: Any, path: str = "") -> Iterator[str]:
    """Dotted names of all fields below a dataclass, also through unions and tuples of dataclasses."""
    if dataclasses.is_dataclass(expected):
        for name, hint in typing.get_type_hints(expected).items():
            yield f"{path}{name}"
            yield from _dotted_names(hint, f"{path}{name}.")
    for option in typing.get_args(expected):
        yield from _dotted_names(option, path)


def _nearest(name: str, known: list[str]) -> str:
    """The likeliest spelling: the last part of the name counts, the section breaks ties and forgives abbreviations."""

    def likeness(candidate: str) -> float:
        section, _, leaf = candidate.rpartition(".")
        own_section, _, own_leaf = name.rpartition(".")
        return difflib.SequenceMatcher(None, own_leaf, leaf).ratio() + 0.2 * (section == own_section)

    best = max(known, key=likeness, default=None)
    return "" if best is None or likeness(best) < 0.4 else f"; did you mean {best!r}?"
