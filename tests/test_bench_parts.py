"""The time of a call is divided among the kernels of the device, whatever else a trace tells."""

import jax.numpy as jnp

from levattn.bench.parts import Part, kernel_times, read_parts

NAMES = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Ops"}},
    {"ph": "M", "name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "Stream of words"}},
]


def test_kernels_of_streams_are_summed_by_name_and_divided_by_the_calls():
    ran = [
        {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 0, "dur": dur}
        for name, pid, tid, dur in [
            ("scores", 1, 7, 30.0),
            ("scores", 1, 7, 34.0),
            ("gram", 1, 7, 100.0),
            ("gram", 1, 8, 100.0),  # the same, as the compiler names it
            ("launch", 2, 7, 500.0),  # of the host
        ]
    ]
    assert read_parts([*NAMES, *ran, {}], 2) == [Part("gram", 0.5, 50.0), Part("scores", 1.0, 32.0)]


def test_a_real_trace_can_be_read():
    parts = kernel_times(lambda x: (jnp.sin(x) @ x,), (jnp.ones((32, 32)),), num_calls=2)
    assert all(part.us > 0 and part.runs >= 0.5 for part in parts)  # on a CPU there are none
