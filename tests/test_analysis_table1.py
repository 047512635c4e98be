"""The table says what the runs say, what is missing, and how well the paper's own numbers are known."""

import csv
import json
import re

import numpy as np
import pytest

from levattn.analysis import paper
from levattn.analysis.ablations import ablation_rows, plot_ablations, training_curve, write_ablations
from levattn.analysis.table1 import Line, claims, table1_cells, write_table1

DENSE, AFTERWARDS, TRAINED = (
    Line("dense", None, "dense"),
    Line("leverage", 32, "dense"),
    Line("leverage", 32, "leverage"),
)


def write_run(folder, rows, losses=(), rates=(), batch_size=10):
    """A run that was evaluated: (attention, k, accuracy) each."""
    folder.mkdir(parents=True)
    fixed = {"dataset": "things", "tokens": 197, "model": "S/2", "options": None, "images_per_second": 7.0}
    rows = [{"attention": method, "k": k, "accuracy": acc, "loss": 1 - acc} | fixed for method, k, acc in rows]
    record = {"provenance": {"hardware": {"num_devices": 1, "device_kind": "some device"}}, "rows": rows}
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps({"batch_size": batch_size}))
    lines = [
        {"step": 5 * (i + 1), "train/loss": loss, "train/images_per_second": rate}
        for i, (loss, rate) in enumerate(zip(losses, rates, strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three seeds of a dense model and of one trained with leverage, whose last seed has not been evaluated."""
    dense = {
        seed: write_run(tmp_path / f"dense{seed}", [("dense", 197, accuracy), ("leverage", 32, accuracy / 2)])
        for seed, accuracy in enumerate((0.90, 0.92, 0.96))
    }
    leverage = {
        seed: write_run(tmp_path / f"lev{seed}", [("leverage", 32, accuracy)])
        for seed, accuracy in enumerate((0.88, 0.93))
    }
    return {("S/2", "dense", None): dense, ("S/2", "leverage", 32): leverage | {2: tmp_path / "unfinished"}}


def test_cells_are_means_and_spreads_over_seeds_and_compare_models_of_one_seed(runs):
    dense, afterwards, trained = table1_cells([DENSE, AFTERWARDS, TRAINED], runs)
    assert dense["accuracy"] == pytest.approx(np.mean([0.90, 0.92, 0.96]))
    assert dense["std"] == pytest.approx(np.std([0.90, 0.92, 0.96], ddof=1))
    assert (dense["of_dense"], dense["points_below_dense"]) == (1, 0)
    assert afterwards["accuracy"] == pytest.approx(dense["accuracy"] / 2)
    assert (trained["seeds"], trained["missing"]) == ([0, 1], [2])
    assert trained["of_dense"] == pytest.approx(np.mean([0.88 / 0.90, 0.93 / 0.92]))
    assert trained["points_below_dense"] == pytest.approx(np.mean([2, -1]))
    assert trained["points_below_dense_std"] == pytest.approx(np.std([2, -1], ddof=1))


def test_a_claim_holds_does_not_or_is_not_measured(runs, tmp_path):
    found = claims(table1_cells([DENSE, TRAINED], runs))
    assert [claim["holds"] for claim in found] == [True, True]
    write_run(tmp_path / "unfinished", [("leverage", 32, 0.80)])
    assert [claim["holds"] for claim in claims(table1_cells([DENSE, TRAINED], runs))] == [True, False]
    nothing = {key: {0: tmp_path / "nowhere"} for key in runs}
    assert [claim["holds"] for claim in claims(table1_cells([DENSE, TRAINED], nothing))] == [None, None]


def test_files_hold_the_same_numbers_and_say_what_is_missing(runs, tmp_path):
    cells = table1_cells([DENSE, AFTERWARDS, TRAINED], runs)
    write_table1(cells, tmp_path / "out", title="Things", command="python x.py", hardware=["some device"])
    with (tmp_path / "out/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == pytest.approx([cell["accuracy"] for cell in cells], abs=1e-6)
    assert rows[2]["seeds"] == "0 1"
    assert json.loads((tmp_path / "out/table.json").read_text())["cells"][0]["accuracies"] == {
        "0": 0.9,
        "1": 0.92,
        "2": 0.96,
    }
    text = (tmp_path / "out/table.md").read_text()
    assert "| leverage | 32 | leverage 32 | 90.50 ± 3.54 (2 of 3 seeds) | 99.43 |" in text
    assert "- S/2, leverage k=32, trained with leverage: seed 2" in text
    assert "some device" in text


def test_every_number_of_the_paper_carries_its_standing(runs, tmp_path):
    write_table1(table1_cells([DENSE, TRAINED], runs), tmp_path / "out", title="", command="", hardware=[])
    text = (tmp_path / "out/table.md").read_text()
    for number in paper.NUMBERS:
        marked = re.escape(f"{number.accuracy:.2f} ({number.standing})")
        assert re.search(marked, text)
    assert {number.standing for number in paper.NUMBERS} == {"unverified", "second hand"}
    theirs = text[text.index("The paper's, on ImageNet-1k") :]
    assert len(re.findall(r"\d+\.\d\d\b", theirs)) == len(
        re.findall(r"\d+\.\d\d \((?:unverified|second hand)\)", theirs)
    )


def test_seconds_of_training_follow_the_speed_of_each_interval_and_leave_compilation_out(tmp_path):
    rates = [1.0, 50.0, 100.0, 50.0, 2.0, 50.0]  # the first and, after an interruption, the fifth compile
    folder = write_run(tmp_path / "a", [("dense", 197, 0.9)], [3.0, 2.0, None, 1.0, 1.0, 1.0], rates, batch_size=10)
    curve = training_curve(folder)
    np.testing.assert_allclose(curve.steps, [5, 10, 15, 20, 25, 30])
    np.testing.assert_allclose(curve.seconds, np.cumsum([1, 1, 0.5, 1, 1, 1]))
    assert np.isnan(curve.loss[2])
    assert curve.images_per_second == 50.0
    assert training_curve(tmp_path) is None


def test_ablations_are_compared_with_dense_attention_and_drawn(tmp_path):
    def run(name, accuracy):
        row = [("dense" if name == "dense" else "leverage", 8, accuracy)]
        return {0: write_run(tmp_path / name, row, [2.0, 1.0, 0.5], [1.0, 50.0, 50.0])}

    folders = {"dense": run("dense", 0.9), "k_8": run("k_8", 0.8), "k_16": {0: tmp_path / "later"}}
    groups = {"references": ["dense"], "how many keys": ["k_8", "k_16"]}
    dense, k_8, k_16 = rows = ablation_rows(groups, folders)
    assert (k_8["group"], k_8["tokens"], k_8["step_ms"]) == ("how many keys", 197, 200)
    assert k_8["points_below_dense"] == pytest.approx(10)
    assert dense["points_below_dense"] == 0
    assert (k_16["accuracy"], k_16["missing"], k_16["train_seconds"]) == (None, [0], None)
    write_ablations(rows, folders, tmp_path / "out", command="python x.py", references=["dense"])
    with (tmp_path / "out/ablations.csv").open() as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == ["0.9", "0.8", ""]
    assert (tmp_path / "out/how_many_keys.png").stat().st_size > 10_000
    assert len(list((tmp_path / "out").iterdir())) == 3
    plot_ablations(rows, folders, tmp_path / "picture.svg", title="Keys")
    drawing = (tmp_path / "picture.svg").read_text()
    assert all(f"<!-- {text} -->" in drawing for text in ("k_8", "dense", "80.00", "seconds of training"))
    assert "<!-- k_16 -->" not in drawing
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_ablations([k_16], folders, tmp_path / "picture.svg", title="Keys")
