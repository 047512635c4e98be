"""How pictures look: one style, colours that the colour-blind tell apart, and one place that loads matplotlib."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from levattn.training.workdir import atomic_path

INK, MUTED, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
# Okabe and Ito's palette: distinct under the common kinds of colour blindness; the markers differ as well.
METHOD_STYLES = {
    "leverage": ("#D55E00", "o"),
    "row_norm": ("#0072B2", "s"),
    "random": ("#7F7F7F", "v"),
    "kmeans": ("#009E73", "D"),
    "oracle": ("#CC79A7", "^"),
    "dense": (INK, "P"),
}
_OTHER_STYLE = ("#56B4E9", "X")

_RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine, no glyph missing
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.hashsalt": "levattn",  # the same picture is the same file
}


def method_style(method: str) -> tuple[str, str]:
    """Colour and marker of an attention method."""
    return METHOD_STYLES.get(method, _OTHER_STYLE)


@contextlib.contextmanager
def new_figure(path: str | os.PathLike, width: float, height: float, dpi: int = 140) -> Iterator[Any]:
    """Yields a matplotlib figure to draw on and writes it, whole or not at all, when the block ends.

    Args:
      path: Ends in .png or .svg; its folder is made.
      width: In inches.
      height: In inches.
      dpi: Pixels an inch of a PNG.

    Raises:
      ValueError: For another suffix.
      OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{str(path)!r} must end in .png or .svg")
    import matplotlib  # takes half a second, needed by nobody who draws nothing
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=dpi, metadata=metadata, facecolor="white")
