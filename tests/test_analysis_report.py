"""The report says what the rows say: no number in it has another source."""

import re

import pytest
from test_analysis_results import row

from levattn.analysis import findings, markdown_table, tidy_rows, write_report
from levattn.training.workdir import prepare_workdir, record_run

RECORD = {
    "command": "python scripts/run.py --seed=7",
    "time": "2001-02-03T04:05:06+00:00",
    "commit": "c0ffee",
    "dirty": True,
    "hardware": {"platform": "gpu", "device_kind": "Model 9000", "num_devices": 4, "num_processes": 1, "num_cpus": 12},
    "versions": {"python": "3.13.1", "jax": "0.12.0", "absent": None},
}
ROWS = [
    row("dense", 65, accuracy=0.975),
    row("leverage", 8, accuracy=0.40),
    row("leverage", 16, accuracy=0.755),
    row("kmeans", 8, accuracy=0.625),
    row("kmeans", 16, accuracy=0.755),
    row("random", 32, accuracy=0.8875),
    row("leverage", 16, "leverage k=16", accuracy=0.965),
]


def numbers(text):
    return re.findall(r"\d+(?:\.\d+)*", text)


def test_every_number_of_the_report_is_in_the_rows_or_on_record(tmp_path):
    text = write_report(tmp_path, ROWS, title="Comparison", record=RECORD).read_text()
    text, advice = text.split("## What to try next")
    assert "--option local_window=3x3`, and in a model with a class token `--option keep_prefix=1`" in advice
    for field in ("data.source", "model.num_classes", "data.image_size", "model.variant", "data.eval_split"):
        assert f"--config.{field}=" in advice
    allowed = numbers(markdown_table(tidy_rows(ROWS))) + numbers(str(RECORD))
    assert set(numbers(text)) <= set(allowed)
    assert len(numbers(text)) > 60


def test_the_sentences_name_dense_accuracy_the_best_method_at_each_k_and_training_from_scratch():
    dense, retrofits, trained = findings(ROWS)
    assert "97.50 % of 360 examples" in dense
    assert "kmeans at k = 8 (62.50 %, leverage 40.00 %)" in retrofits
    assert "leverage and kmeans at k = 16 (75.50 %)" in retrofits  # a tie names both
    assert "random at k = 32 (88.75 %)" in retrofits
    assert "k = 16, it reaches 96.50 %" in trained
    assert "afterwards, the same attention reaches 75.50 %" in trained


@pytest.mark.parametrize(
    "accuracy, examples, expected",
    [
        (0.90, 10_000, "below dense"),
        (0.99, 10_000, "above dense"),
        (0.96, 100, "100 examples cannot tell from dense"),
        (0.975, 10_000, "10000 examples cannot tell from dense"),
    ],
)
def test_a_difference_is_claimed_only_where_the_number_of_examples_carries_it(accuracy, examples, expected):
    rows = [row("dense", 65, accuracy=0.975), row("leverage", 16, "leverage k=16", accuracy)]
    assert expected in findings([r | {"examples": examples} for r in rows])[-1]


def test_what_was_not_run_is_not_spoken_of():
    assert findings([row("leverage", 8)])[0].startswith("When the same parameters")
    assert len(findings([row("dense", 65)])) == 1
    assert "dense" not in findings([row("leverage", 16, "leverage k=16")])[0]


def test_each_data_set_has_a_section_and_its_own_numbers(tmp_path):
    rows = [*ROWS, row("dense", 50, accuracy=0.8125, dataset="fashion_mnist", tokens=50)]
    text = write_report(tmp_path, rows, title="Two", record=RECORD).read_text()
    digits, fashion = re.findall(r"^## .*examples\n\n(.*)\n", text, re.M)
    assert "81.25" in fashion
    assert "81.25" not in digits
    assert "97.50" in digits


def test_figures_and_runs_are_linked_from_where_the_report_lies_and_training_commands_are_quoted(tmp_path):
    run = prepare_workdir(tmp_path / "runs" / "dense")
    record_run(run, {})
    figure = tmp_path / "plots here" / "a.png"
    path = write_report(
        tmp_path / "out", ROWS, title="T", figures={"Caption": figure}, runs={"dense": run}, record=RECORD
    )
    text = path.read_text()
    assert path == tmp_path / "out" / "report.md"
    assert "![Caption](../plots%20here/a.png)" in text
    assert "[../runs/dense](../runs/dense)" in text
    assert "# dense\n" in text
    assert RECORD["command"] in text
    assert "c0ffee, with changes" in text
    assert "4 x Model 9000, 12 CPU cores" in text
    assert "absent" not in text


def test_without_a_record_the_report_holds_that_of_this_process(tmp_path):
    assert "## What was run\n\n- Time: 20" in write_report(tmp_path, ROWS, title="T").read_text()


def test_a_report_on_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows"):
        write_report(tmp_path, [], title="T")
