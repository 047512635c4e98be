"""Results survive the way to files and back, and every table shows what the rows say."""

import csv
import io
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from levattn.analysis import markdown_table, print_by_layer, print_table, read_results, tidy_rows, write_results
from levattn.analysis.rows import COLUMNS, is_as_trained
from levattn.attention.registry import METHODS

REQUIRED_FIRST = ["dataset", "model", "tokens", "attention", "k", "trained_with", "accuracy", "examples", "seconds"]


def row(attention="leverage", k=16, trained_with="dense", accuracy=0.5, **changes):
    return {
        "dataset": "digits",
        "model": "mu/1",
        "tokens": 65,
        "attention": attention,
        "k": k,
        "trained_with": trained_with,
        "accuracy": accuracy,
        "examples": 360,
        "seconds": 0.41,
        "top5": 1.0,
        "loss": 0.7,
        "images_per_second": 878.0,
    } | changes


fractions = st.floats(0, 1)
rows_strategy = st.lists(
    st.builds(
        row,
        attention=st.sampled_from([*METHODS, "by layer"]),
        k=st.integers(1, 65),
        trained_with=st.sampled_from(["dense", "leverage k=16", "leverage k=8 by layer", 'a, "b" | c']),
        accuracy=fractions,
        dataset=st.sampled_from(["digits", "fashion_mnist"]),
        top5=st.none() | fractions,
        loss=st.none() | st.floats(0, 50),
        seconds=st.floats(1e-3, 1e5),
        images_per_second=st.none() | st.floats(1e-2, 1e6),
    ),
    min_size=1,
    max_size=8,
)


@given(rows=rows_strategy)
def test_rows_read_back_from_csv_are_the_rows_written(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    written = write_results(rows, folder, record={"command": "test"})
    assert written == tidy_rows(rows)
    assert read_results(folder / "results.csv") == written
    assert json.loads((folder / "results.json").read_text()) == {"provenance": {"command": "test"}, "rows": written}
    with (folder / "results.csv").open(newline="") as file:
        assert next(csv.reader(file)) == [column for column in COLUMNS if any(r[column] is not None for r in written)]


@given(rows=rows_strategy)
def test_tidying_loses_no_row_changes_no_number_by_much_and_is_idempotent(rows):
    tidy = tidy_rows(rows)
    assert tidy_rows(tidy) == tidy
    assert sorted(r["accuracy"] for r in tidy) == pytest.approx(sorted(r["accuracy"] for r in rows), abs=1e-6)
    assert sorted(r["k"] for r in tidy) == sorted(r["k"] for r in rows)


def test_the_csv_starts_with_the_columns_that_other_programs_rely_on(tmp_path):
    write_results([row()], tmp_path, record={})
    header, line = (tmp_path / "results.csv").read_text().splitlines()
    assert header.split(",")[:9] == REQUIRED_FIRST
    assert line.startswith("digits,mu/1,65,leverage,16,dense,0.5,360,0.41")


def test_the_json_says_what_is_needed_to_run_it_again(tmp_path):
    write_results([row()], tmp_path / "new" / "folder")
    record = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())["provenance"]
    assert {"command", "time", "commit", "hardware", "versions"} <= set(record)


def test_reading_order_is_dense_first_then_registry_order_then_k():
    shuffled = [
        row("leverage", 16, "leverage k=16"),
        row("kmeans", 8),
        row("leverage", 32),
        row("leverage", 8),
        row("dense", 65),
    ]
    found = [(r["attention"], r["k"], r["trained_with"]) for r in tidy_rows(shuffled)]
    assert found == [
        ("dense", 65, "dense"),
        ("leverage", 8, "dense"),
        ("leverage", 32, "dense"),
        ("kmeans", 8, "dense"),
        ("leverage", 16, "leverage k=16"),
    ]


@pytest.mark.parametrize(
    "attention, k, trained_with, expected",
    [
        ("dense", 65, "dense", True),
        ("leverage", 16, "dense", False),
        ("leverage", 16, "leverage k=16", True),
        ("leverage", 8, "leverage k=16", False),
        ("dense", 65, "leverage k=16", False),
        ("leverage", 65, "leverage eps=0.1", True),
        ("by layer", 65, "dense by layer", True),
        ("dense", 65, "dense by layer", False),
    ],
)
def test_as_trained_means_the_same_method_with_the_same_number_of_keys(attention, k, trained_with, expected):
    assert is_as_trained(row(attention, k, trained_with)) is expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"accuracy": 97.8}, "accuracy=97.8 must be a fraction"),
        ({"accuracy": float("nan")}, "accuracy=nan must be"),
        ({"top5": -0.1}, "top5"),
        ({"k": 66}, r"k=66 must be in \[1, 65\]"),
        ({"examples": None}, "examples"),
        ({"acuracy": 0.5}, "unknown.*acuracy"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tidy_rows([row() | changes])


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"missing \['seconds'\]"):
        tidy_rows([{name: value for name, value in row().items() if name != "seconds"}])


