import json
import math
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from levattn.training.checkpoint import Checkpointer, has_checkpoint

TX = optax.adamw(1e-2, mu_dtype=jnp.bfloat16)


def make_sharding(num_devices):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",), axis_types=(AxisType.Auto,))

    def rule(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % num_devices == 0
        return NamedSharding(mesh, PartitionSpec("fsdp") if split else PartitionSpec())

    return rule


def make_state(num_devices=1, width=16):
    """A state after one step of AdamW, so that no leaf is all zeros."""
    keys = jax.random.split(jax.random.key(1), 2)
    params = {"block": {"kernel": jax.random.normal(keys[0], (width, 4)), "bias": jax.random.normal(keys[1], (4,))}}
    _, opt_state = TX.update(params, TX.init(params), params)
    state = {"params": params, "opt_state": opt_state, "rng": jax.random.key(7), "step": jnp.int32(5), "ema": None}
    return jax.device_put(state, jax.tree.map(make_sharding(num_devices), state))


def template_of(state, num_devices=1):
    shardings = jax.tree.map(make_sharding(num_devices), state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def assert_bitwise_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_state_comes_back_bit_for_bit(tmp_path):
    """Also bfloat16 moments, a typed PRNG key, an integer step, empty optimizer states and None."""
    state = make_state()
    assert state["opt_state"][0].mu["block"]["kernel"].dtype == jnp.bfloat16
    with Checkpointer(tmp_path / "new") as checkpointer:
        checkpointer.save(5, state, None, {"a": [1, {"b": None}]})
        assert_bitwise_equal(checkpointer.restore(template_of(state)), state)
    with Checkpointer(tmp_path / "new") as checkpointer:  # a new process finds it
        assert_bitwise_equal(checkpointer.restore(template_of(state), step=5), state)
        assert checkpointer.read_extra() == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_a_state_saved_on_eight_devices_is_restored_on_as_many_as_the_template_names(tmp_path, num_devices):
    state = make_state(num_devices=8)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, None, {})
        template = template_of(state, num_devices)
        restored = checkpointer.restore(template)
    assert_bitwise_equal(restored, state)
    placed = jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), restored, template)
    assert all(jax.tree.leaves(placed))
    assert len(restored["params"]["block"]["kernel"].devices()) == num_devices


def test_a_save_is_of_the_state_at_the_call_though_its_buffers_are_donated_at_once(tmp_path):
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    weights = jnp.zeros(1 << 21)
    template = {"w": jax.ShapeDtypeStruct(weights.shape, weights.dtype, sharding=weights.sharding)}
    with Checkpointer(tmp_path, keep_last=9) as checkpointer:
        for step in range(4):
            checkpointer.save(step, {"w": weights}, None, {})
            weights = add_one(add_one(weights))
        for step in range(4):
            assert np.unique(checkpointer.restore(template, step)["w"]) == [2 * step]


@pytest.mark.parametrize(
    "mode, kept, best",
    [
        ("max", [2, 5, 6], 2),  # the newest two and the best
        ("min", [4, 5, 6], 4),
    ],
)
def test_the_last_n_and_the_best_are_kept(tmp_path, mode, kept, best):
    """A checkpoint without metrics, and one whose metric is NaN, never counts as best; files of the others are gone."""
    metrics = {1: 0.5, 2: 0.9, 3: None, 4: 0.1, 5: math.nan, 6: 0.3}
    with Checkpointer(tmp_path, keep_last=2, best_metric="top1", best_mode=mode) as checkpointer:
        for step, value in metrics.items():
            checkpointer.save(step, {"w": jnp.ones(2)}, None if value is None else {"top1": value, "loss": 0.0}, {})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept
    with Checkpointer(tmp_path, keep_last=2, best_metric="top1", best_mode=mode) as checkpointer:
        assert (checkpointer.all_steps(), checkpointer.latest_step()) == (kept, 6)
        assert checkpointer.best_step() == best
        checkpointer.save(7, {"w": jnp.ones(2)}, None, {})  # the best is still known after a restart
        checkpointer.wait()
        assert checkpointer.all_steps() == sorted({best, 6, 7})


def test_of_equally_good_checkpoints_the_newest_is_the_best(tmp_path):
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"w": jnp.ones(2)}, {"accuracy": 0.5} if step < 3 else None, {})
        assert checkpointer.best_step() == 2
        assert checkpointer.all_steps() == [2, 3]


