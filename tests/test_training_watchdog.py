"""A hang ends a process in time, and nothing else does. Each case is a process of its own; all of them run at once."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 1.0
# Every case is run by a child, which ends with code 0 if the watchdog does not end it.
SCRIPT = """
    import atexit, contextlib, ctypes, json, multiprocessing, os, signal, socket, sys, time
    import jax
    from levattn.training import cli, watchdog

    LIMIT_S = float(sys.argv[1])

    def hang_in_python(watch):
        watch.beat("reading", 7)
        time.sleep(60)

    def hang_outside_of_python(watch):
        watch.beat("reading", 7)
        ctypes.CDLL(None).pause()

    def hang_with_nobody_to_read_the_report(watch):
        watchdog._MAX_REPORT_S = 0.5
        read, write = os.pipe()
        os.dup2(write, 2)
        os.set_blocking(2, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(2, bytes(4096)):
                pass
        os.set_blocking(2, True)
        hang_in_python(watch)

    def hang_beside_a_stopped_child(watch):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
        child.start()
        os.kill(child.pid, signal.SIGSTOP)
        print(child.pid, flush=True)
        hang_in_python(watch)

    def many_beats(watch):
        end = time.monotonic() + 3 * LIMIT_S
        while time.monotonic() < end:
            watch.beat("reading", 7)
            time.sleep(LIMIT_S / 100)

    def a_long_rest(watch):
        watch.beat("reading", 7)
        watch.rest()
        time.sleep(3 * LIMIT_S)

    def no_beat_yet(watch):
        time.sleep(3 * LIMIT_S)

    def a_first_call_that_takes_long(watch):
        call = watch.resting_at_first(time.sleep, "computing")
        call(1, 3 * LIMIT_S)
        watch.beat("reading", 2)

    def a_second_call_that_takes_long(watch):
        call = watch.resting_at_first(time.sleep, "computing")
        call(1, 0)
        call(2, 60)

    def a_hang_behind_a_first_call(watch):
        call = watch.resting_at_first(time.sleep, "computing")
        call(2, 0)
        time.sleep(60)

    def stopped_from_outside(watch):
        watch.beat("reading", 7)
        time.sleep(0.2 * LIMIT_S)  # for the watchdog to look, before and after
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.2 * LIMIT_S)

    def turned_off(watch):
        with watchdog.Watchdog(0) as other:
            other.beat("reading", 7)
            time.sleep(3 * LIMIT_S)

    def an_error_in_a_run_of_one(watch):
        try:
            with contextlib.ExitStack() as stack:
                stack.push(watch.end_if_lost)
                raise jax.errors.JaxRuntimeError("INTERNAL: something")
        except jax.errors.JaxRuntimeError:
            pass

    def an_error_in_one_of_two_processes(watch):
        '''The other one never ends, and would have to for an orderly end of this one.'''
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        other = os.fork()
        is_other = other == 0
        jax.distributed.initialize(address, 2, int(is_other))
        if is_other:
            time.sleep(60)
        print(other, flush=True)
        try:
            with cli._waiting_for_others_no_longer_than(LIMIT_S):
                sys.exit(2)
        finally:
            atexit._run_exitfuncs()

    def run(case):
        started = time.monotonic()
        if case is an_error_in_one_of_two_processes:
            return case(None)  # JAX is not to be started before it meets the other
        with watchdog.Watchdog(LIMIT_S) as watch:
            case(watch)

    def state_of(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    children = {}
    for name, case in list(globals().items()):
        if callable(case) and getattr(case, "__module__", None) == "__main__" and case not in (run, state_of):
            out, words = os.pipe(), os.pipe()
            pid = os.fork()
            if pid == 0:
                os.dup2(out[1], 1), os.dup2(words[1], 2)
                try:
                    run(case)
                except BaseException as error:
                    os.write(2, repr(error).encode())
                    os._exit(1)
                os._exit(0)
            os.close(out[1]), os.close(words[1])
            children[pid] = name, time.monotonic(), out[0], words[0]
    (pid,) = (pid for pid, (name, *_) in children.items() if name == "stopped_from_outside")
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    time.sleep(2 * LIMIT_S)
    os.kill(pid, signal.SIGCONT)
    results = {}
    for pid in list(children):
        pid, status = os.wait()
        name, started, out, words = children[pid]
        seconds = time.monotonic() - started
        left = None
        if name in ("hang_beside_a_stopped_child", "an_error_in_one_of_two_processes"):
            other = int(os.read(out, 100))
            deadline = time.monotonic() + 3
            while (left := state_of(other)) == "T" and time.monotonic() < deadline:
                time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        results[name] = [os.waitstatus_to_exitcode(status), seconds, left, os.read(words, 1 << 20).decode()]
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(LIMIT_S)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


HANGS = [
    "hang_in_python",
    "hang_outside_of_python",
    "hang_beside_a_stopped_child",
    "a_second_call_that_takes_long",
    "a_hang_behind_a_first_call",
]


@pytest.mark.parametrize("case", HANGS)
def test_a_hang_ends_the_process_in_time_and_says_where_it_was(results, case):
    code, seconds, _, words = results[case]
    assert code == 69, words
    assert LIMIT_S < seconds < 20  # it also starts JAX, and the cores may be busy
    step, doing = (2, "computing") if "call" in case else (7, "reading")
    place = f"process 0 of 1, step {step}, {doing} since 20"
    warning, _, report = words.partition("error: ")
    assert f"\n{place}" in warning  # after a tenth of the time
    assert "of hang_timeout=1\n" in warning
    assert report.startswith(place)
    assert "no sign of life for hang_timeout=1 s" in report
    assert f"in {case}\n" in report  # the stack of the thread that hangs


def test_a_report_that_nobody_takes_does_not_hold_the_end_up(results):
    assert results["hang_with_nobody_to_read_the_report"][0] == 69


def test_a_stopped_child_does_not_outlive_the_process(results):
    assert results["hang_beside_a_stopped_child"][2] in ("Z", "X", "gone")  # and not "T", as it was


@pytest.mark.parametrize(
    "case",
    [
        "many_beats",
        "a_long_rest",
        "no_beat_yet",
        "a_first_call_that_takes_long",
        "stopped_from_outside",
        "turned_off",
        "an_error_in_a_run_of_one",
    ],
)
def test_nothing_else_ends_a_process(results, case):
    assert results[case][0] == 0, results[case]


def test_an_error_of_one_of_two_processes_ends_it_though_the_other_does_not_end(results):
    code, seconds, _, words = results["an_error_in_one_of_two_processes"]
    assert code == 2, words
    assert seconds < 30
