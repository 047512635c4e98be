"""Scripts in processes of their own that start at once: forked from one that has imported everything.

Nothing of JAX runs in the parent, so a child is what a new process would be; it ends as one, too, by any signal.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

_PARENT = """
import atexit, gc, json, os, runpy, sys, traceback
import jax, ml_collections.config_flags, sklearn.datasets, tensorboardX.event_file_writer
import levattn.analysis.evaluation, levattn.training.loop

gc.freeze()
for line in sys.stdin:
    request = json.loads(line)
    if "argv" in request:
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            if request["out"]:
                os.dup2(os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = [request["script"], *request["argv"]]
            sys.orig_argv = [sys.executable, *sys.argv]
            jax.config.update("jax_num_cpu_devices", request["num_devices"])
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)  # without the seconds that Python takes to free what it has imported
        print(pid, flush=True)
    else:
        pid, status = os.waitpid(request["pid"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
"""


class Forks:
    """Starts processes of `train.py` or another script, until `close`."""

    def __init__(self):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-c", _PARENT]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._parent = subprocess.Popen(command, env=environment, text=True, cwd=ROOT, **pipes)
        self._running = set()

    def start(self, log, *argv, num_devices=1, script="train.py", out=None):
        """What it writes goes to the file `log`; to `out`, if given, what it writes to its standard output."""
        request = {"script": str(script), "argv": [*map(str, argv)], "log": str(log), "num_devices": num_devices}
        request["out"] = out and str(out)
        pid = self._ask(request)
        self._running.add(pid)
        return Fork(self, pid, Path(log))

    def close(self):
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        self._parent.kill()
        self._parent.communicate()

    def status(self, pid):
        code = self._ask({"pid": pid})
        if code is not None:
            self._running.discard(pid)
        return code

    def _ask(self, request):
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


class Fork:
    """A process, as `subprocess.Popen` has it."""

    def __init__(self, forks, pid, log):
        self.pid, self._forks, self._log, self._code = pid, forks, log, None

    def output(self):
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def poll(self):
        if self._code is None:
            self._code = self._forks.status(self.pid)
        return self._code

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.output()}"
            time.sleep(0.02)
        return self._code

    def wait_for(self, condition, timeout=120):
        """Returns once the condition holds; fails if the process ends or the time is up before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"ended with {self._code}:\n{self.output()}"
            assert time.monotonic() < deadline, f"nothing in {timeout} s:\n{self.output()}"
            time.sleep(0.01)