def test_a_missing_step_is_refused_with_a_list_of_those_there_are(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        assert (checkpointer.latest_step(), checkpointer.best_step(), checkpointer.all_steps()) == (None, None, [])
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            checkpointer.restore(template_of(state))
        for step in (10, 20):
            checkpointer.save(step, state, None, {})
        for read in (lambda: checkpointer.restore(template_of(state), 15), lambda: checkpointer.read_extra(15)):
            with pytest.raises(FileNotFoundError, match=r"step 15 .*\[10, 20\]"):
                read()


def test_every_missing_extra_and_differing_leaf_is_listed_at_once(tmp_path):
    state = make_state()
    template = template_of(state)
    leaf = template["step"]
    template["params"]["block"]["kernel"] = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=leaf.sharding)
    template["step"] = jax.ShapeDtypeStruct((), jnp.uint32, sharding=leaf.sharding)
    template["head"] = {"bias": leaf, "kernel": leaf}
    del template["params"]["block"]["bias"], template["rng"]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, None, {})
        with pytest.raises(ValueError, match="does not fit") as info:
            checkpointer.restore(template)
    assert [line.strip() for line in str(info.value).splitlines()[1:]] == [
        "missing from the checkpoint: head/bias int32[]",
        "missing from the checkpoint: head/kernel int32[]",
        "only in the checkpoint: params/block/bias float32[4]",
        "only in the checkpoint: rng uint32[2]",
        "differs: params/block/kernel is float32[16, 4] in the checkpoint, float32[16, 5] in the state",
        "differs: step is int32[] in the checkpoint, uint32[] in the state",
    ]


def test_parameters_alone_can_be_read_from_a_whole_state(tmp_path):
    state = make_state()
    template = {"params": template_of(state)["params"]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, None, {})
        with pytest.raises(ValueError, match="only in the checkpoint: opt_state/0/mu"):
            checkpointer.restore(template)
        assert_bitwise_equal(checkpointer.restore(template, partial=True), {"params": state["params"]})


def test_a_reader_makes_no_folder_cleans_nothing_up_and_cannot_save(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        Checkpointer(tmp_path / "none", read_only=True)
    assert not has_checkpoint(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert not has_checkpoint(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2)}, None, {})
    assert has_checkpoint(tmp_path)
    unfinished.mkdir(exist_ok=True)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [1]
        with pytest.raises(ValueError, match="read_only"):
            checkpointer.save(3, {"w": jnp.ones(2)}, None, {})
    assert unfinished.exists()
    with Checkpointer(tmp_path) as checkpointer:  # a resumed run does clean up, by its next save
        checkpointer.save(3, {"w": jnp.ones(2)}, None, {})
    assert not unfinished.exists()


def test_bad_arguments_are_refused_by_name_before_anything_is_written(tmp_path):
    for field, value in {"keep_last": 0, "keep_best": -1, "best_mode": "most"}.items():
        with pytest.raises((ValueError, TypeError), match=field):
            Checkpointer(tmp_path / "new", **{field: value})
    assert not (tmp_path / "new").exists()
    with Checkpointer(tmp_path, best_metric="top1") as checkpointer:
        with pytest.raises(ValueError, match=r"best_metric='top1'.*\['loss'\]"):
            checkpointer.save(1, {"w": jnp.ones(2)}, {"loss": 1.0}, {})
        with pytest.raises(TypeError):
            checkpointer.save(1, {"w": jnp.ones(2)}, None, {"path": object()})
        assert checkpointer.all_steps() == []


TWO_PROCESSES = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, index, folder = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(index))
    from levattn.training.checkpoint import Checkpointer
    from levattn.training.export import export_params, load_params
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    weights = jax.make_array_from_callback((8, 3), sharding, lambda index: values[index])
    with Checkpointer(folder + "/checkpoints") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"w": weights}, {"accuracy": 1 / step}, {"step": step})
        restored = checkpointer.restore({"w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding)})["w"]
        assert checkpointer.all_steps() == [1, 3] and checkpointer.read_extra(1) == {"step": 1}
    for mine, theirs in zip(weights.addressable_shards, restored.addressable_shards, strict=True):
        np.testing.assert_array_equal(mine.data, theirs.data)
    export_params(folder + "/model.npz", {"w": weights}, {})
"""


def test_two_processes_save_and_restore_together_and_one_process_reads_the_result(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), address, str(index), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    expected = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    template = {"w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=make_sharding(8)(expected))}
    with Checkpointer(tmp_path / "checkpoints", read_only=True) as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(template, checkpointer.best_step())["w"], expected)
    with np.load(tmp_path / "model.npz") as file:
        np.testing.assert_array_equal(file["params/w"], expected)
        assert json.loads(str(file["__config__"])) == {}
