"""The command that makes the paper's table: what it plans, and from nothing to a table in processes of its own."""

import argparse
import json
import sys

import pytest

from scripts import reproduce_table1

TINY = ("model.depth=1", "model.width=16", "model.mlp_dim=16", "model.num_heads=2", "total_steps=2", "ema_decay=None")


@pytest.mark.parametrize(
    "flags, models",
    [
        ({}, ["S/2", "S/1"]),
        ({"tokens": "197"}, ["S/2"]),
        ({"tokens": "197,785", "variant": "Ti"}, ["Ti/2", "Ti/1"]),
        ({"dataset": "imagenet2012"}, ["S/16", "L/16", "L/8"]),
        ({"dataset": "imagenet2012", "variant": "L", "tokens": "785"}, ["L/8"]),
        ({"dataset": "folder:here", "models": "Ti/16"}, ["Ti/16"]),
    ],
)
def test_columns_are_models_or_one_size_at_the_tokens_of_the_paper(flags, models):
    given = {"dataset": "fashion_mnist", "models": None, "tokens": None, "variant": None} | flags
    assert reproduce_table1.models_of(argparse.Namespace(**given)) == models


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--tokens", "196"), "tokens='196' must be"),
        (("--models", "S/3"), "models='S/3' must have patches"),
        (("--models", "S/2", "--tokens", "197"), "either models or tokens"),
        (("--inference", "leverag"), "did you mean 'leverage'"),
        (("--dataset", "mnist"), "dataset='mnist' must be one of"),
        (("--k", "198"), "k=198 must be at most 197"),
        (("--seeds_of", "S/8=0"), "seeds_of="),
        (("--scratch", "many"), "scratch='many' must be"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused_at_once(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce_table1.py", *flags, "--workdir", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as end:
        reproduce_table1.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_makes_what_it_can_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    settings = [part for setting in TINY for part in ("--set", setting)]
    flags = ["--dataset", "digits", "--inference", "row_norm", "--k", "8", "--scratch", "8", "--seeds", "0"]
    argv = ["reproduce_table1.py", *flags, "--workdir", str(tmp_path), "--only", "dense/*", *settings]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        reproduce_table1.main()
    written = capsys.readouterr().out
    assert end.value.code == 0, written
    assert "[2/2] mu-1/dense/seed0/eval: done" in written
    assert "- mu/1, leverage k=8, trained with leverage: seed 0" in written
    dense, row_norm, trained = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert (dense["tokens"], dense["dataset"], trained["accuracy"]) == (65, "digits", None)
    assert (row_norm["attention"], row_norm["k"], row_norm["trained_with"]) == ("row_norm", 8, "dense")
    rows = json.loads((tmp_path / "mu-1/dense/seed0/results.json").read_text())["rows"]
    assert [dense["accuracy"], row_norm["accuracy"]] == [row["accuracy"] for row in rows]


def test_a_setting_may_be_of_one_model():
    flags = {
        "dataset": "fashion_mnist",
        "models": "S/2,S/1",
        "tokens": None,
        "variant": None,
        "keep_prefix": 1,
        "k": 32,
    }
    flags |= {"inference": "leverage", "scratch": "", "seeds": "0,1", "seeds_of": ["S/1=5"]}
    settings = ["batch_size=128", "S/1:accumulate_steps=2"]
    runs = {run.name: run for _, _, run in reproduce_table1.runs_of(argparse.Namespace(**flags, settings=settings))}
    assert [*runs] == ["S-2/dense/seed0", "S-2/dense/seed1", "S-1/dense/seed5"]
    assert runs["S-2/dense/seed1"].settings == ("batch_size=128", "seed=1")
    assert runs["S-1/dense/seed5"].settings == ("batch_size=128", "accumulate_steps=2", "seed=5")
