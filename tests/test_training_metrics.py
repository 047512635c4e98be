import io
import json
import math
import re
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from levattn.training.metrics import MetricWriter, Progress


def write_steps(workdir, steps, **kwargs):
    writer = MetricWriter(workdir, **kwargs)
    for step in steps:
        writer.write(step, {"loss": float(step)})
    writer.close()


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def refuse(text):
    raise ValueError(text)


def test_each_line_is_an_object_with_step_time_and_plain_numbers(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    before = time.time()
    writer.write(1, {"loss": jnp.float32(0.5), "top1": np.float64(0.25), "count": 7, "lr": jnp.bfloat16(2)})
    (line,) = read_lines(tmp_path)  # on disk at once, without a close
    assert line.pop("time") == pytest.approx(before, abs=5)
    assert line == {"step": 1, "loss": 0.5, "top1": 0.25, "count": 7, "lr": 2.0}


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    MetricWriter(tmp_path, tensorboard=False).write(1, {"a": math.nan, "b": math.inf, "c": jnp.nan, "d": 1.0})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1.0)


def test_a_resumed_run_leaves_each_step_once_and_in_order(tmp_path):
    """A run saved at 4, got to 6, was killed in the middle of a line, and goes on from 4."""
    write_steps(tmp_path, [2, 4, 6], tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    write_steps(tmp_path, [6, 8], start_step=4, tensorboard=False)
    assert [line["step"] for line in read_lines(tmp_path)] == [2, 4, 6, 8]


def test_damaged_lines_inside_the_file_are_dropped_and_counted_aloud(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4], tensorboard=False)
    path = tmp_path / "metrics.jsonl"
    one, two, three, four = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one + two.replace(b"loss", b"l\xffss") + b'{"step": 2, "lo' + three + b"[" * 5000 + b"\n" + four)
    with pytest.warns(RuntimeWarning, match=r"^3 damaged lines of .*metrics\.jsonl' were dropped; training goes on$"):
        writer = MetricWriter(tmp_path, start_step=4, tensorboard=False)
    writer.write(5, {"loss": 5.0})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 4, 5]


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    write_steps(tmp_path, [0, 2], tensorboard=False)
    write_steps(tmp_path, [0, 1], tensorboard=False)
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 1]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    """Read back with the record format of the event files, by tensorboardX's own message type."""
    from tensorboardX.proto.event_pb2 import Event

    write_steps(tmp_path, [1, 2])
    values = []
    for path in (tmp_path / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            values += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    assert values == [(1, "loss", 1.0), (2, "loss", 2.0)]


def test_a_sink_that_fails_warns_once_and_the_others_go_on(tmp_path):
    """The file cannot be opened, as its name is taken by a folder; it works again when the folder is gone."""
    writer = MetricWriter(tmp_path)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl.*training goes on"):
        writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 1.0})  # a second warning would be an error here
    (tmp_path / "metrics.jsonl").rmdir()
    writer.write(4, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [4]


def test_training_goes_on_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # what an import of a missing package does
    with pytest.warns(RuntimeWarning, match="TensorBoard"):
        writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert len(read_lines(tmp_path)) == 1


def test_off_a_terminal_progress_is_plain_lines():
    stream = io.StringIO()
    with Progress(total_steps=1000, batch_size=128, stream=stream) as progress:
        time.sleep(0.02)
        rate = progress.update(100, {"loss": jnp.float32(1.2341), "accuracy": 0.91, "learning_rate": 1e-3})
        progress.log("evaluated [not markup]")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 100/1000  loss 1\.234  acc 0\.91  \d+ images/s  ETA 0:00", first)
    assert f"{rate:.0f} images/s" in first
    assert second == "evaluated [not markup]"


def test_speed_is_that_since_the_last_update_without_pauses(monkeypatch):
    """100 steps of 32 images take 10 s and 20 s; the 60 s of an evaluation do not count."""
    clock = iter([0.0, 10.0, 11.0, 71.0, 90.0]).__next__
    monkeypatch.setattr(time, "perf_counter", clock)
    stream = io.StringIO()
    progress = Progress(total_steps=70_200, batch_size=32, start_step=0, stream=stream)
    assert progress.update(100, {}) == pytest.approx(320)
    with progress.paused():
        pass
    assert progress.update(200, {}) == pytest.approx(160)
    assert [line.split("ETA ")[1] for line in stream.getvalue().splitlines()] == ["1:56:50", "3:53:20"]


def test_a_resumed_run_does_not_count_the_steps_it_was_given(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 1.0]).__next__)
    assert Progress(100, batch_size=8, start_step=50, stream=io.StringIO()).update(60, {}) == pytest.approx(80)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(total_steps=10, batch_size=8, stream=stream) as progress:
        progress.update(5, {"loss": 0.5})
        progress.log("evaluated [not markup]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"5/10 .*loss 0\.5 .*images/s .*ETA 0:00", text)
    assert "evaluated [not markup]" in text
