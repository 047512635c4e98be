"""Trains a small model while doing to it what happens to long runs, and compares it with one that was left alone.

    python scripts/soak.py --minutes 10 --out results/faults/soak.json

Runs `train.py` on scikit-learn's digits again and again in one workdir. Each time it is killed (SIGKILL) or told to
stop (SIGTERM) at a random moment, at start-up and in the middle of saves too, or the process that prepares its data is
killed, or stopped (SIGSTOP), so that the run hangs and must find out by itself. Between two runs a file of the newest
checkpoint may be damaged, never one of the last sound checkpoint. When a training has come to its end before the time
is up, another one begins with the next seed. At the end of each its parameters must equal those of an undisturbed run
bit for bit; exits with 1 if they do not, or if a run ends as it should not.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from levattn.training.checkpoint import committed_steps
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE
from levattn.training.manifest import verify_manifest
from levattn.training.metrics import METRICS_FILE
from levattn.training.signals import EXIT_STOPPED
from levattn.training.watchdog import EXIT_HUNG
from levattn.training.workdir import prepare_workdir, provenance, write_json

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300  # for what must come to an end by itself, with a wide margin: the cores may be busy
HANG_TIMEOUT_S = 6  # longer once it has been too short for a start on a busy machine
KILLED, STOPPED = "data worker killed", "data worker stopped"
KINDS = ("SIGKILL", KILLED, "SIGTERM", STOPPED)
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "data": {"source": "digits", "flip": True},
        "model": {
            "variant": "Ti/2", "width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64, "num_classes": 10, "dropout": 0.1
        },
        "optimizer": {"learning_rate": 3e-3},
        "loss": {"mixup_alpha": 0.2},
        "checkpoint": {"every_steps": 10, "keep_last": 3},
        "ema_decay": 0.99,
        "batch_size": 64,
        "log_every_steps": 1,
    })
"""


class Run:
    """One process of train.py, whose words are kept in a file."""

    def __init__(
        self, folder: Path, workdir: Path, seed: int, steps: int, kind: str | None = None, patience: float = 1
    ):
        self.log = folder / "log.txt"
        command = [sys.executable, str(ROOT / "train.py"), f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
        command += [
            f"--config.seed={seed}",
            f"--config.total_steps={steps}",
            f"--config.data.num_workers={int(kind in (KILLED, STOPPED))}",
        ]
        command += [f"--config.hang_timeout={HANG_TIMEOUT_S * patience}"] if kind == STOPPED else []
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with self.log.open("w") as log:
            environment = {"JAX_PLATFORMS": "cpu"} | os.environ | cache
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits for a condition; whether the process is still there."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline and not condition():
            time.sleep(0.01)
        return self.process.poll() is None

    def is_training(self) -> bool:
        """Whether it has taken a step."""
        return re.search(r"^step ", self.text(), re.M) is not None

    def end(self, timeout: float = LIMIT_S) -> int | None:
        """The exit code; None if it had to be killed as it did not end by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def data_workers(self) -> list[int]:
        """Processes that this one has started, but for the one that looks after their shared memory."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"resource_tracker" not in (folder / "cmdline").read_bytes():
                    pids.append(int(folder.name))
            except OSError:  # it has just ended
                continue
        return pids


@dataclasses.dataclass
class Tally:
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    recoveries: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)
    too_early: int = 0
    starts: int = 0
    steps_needed: int = 0
    steps_repeated: int = 0
    trainings: int = 0

    def first_missing(self, kinds: list[str]) -> str | None:
        """The first of some kinds of faults that has not happened yet."""
        return next((kind for kind in kinds if not self.faults[kind]), None)


