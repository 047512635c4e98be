"""Keys spread over devices or processes give the set of one device; what is missing or broken is named."""

import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from levattn.universal.sharded import communicated_bytes, merge_shards, sharded_candidates, sharded_universal_set
from levattn.universal.streaming import OnePassStream
from tests import reference

WIDTH, EPS, NUM_KEYS = 8, 0.1, 480
update = jax.jit(OnePassStream.update, static_argnums=0)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def _random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CASES = {
    "gaussian": _random(0, NUM_KEYS, WIDTH),
    "heavy tails": np.random.default_rng(1).standard_cauchy((NUM_KEYS, WIDTH)).astype(np.float32),
    "all mass on one shard": _random(2, NUM_KEYS, WIDTH) * np.where(np.arange(NUM_KEYS) < 50, 1, 1e-3)[:, None],
    "empty shards": _random(3, NUM_KEYS, WIDTH) * (np.arange(NUM_KEYS) < 100)[:, None],
    "a direction a shard": np.eye(WIDTH)[np.arange(NUM_KEYS) // 60],
    "rank 3": np.round(4 * _random(4, NUM_KEYS, 3)) @ np.round(4 * _random(5, 3, WIDTH)),
}


def _check(found, keys):
    scores = reference.leverage_scores(keys)
    assert set(np.flatnonzero(scores >= EPS)) <= set(found.indices)
    assert np.all(scores[found.indices] * 1.02 >= EPS)
    np.testing.assert_array_equal(found.keys, keys[found.indices])


@pytest.mark.parametrize("one_round", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_shards_find_the_set_of_all_keys(mesh, name, one_round):
    keys = CASES[name].astype(np.float32)
    _check(sharded_universal_set(jnp.asarray(keys), EPS, mesh=mesh, one_round=one_round), keys)


def test_host_keys_in_float64_are_cast_with_a_look_at_what_that_loses(mesh):
    keys = CASES["gaussian"].astype(np.float64)
    _check(sharded_universal_set(keys, EPS, mesh=mesh), CASES["gaussian"])
    keys[77] = 1e-60 * np.eye(WIDTH)[0]
    with pytest.raises(ValueError, match="size 1e-60 is beyond the range of float32"):
        sharded_universal_set(keys, EPS, mesh=mesh)


@pytest.mark.parametrize("one_round", [False, True])
def test_a_key_that_is_not_finite_on_any_shard_is_named(mesh, one_round):
    for place in (0, 77, 479):
        keys = CASES["gaussian"].copy()
        keys[place, 2] = np.nan
        with pytest.raises(ValueError, match=f"1 of 480 keys .* first at position {place}:"):
            sharded_universal_set(jnp.asarray(keys), EPS, mesh=mesh, one_round=one_round)


def test_bytes_by_formula_are_those_of_the_compiled_program(mesh):
    keys = jnp.asarray(CASES["gaussian"])
    compiled = jax.jit(lambda k: sharded_candidates(k, eps=EPS, mesh=mesh, axis="data")).lower(keys).compile().as_text()
    received = sum(all_gathered_bytes(compiled, 8))
    assert received == communicated_bytes(NUM_KEYS, WIDTH, EPS, 8)["selected"]


def all_gathered_bytes(program: str, num_devices: int):
    """What a device receives in each all-gather of a compiled program."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
    for line in program.splitlines():
        if (call := re.search(r"= (.*?) all-gather(-start)?\(", line)) is not None:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", call.group(1)):
                numbers = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
                yield int(numbers) * sizes[dtype] * (num_devices - 1) // num_devices


def test_bad_arguments_are_named(mesh):
    keys = jnp.asarray(CASES["gaussian"])
    for arguments, named in (
        ({"eps": 0.0}, "eps"),
        ({"axis": "model"}, "axis='model'"),
        ({"keys": keys[:-1]}, "479 keys do not divide among 8 devices"),
    ):
        with pytest.raises(ValueError, match=named):
            sharded_universal_set(**({"keys": keys, "eps": EPS, "mesh": mesh} | arguments))


def _states(keys, cuts):
    stream = OnePassStream(WIDTH, EPS)
    states = []
    for start, stop in zip([0, *cuts], [*cuts, len(keys)], strict=True):
        padding = np.zeros((NUM_KEYS - (stop - start), WIDTH), np.float32)
        states.append(update(stream, stream.init(start), np.concatenate([keys[start:stop], padding]), stop - start))
    return stream, states


def test_parts_of_a_stream_give_the_set_of_the_whole_in_whatever_order_they_come_back():
    keys = CASES["heavy tails"]
    stream, states = _states(keys, [100, 101, 300])
    _check(merge_shards(stream, states[::-1], NUM_KEYS), keys)


def test_a_lost_or_repeated_part_is_named():
    stream, states = _states(CASES["gaussian"], [100, 200, 300])
    for parts, named in (
        (states[1:], "keys 0 to 99 are missing"),
        ([states[0], *states[2:]], "keys 100 to 199 are missing"),
        (states[:-1], "the shards end at key 300"),
        ([*states, states[1]], "keys 100 to 199 came twice"),
        ([], "the shards end at key 0"),
    ):
        with pytest.raises(ValueError, match=named):
            merge_shards(stream, parts, NUM_KEYS)


PROGRAM = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from levattn.universal.sharded import sharded_universal_set

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
keys = np.load(sys.argv[3])
mine = keys[: len(keys) // 2] if jax.process_index() == 0 else keys[len(keys) // 2 :]
array = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), mine)
print("found", *sharded_universal_set(array, 0.1, mesh=mesh).indices)
bad = mine.copy()
bad[3, 0] = np.nan if jax.process_index() == 1 else 0
array = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), bad)
try:
    sharded_universal_set(array, 0.1, mesh=mesh)
except ValueError as error:
    print(error)
"""


def test_two_processes_find_the_same_set_and_both_report_a_bad_key(tmp_path):
    keys = CASES["heavy tails"]
    np.save(tmp_path / "keys.npy", keys)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), tmp_path / "keys.npy"],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    expected = "found " + " ".join(map(str, np.flatnonzero(reference.leverage_scores(keys) >= EPS)))
    for run, (out, err) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, err
        assert expected in out
        assert "1 of 480 keys hold NaN or infinity, the first at position 243" in out
