"""scripts/universal_set.py on files: what it finds, what it refuses, and that it never leaves half a file."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

import levattn
from levattn.universal.files import load_set, open_keys, save_set
from levattn.universal.passes import file_universal_set
from levattn.universal.sets import UniversalSet
from tests import reference

ROOT = pathlib.Path(levattn.__file__).parents[1]
WIDTH, EPS = 5, 0.05


@pytest.fixture(scope="module")
def keys():
    return np.random.default_rng(0).standard_t(2, (700, WIDTH)).astype(np.float32)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the command line in this process; gives exit code, stdout and stderr."""
    spec = importlib.util.spec_from_file_location("universal_set_script", ROOT / "scripts" / "universal_set.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["universal_set.py", *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as done:
            code = done.code
        return code, *capsys.readouterr()

    return run


def _write_records(path, rows):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row.tobytes())
    writer.close()


def _expected(keys):
    return np.flatnonzero(reference.leverage_scores(keys) >= EPS)


def test_the_command_as_typed(tmp_path, keys):
    np.save(tmp_path / "keys.npy", keys)
    command = [sys.executable, ROOT / "scripts/universal_set.py", tmp_path / "keys.npy", "--eps=0.05"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'set.npz'}", "--chunk=100", "--precision=double"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = load_set(tmp_path / "set.npz")
    np.testing.assert_array_equal(found.indices, _expected(keys))
    np.testing.assert_array_equal(found.keys, keys[found.indices])
    assert f"{len(found)} of 700 keys of width 5" in done.stdout
    assert found.guarantee in done.stdout
    assert "700 keys" in done.stderr  # plain lines of progress where there is no terminal
    assert "\x1b" not in done.stderr
    with np.load(tmp_path / "set.npz") as arrays:
        assert "universal_set.py" in json.loads(str(arrays["provenance"]))["command"]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "records"])
def test_every_kind_of_file_gives_the_offline_set(tmp_path, script, keys, kind, passes):
    if kind == "records":
        path, stored = tmp_path / "keys.array_record", keys
        _write_records(path, keys)
    else:
        path, stored = tmp_path / "keys.npy", keys.astype(kind)
        np.save(path, stored)
    out = tmp_path / "set.npz"
    options = ["--record_dtype", "float32"] if kind == "records" else []
    code, _, err = script(path, "--eps", EPS, "--out", out, "--chunk", 64, "--passes", passes, *options)
    assert code == 0, err
    np.testing.assert_array_equal(load_set(out).indices, _expected(stored.astype(np.float32)))


def test_another_power(tmp_path, script, keys):
    np.save(tmp_path / "keys.npy", keys)
    code, out, err = script(
        tmp_path / "keys.npy", "--eps", 0.2, "--p", 1, "--out", tmp_path / "set.npz", "--chunk", 100
    )
    assert code == 0, err
    assert "f = |x|^1" in out
    assert len(load_set(tmp_path / "set.npz"))


def _empty(path, keys):
    path.write_bytes(b"")


def _cut(path, keys):
    np.save(path, keys)
    path.write_bytes(path.read_bytes()[:-100])


def _with_nan(path, keys):
    keys = keys.copy()
    keys[123, 1] = np.nan
    np.save(path, keys)


