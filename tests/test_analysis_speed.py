import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from levattn.analysis.speed import plot_times

RESULTS = Path(__file__).parent.parent / "results/attention/h100_bfloat16.json"


def test_the_picture_names_the_lines_and_the_ratio_at_most_tokens(tmp_path):
    def row(name, is_dense, case, ms):
        return {"name": name, "is_dense": is_dense, "direction": "forward", "case": case, "ms": ms}

    rows = [
        row("slow", True, "1x100x2", 9.0),
        row("fast", True, "1x100x2", 3.0),
        row("leverage", False, "1x100x2", 2.0),
    ]
    rows += [
        row("fast", True, "1x1000x2", 80.0),
        row("slow", True, "1x1000x2", None),
        row("leverage", False, "1x1000x2", 4.0),
    ]
    plot_times(rows, tmp_path / "times.svg")
    drawing = (tmp_path / "times.svg").read_text()
    ElementTree.fromstring(drawing)
    assert all(f"<!-- {text} -->" in drawing for text in ("fastest dense", "leverage", "20 x", "1,000"))


def test_what_has_no_times_is_refused(tmp_path):
    rows = [dict(row, ms=None) for row in json.loads(RESULTS.read_text())["rows"]]
    with pytest.raises(ValueError, match="no row has a time"):
        plot_times(rows, tmp_path / "times.svg")