def damage_newest(workdir: Path, rng: random.Random, tally: Tally) -> None:
    """Damages one file of the newest checkpoint, if another sound one is left."""
    folder = workdir / CHECKPOINT_FOLDER
    sound = [step for step in committed_steps(folder) if not verify_manifest(folder / str(step))]
    if len(sound) < 2:
        return
    path = rng.choice(sorted(path for path in (folder / str(sound[-1])).rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    kind = rng.choice(["bit flipped", "file truncated", "file deleted"] if content else ["file deleted"])
    if kind == "bit flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "file truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.unlink()
    tally.faults[kind] += 1


def last_logged_step(workdir: Path) -> int:
    lines = (workdir / METRICS_FILE).read_text().splitlines() if (workdir / METRICS_FILE).exists() else []
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:  # torn by a kill
            continue
    return max(steps, default=0)


def disturb(run: Run, workdir: Path, kind: str, delay: float, rng: random.Random, tally: Tally) -> None:
    """Lets a fault happen to a run, some seconds after its first step or at start-up, and checks how it ends."""
    is_first = not tally.faults[kind]
    if rng.random() < 0.2 and not is_first:
        time.sleep(rng.uniform(0.5, 2 * delay))
    elif run.wait_until(run.is_training):
        time.sleep(rng.uniform(0, delay))
    if is_first:  # of its kind: with something to go on from, and something to damage
        run.wait_until(lambda: len(committed_steps(workdir / CHECKPOINT_FOLDER)) > 1)
    if run.process.poll() is not None:  # it was faster
        tally.too_early += run.end() == EXIT_HUNG
        return
    is_training = run.is_training()
    if kind in (KILLED, STOPPED) and not (workers := run.data_workers()):
        kind = "SIGKILL"
    if kind in (KILLED, STOPPED):
        os.kill(rng.choice(workers), signal.SIGKILL if kind == KILLED else signal.SIGSTOP)
        tally.faults[kind] += 1
        code = run.end(timeout=60 + HANG_TIMEOUT_S * 2**tally.too_early)
        wanted = {2 if kind == KILLED else EXIT_HUNG, 0}  # 0: it had all the batches that it needed
        if code is None or (is_training and code not in wanted):
            tally.problems.append(
                f"exit code {code}, one of {sorted(wanted)} was due in a minute: {kind}\n{run.text()[-2000:]}"
            )
        tally.recoveries["found that it hung, and ended"] += code == EXIT_HUNG
        return
    run.process.send_signal(signal.SIGKILL if kind == "SIGKILL" else signal.SIGTERM)
    tally.faults[kind] += 1
    code = run.end()
    wanted = {-signal.SIGKILL} if kind == "SIGKILL" else {EXIT_STOPPED, 0}
    if kind == "SIGTERM" and (not is_training or (workdir / EXPORT_FILE).exists()):
        wanted.add(-signal.SIGTERM)  # before its first step, or when all had been written: there is nothing to save
    if code not in wanted:
        tally.problems.append(f"exit code {code} after {kind}, one of {sorted(wanted)} was due:\n{run.text()[-2000:]}")
    elif code == EXIT_STOPPED:
        tally.recoveries["saved on SIGTERM"] += 1


def train_disturbed(folder: Path, workdir: Path, seed: int, args: argparse.Namespace, end: float, rng, tally) -> None:
    reached = 0
    while not (workdir / EXPORT_FILE).exists():
        is_over = time.monotonic() > end and tally.first_missing(args.kinds) is None
        kind = rng.choice((KILLED, STOPPED) if rng.random() < args.worker_share else ("SIGKILL", "SIGTERM"))
        kind = None if is_over else tally.first_missing(args.kinds) or kind
        run = Run(folder, workdir, seed, args.steps, kind, patience=2**tally.too_early)
        tally.starts += 1
        if is_over:
            code = run.end()
            if code != 0:
                tally.problems.append(f"exit code {code} of a run that was left alone:\n{run.text()[-2000:]}")
        else:
            disturb(run, workdir, kind, args.delay, rng, tally)
        words = run.text()
        resumed = re.search(r"going on from step (\d+)", words)
        if resumed or run.is_training():
            start = int(resumed[1]) if resumed else 0
            tally.steps_repeated += max(reached - start, 0)
            tally.recoveries["went on from a checkpoint" if start else "began anew, nothing was saved yet"] += 1
            tally.recoveries["fell back from a damaged checkpoint"] += "is DAMAGED" in words
            reached = last_logged_step(workdir)
        if tally.problems:
            return
        if not is_over and rng.random() < args.damage_share:
            damage_newest(workdir, rng, tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults are injected")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what happens once in any time")
    parser.add_argument("--steps", type=int, default=2000, help="length of one training")
    parser.add_argument("--seed", type=int, default=0, help="of the faults, and of the first training")
    parser.add_argument("--delay", type=float, default=4.0, help="most seconds from the first step to the fault")
    parser.add_argument("--damage_share", type=float, default=0.4, help="of the restarts with a damaged checkpoint")
    parser.add_argument("--worker_share", type=float, default=0.15, help="of the runs with a data worker as the victim")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.out:
        prepare_workdir(args.out.parent, flag="out")
    rng, tally = random.Random(args.seed), Tally()
    started = time.monotonic()
    end = started + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "config.py").write_text(CONFIG)
        while (time.monotonic() < end or tally.first_missing(args.kinds) is not None) and not tally.problems:
            seed = args.seed + tally.trainings
            for workdir in (folder / "alone", folder / "disturbed"):
                shutil.rmtree(workdir, ignore_errors=True)
            alone = Run(folder, folder / "alone", seed, args.steps)
            if alone.end() != 0:
                sys.exit(f"the undisturbed run failed:\n{alone.text()[-2000:]}")
            train_disturbed(folder, folder / "disturbed", seed, args, end, rng, tally)
            if tally.problems:
                break
            exports = [(folder / name / EXPORT_FILE).read_bytes() for name in ("alone", "disturbed")]
            tally.trainings += 1
            tally.steps_needed += args.steps
            if exports[0] != exports[1]:
                tally.problems.append(f"seed {seed}: the final parameters differ from those of the undisturbed run")
    report(args, tally, time.monotonic() - started)
    sys.exit(1 if tally.problems else 0)


def report(args: argparse.Namespace, tally: Tally, seconds: float) -> None:
    rows = [("faults injected", "", sum(tally.faults.values()))]
    rows += [("", name, count) for name, count in sorted(tally.faults.items())]
    rows += [("recoveries", name, count) for name, count in sorted(tally.recoveries.items()) if count]
    rows += [("starts", "", tally.starts), ("trainings", "bitwise as undisturbed", tally.trainings)]
    repeated = tally.steps_repeated / max(tally.steps_needed, 1)
    rows += [("steps repeated", f"{repeated:.1%} of {tally.steps_needed}", tally.steps_repeated)]
    print(f"{seconds / 60:.1f} minutes")
    for row in rows:
        print(f"{row[0]:16} {row[1]:40} {row[2]:6}")
    for problem in tally.problems:
        print(f"PROBLEM: {problem}")
    if args.out:
        figures = {**vars(tally), "seconds": round(seconds, 1), "arguments": vars(args) | {"out": None}}
        write_json(args.out, figures | {"provenance": provenance()})


if __name__ == "__main__":
    main()