BAD_FILES = {
    "missing": (lambda path, keys: None, "is not a file"),
    "empty file": (_empty, "is an empty file"),
    "no rows": (lambda path, keys: np.save(path, keys[:0]), "holds no keys"),
    "cut short": (_cut, "cut short"),
    "not an array": (lambda path, keys: path.write_text("hello"), "cannot be read as a .npy file"),
    "pickled objects": (lambda path, keys: np.save(path, np.array([{}])), "cannot be read as a .npy file"),
    "three axes": (lambda path, keys: np.save(path, keys[None]), r"has shape (1, 700, 5)"),
    "integers": (lambda path, keys: np.save(path, keys.astype(int)), "holds int64"),
    "column order": (lambda path, keys: np.save(path, np.asfortranarray(keys)), "column order"),
    "NaN": (_with_nan, "first at position 123"),
    "beyond float32": (lambda path, keys: np.save(path, keys * np.float64(1e50)), "beyond the range of float32"),
    "smaller than float32": (
        lambda path, keys: np.save(path, keys * np.float64(1e-170)),
        "beyond the range of float32",
    ),
    "subnormal": (lambda path, keys: np.save(path, keys * np.float32(1e-41)), "700 keys are not 0, but below"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_leaves_the_old_result_alone(tmp_path, script, keys, name):
    make, message = BAD_FILES[name]
    make(tmp_path / "keys.npy", keys)
    (tmp_path / "set.npz").write_text("the old one")
    code, _, err = script(tmp_path / "keys.npy", "--eps", EPS, "--out", tmp_path / "set.npz", "--chunk", 64)
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("pass")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert (tmp_path / "set.npz").read_text() == "the old one"
    assert {p.name for p in tmp_path.iterdir()} <= {"keys.npy", "set.npz"}


def test_bad_records_are_named(tmp_path, script, keys):
    path, out = tmp_path / "keys.array_record", tmp_path / "set.npz"
    _write_records(path, [*keys[:70], keys[70, :3]])
    code, _, err = script(path, "--eps", EPS, "--out", out, "--chunk", 64, "--width", 5)
    assert code == 2
    assert "record 70 has 12 bytes, the first 20" in err
    _write_records(path, [np.zeros(3, np.int8)])
    assert "3 bytes is no row of float32" in script(path, "--eps", EPS, "--out", out, "--record_dtype", "float32")[2]
    path.write_bytes(b"nothing of the kind")
    assert "cannot be read as an ArrayRecord file" in script(path, "--eps", EPS, "--out", out)[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--eps", "0"], "eps=0.0 must be in (0, 1]"),
        (["--eps", "1.01"], "eps=1.01 must be in (0, 1]"),
        (["--eps", "nan"], "eps=nan must be in (0, 1]"),
        (["--eps", "0.1", "--p", "-1"], "p=-1.0 must be a positive number"),
        (["--eps", "0.1", "--p", "0.01"], "p=0.01 must be a positive number from 0.1 to 100"),
        (["--eps", "1e-30"], "eps=1e-30 must be at least 1e-20"),
        (["--eps", "0.1", "--chunk", "0"], "--chunk 0 must be at least 1"),
        (["--eps", "0.1", "--width", "64"], "has keys of width 5, not 64"),
        (["--eps", "0.1", "--out", "set.txt"], "must be the name of an .npz file"),
        (["--eps", "0.1", "--out", "/proc/nowhere/set.npz"], "cannot be written"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, script, keys, arguments, message):
    np.save(tmp_path / "keys.npy", keys)
    code, _, err = script(tmp_path / "keys.npy", "--out", tmp_path / "set.npz", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_any_number_of_workers_finds_the_same_set(tmp_path, keys, p, num_passes):
    np.save(tmp_path / "keys.npy", keys)
    file = open_keys(tmp_path / "keys.npy")
    for num_workers in (1, 3):
        told = []
        found = file_universal_set(
            file,
            EPS,
            p=p,
            num_passes=num_passes,
            chunk_rows=64,
            num_workers=num_workers,
            on_chunk=lambda *done, told=told: told.append(done),
        )
        assert set(_expected(keys)) <= set(found.indices) if p == 2 else len(found)
        assert len(found) == len(_expected(keys)) or p != 2
        np.testing.assert_array_equal(found.keys, keys[found.indices])
        assert told[-1] == (num_passes, 700)
    keys = keys.copy()
    keys[666, 0] = np.inf
    np.save(tmp_path / "keys.npy", keys)
    with pytest.raises(ValueError, match="first at position 666"):
        file_universal_set(file, EPS, p=p, num_passes=num_passes, chunk_rows=64, num_workers=3)


def test_a_part_of_a_file_is_read_as_that_part(tmp_path, keys):
    np.save(tmp_path / "keys.npy", keys)
    _write_records(tmp_path / "keys.array_record", keys)
    for name in ("keys.npy", "keys.array_record"):
        file = open_keys(tmp_path / name, head_dim=WIDTH)
        assert (file.num_keys, file.head_dim, file.num_bytes) == (700, WIDTH, keys.nbytes)
        np.testing.assert_array_equal(np.concatenate(list(file.chunks(64, 100, 333))), keys[100:333])


def test_a_set_goes_through_a_file_and_anything_else_is_refused(tmp_path, keys):
    universal = UniversalSet(np.array([3, 2**40]), np.array([0.5, 0.1], np.float32), 0.01, 12.5, "what holds")
    save_set(tmp_path / "set.npz", universal)
    loaded = load_set(tmp_path / "set.npz")
    np.testing.assert_array_equal(loaded.indices, universal.indices)
    assert (loaded.eps, loaded.size_bound, loaded.guarantee, loaded.keys) == (0.01, 12.5, "what holds", None)
    np.savez(tmp_path / "other.npz", keys=keys)
    np.save(tmp_path / "keys.npy", keys)
    (tmp_path / "text.npz").write_text("hello")
    for name in ("other.npz", "keys.npy", "text.npz"):
        with pytest.raises(ValueError, match="is not a file of a universal set"):
            load_set(tmp_path / name)


def test_control_c_ends_it_at_once_with_its_exit_code_and_no_file(tmp_path):
    np.save(tmp_path / "keys.npy", np.random.default_rng(0).normal(size=(100_000, 8)).astype(np.float32))
    command = [sys.executable, ROOT / "scripts/universal_set.py", tmp_path / "keys.npy", "--eps=0.01", "--p=1"]
    running = subprocess.Popen(
        [*command, f"--out={tmp_path / 'set.npz'}", "--chunk=200"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "pass 1" in running.stderr.readline()  # under way, with most of the file before it
    running.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = running.communicate(timeout=60)
    assert time.monotonic() - start < 5  # a second, on a machine that others use
    assert (running.returncode, out) == (130, "")
    assert [line for line in err.splitlines() if not line.startswith("pass")] == ["interrupted: nothing was written"]
    assert {path.name for path in tmp_path.iterdir()} == {"keys.npy"}


def test_the_byte_order_of_a_file_is_no_matter(tmp_path, script, keys):
    np.save(tmp_path / "keys.npy", keys.astype(">f4"))
    out = tmp_path / "set.npz"
    for passes in (1, 2):
        code, _, err = script(tmp_path / "keys.npy", "--eps", EPS, "--out", out, "--chunk", 64, "--passes", passes)
        assert code == 0, err
        np.testing.assert_array_equal(load_set(out).keys, keys[_expected(keys)])


def test_records_are_never_guessed_at(tmp_path, script, keys):
    path, out = tmp_path / "keys.array_record", tmp_path / "set.npz"
    _write_records(path, keys)
    for options, said in (
        ([], "no width (--width) was given: give record_dtype (--record_dtype), float32 for width 5"),
        (["--width", 7], "width 7 makes no float32 or float64"),
        (["--record_dtype", "foo"], "record_dtype='foo' (--record_dtype) is no dtype"),
        (["--record_dtype", "int32"], "must be of floating point"),
    ):
        code, _, err = script(path, "--eps", EPS, "--out", out, *options)
        assert (code, len(err.splitlines())) == (2, 1)
        assert said in err
    assert open_keys(path, head_dim=WIDTH).dtype == np.float32
    _write_records(path, keys.astype(np.float64))
    assert open_keys(path, head_dim=WIDTH).dtype == np.float64


@pytest.mark.parametrize(
    "options", [["--chunk", 10**30, "--p", 1], ["--eps", 1e-12], ["--workers", 10**6, "--chunk", 64]]
)
def test_numbers_beyond_those_of_the_file_count_as_those_of_the_file(tmp_path, script, keys, options):
    np.save(tmp_path / "keys.npy", keys)
    code, _, err = script(tmp_path / "keys.npy", "--eps", EPS, "--out", tmp_path / "set.npz", *options)
    assert code == 0, err
    found = load_set(tmp_path / "set.npz").indices
    if "--p" in options:
        assert len(found)
    else:
        np.testing.assert_array_equal(found, range(len(keys)) if "--eps" in options else _expected(keys))
