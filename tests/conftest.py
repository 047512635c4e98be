"""Every test sees eight emulated CPU devices; what holds on one device is tested against what holds on eight."""

import importlib.metadata
import os
import pathlib
import signal
import sys
import tempfile

# Before anything imports JAX. Programs compile once for all test processes of a user.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The time of these tests is the compiler's: a third of it without its optimisations, half of that without the newer of
# the two code generators of 0.10. Later versions have one, and a flag that XLA does not know would end the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"levattn-jax-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
import threadpoolctl
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
# NumPy's matrices are small here: more threads would wait for each other, for seconds where the cores are busy.
threadpoolctl.threadpool_limits(1, "blas")

# A shell lets jobs in its background ignore interrupts, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])  # grain's worker processes refuse to start without parsed flags


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs hold memory maps, of which a process may have 65,530: the whole suite would need more."""
    yield
    if pathlib.Path("/proc/self/maps").read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