def test_a_loss_that_diverged_is_an_empty_cell_not_a_crash_after_a_long_evaluation(tmp_path):
    write_results([row(loss=float("nan"))], tmp_path, record={})
    assert read_results(tmp_path / "results.csv")[0]["loss"] is None


def test_rows_of_a_probe_need_no_accuracy_and_the_best_of_them_is_the_best_probe(tmp_path, monkeypatch):
    """They come back from the CSV without the columns of a classification, and with their own."""
    probes = [
        row("dense", 65, probe=0.9, probe_std=0.01, knn=0.8, cosine=1.0, error=0.0, ms_per_image=0.2),
        row("random", probe=0.25, probe_std=0.01, knn=0.2, cosine=0.5, error=0.7, ms_per_image=0.1),
    ]
    probes = [r | dict.fromkeys(("accuracy", "top5", "loss", "images_per_second")) for r in probes]
    written = write_results(probes, tmp_path, record={}, error_by_layer={"dense": [0.0]})
    assert read_results(tmp_path / "results.csv") == written
    header = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    assert header[6:] == ["examples", "seconds", "probe", "probe_std", "knn", "cosine", "error", "ms_per_image"]
    assert json.loads((tmp_path / "results.json").read_text())["error_by_layer"] == {"dense": [0.0]}
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "150"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    print_table(probes, file)
    (bold,) = (line for line in file.getvalue().splitlines() if re.search(r"\x1b\[1m[^\x1b]*\d\d\.\d\d", line))
    assert "90.00" in bold
    with pytest.raises(ValueError, match=r"accuracy=None must be .* probe or cosine"):
        tidy_rows([row(accuracy=None)])
    with pytest.raises(ValueError, match=r"probe=1\.5 must be a fraction"):
        tidy_rows([row(probe=1.5)])


def test_a_table_by_layer_shows_every_layer():
    file = io.StringIO()
    print_by_layer("errors", {"k": [4, 12], "error": [0.5, 0.25]}, file)
    assert re.search(r"0 +4 +0\.500\s+1 +12 +0\.250", file.getvalue())


def test_another_csv_is_refused_by_its_name(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv.*not a table of results"):
        read_results(tmp_path / "other.csv")


def test_a_refused_row_leaves_the_old_files_alone(tmp_path):
    write_results([row()], tmp_path, record={})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError):
        write_results([row(k=66)], tmp_path, record={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def parse_markdown(text):
    """Cells of a Markdown table by an independent rule: split at bars that are not escaped."""
    lines = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    assert all(re.fullmatch(r"-+:?", c) for c in lines[1])
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


@given(rows=rows_strategy)
def test_the_markdown_table_says_what_the_rows_say(rows):
    rows = tidy_rows(rows)
    parsed = parse_markdown(markdown_table(rows))
    assert len(parsed) == len(rows)
    for shown, true in zip(parsed, rows, strict=True):
        for name in ("dataset", "model", "attention"):
            assert shown[name] == true[name]
        assert shown["trained with"] == true["trained_with"]
        for name in ("tokens", "k", "examples"):
            assert int(shown[name]) == true[name]
        assert float(shown["accuracy %"]) == pytest.approx(100 * true["accuracy"], abs=0.00501)
        assert (shown.get("loss", "") == "") == (true["loss"] is None)


def test_the_printed_table_is_plain_text_of_whole_cells_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    file = io.StringIO()
    print_table([row("dense", 65, accuracy=0.978), row(accuracy=0.75)], file)
    text = file.getvalue()
    assert "\x1b" not in text
    assert "…" not in text
    assert re.search(r"leverage +16 +dense +75\.00", text)
    assert "65 tokens" in text


def test_the_best_of_each_group_is_bold_on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = io.StringIO()
    rows = [row(accuracy=0.75), row("random", accuracy=0.25), row("leverage", 16, "leverage k=16", 0.125)]
    print_table(rows, file)
    bold = [line for line in file.getvalue().splitlines() if re.search(r"\x1b\[1m[^\x1b]*\d\d\.\d\d", line)]
    assert ["75.00" in bold[0], "12.50" in bold[1], len(bold)] == [True, True, 2]


def test_importing_the_package_loads_no_matplotlib():
    code = "import sys, levattn.analysis; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
