"""Packs a page into one file: template, style, scripts and data."""

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from levattn.analysis.style import INK, METHOD_STYLES
from levattn.training.workdir import atomic_path, provenance

# In the order in which they need each other.
SCRIPTS = ("attention.js", "charts.js", "tables.js", "explorer.js", "main.js")
# Beside those of `levattn.analysis.style`: the rest of Okabe and Ito's palette, and tones of it.
_MORE_COLOURS = {
    "leverage_merged": "#E69F00",
    "leverage_groups": "#A6761D",
    "groups": "#56B4E9",
    "matched": "#7B61C9",
    "pivoted": "#8DA63B",
}


def write_page(
    path: str | os.PathLike,
    *,
    title: str,
    measurements: Mapping[str, Any] | None = None,
    explorer: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> int:
    """Writes the page, whole or not at all.

    It asks for nothing from anywhere, and needs a browser of 2023 or later (`DecompressionStream`).

    Args:
      path: Ends in .html; its folder is made.
      title: Heading.
      measurements: From `read_measurements`.
      explorer: From `explorer_payload`.
      record: What made the page. None: the `provenance` of this process.

    Returns:
      Bytes of the file.

    Raises:
      ValueError: There is nothing to show, another suffix, or a number that is not finite.
      OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise ValueError(f"{str(path)!r} must end in .html")
    if measurements is None and explorer is None:
        raise ValueError("measurements or explorer (--results or --checkpoint) must be given: there is nothing to show")
    payload = {
        "title": title,
        "provenance": provenance() if record is None else record,
        "colours": _colours(),
        **(measurements or {"tables": [], "points": [], "curves": []}),
        "explorer": explorer,
    }
    text = page_text(payload)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return len(text.encode())


def page_bytes(measurements: Mapping[str, Any] | None = None) -> int:
    """Bytes of a page but for the texts of its explorer, or a little more."""
    return (
        len(json.dumps(measurements))
        + sum(len(_part(name)) for name in (*SCRIPTS, "report.html", "report.css"))
        + 60_000
    )


def page_text(payload: Mapping[str, Any]) -> str:
    """The page as text."""
    # Within a script element nothing but "</script" or "<!--" ends what is data, and both begin with "<".
    data = json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    title = str(payload["title"]).replace("&", "&amp;").replace("<", "&lt;")
    scripts = "\n".join(_part(name) for name in SCRIPTS)
    parts = {"TITLE": title, "STYLE": _part("report.css"), "DATA": data, "SCRIPT": f'"use strict";\n{scripts}'}
    pieces = _part("report.html").split("@@")  # text and names in turn: what is put in is not looked at again
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _colours() -> dict[str, str]:
    colours = {method: colour for method, (colour, _) in METHOD_STYLES.items()} | _MORE_COLOURS
    # The ink of the page, which is light on dark where the reader has it so.
    return {method: "currentColor" if colour == INK else colour for method, colour in colours.items()}


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
