"""Whole models are timed as they are trained and evaluated, and what cannot run is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from levattn.bench.models import Case, parse_cases

ROOT = Path(__file__).parent.parent


def test_cases_by_name_and_by_sizes():
    assert parse_cases("paper,S/14:32:518")[2:] == [Case("L/8", 16), Case("S/14", 32, 518)]
    with pytest.raises(ValueError, match="case 'S/14' must be"):
        parse_cases("S/14")


def test_the_script_times_both_passes_under_each_attention(tmp_path):
    out = tmp_path / "model.json"
    command = f"scripts/bench_model.py --cases mu/16:2:64 --k 4 --dtype float32 --repeats 2 --timm --out {out}"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    timed = [row for row in rows if row["attention"] != "timm"]
    assert [(row["pass"], row["attention"]) for row in timed] == [
        (name, attention) for name in ("forward", "train") for attention in ("dense", "leverage k=4")
    ]
    for row in timed:
        assert 0 < row["fastest_ms"] <= row["ms"] <= row["slowest_ms"]
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
    reason = next(row for row in rows if row["attention"] == "timm")["why_not"]
    assert "timm has no mu/16" in reason or "not installed" in reason
