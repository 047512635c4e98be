"""What every refusal in this package shares: the field, the value, the nearest right name, the next step."""

import difflib
from collections.abc import Iterable


class ImageError(ValueError):
    """Bytes that are no usable image: damaged, of an unknown format, absurdly large."""


def unknown_name(field: str, value: str, choices: Iterable[str]) -> ValueError:
    """The error for a name that is none of `choices`, with the nearest of them."""
    choices = list(choices)
    nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"{field}={value!r} must be one of {', '.join(choices)}{hint}")
