"""The attention benchmark times what is right, says why it does not time the rest, and shows both."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from levattn.attention import METHODS, AttentionSpec, lev_attention
from levattn.bench.cases import CASES, Case, draw_inputs, parse_cases
from levattn.bench.check import check, recall_of, reference, scores, wrong_keys
from levattn.bench.contenders import PEERS, Contender, methods, peers, with_gradients
from levattn.bench.measure import BACKWARD, FORWARD, Benchmark, Row, with_dense_ratios
from levattn.bench.table import case_table
from levattn.bench.timing import Budget, JaxProgram, Timing
from tests import reference as definitions

CASE = Case(2, 40, 2)
WIDTH, KEPT = 8, 6
QUICK = Budget(seconds=1e-5, repeats=3)  # one call a sample: chains are tested by themselves


def _benchmark(**options):
    return Benchmark(**{"bandwidth": 1e10, "head_dim": WIDTH, "budget": QUICK, **options})


def _contender(attend_fn, spec=None, name="mine"):
    def build(inputs, backward):
        if backward:
            return JaxProgram(with_gradients(attend_fn), inputs)
        return JaxProgram(lambda *inputs: (attend_fn(*inputs),), inputs[:3])

    return Contender(name, build, spec)


def _verdict(contender, backward=True, dtype="float32"):
    inputs = draw_inputs(CASE, WIDTH, dtype)
    return check(contender, inputs, contender.build_fn(inputs, backward), backward)


def _leverage(query, key, value):
    return lev_attention(query, key, value, AttentionSpec("leverage", k=KEPT))


def test_the_reference_is_attention_and_its_gradients_are_its_finite_differences():
    rng = np.random.default_rng(0)
    query, keys, values, cotangent = (rng.normal(size=(n, 5)) for n in (7, 9, 9, 7))
    log_weights = rng.normal(size=9)
    out, *gradients = reference(query, keys, values, log_weights, cotangent)
    plain = reference(query, keys, values, np.zeros(9), cotangent)[0]
    np.testing.assert_allclose(plain, definitions.attention_over(query, keys, values, [range(9)] * 7), atol=1e-12)
    for at, gradient in enumerate(gradients):
        step = rng.normal(size=gradient.shape)
        moved = []
        for sign in (1, -1):
            args = [query, keys, values]
            args[at] = args[at] + sign * 1e-6 * step
            moved.append(np.sum(reference(*args, log_weights, cotangent)[0] * cotangent))
        np.testing.assert_allclose(np.sum(gradient * step), (moved[0] - moved[1]) / 2e-6, rtol=1e-6)
    assert out.shape == (7, 5)


def test_reference_scores_are_leverage_scores():
    keys = np.random.default_rng(0).normal(size=(50, 8)) * np.logspace(0, 3, 8)
    found = scores(AttentionSpec("leverage", k=4), keys)
    np.testing.assert_allclose(found, definitions.leverage_scores(keys), atol=1e-10)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_every_method_passes_the_check(name):
    (contender,) = methods(name, KEPT)
    keeps = name in ("leverage", "row_norm", "random", "kmeans", "oracle")
    verdict = _verdict(contender, backward=keeps or name == "groups")
    assert verdict.complaint is None
    assert verdict.error < 1e-5
    assert (verdict.gradient_error is not None) == keeps
    assert verdict.recall == (1.0 if name in ("leverage", "row_norm") else None)


def test_dense_attention_passes_the_check_also_in_bfloat16():
    (xla,) = peers("xla", "float32", WIDTH)
    assert _verdict(xla).complaint is None
    rounded = _verdict(xla, dtype="bfloat16")
    assert rounded.complaint is None
    assert 1e-4 < rounded.error < 2e-2


WRONG = {
    "scale": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=0.3), "output is off"),
    "last_query": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v).at[:, -1].set(0), "output is off"),
    "last_head": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v).at[-1, :, -1].set(0), "output is off"),
    "leaves_out_a_key": (lambda q, k, v: jax.nn.dot_product_attention(q, k[:, :-1], v[:, :-1]), "output is off"),
    "nan": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v) * jnp.nan, "not finite"),
    "no_gradient": (
        lambda q, k, v: jax.nn.dot_product_attention(q, jax.lax.stop_gradient(k), v),
        "gradient is off",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_dense_attention_is_refused_and_not_timed(name):
    attend_fn, complaint = WRONG[name]
    rows = list(_benchmark().run(CASE, [_contender(attend_fn)]))
    backward = rows[1]
    assert complaint in backward.why_not
    assert backward.why_not.startswith("wrong: ")
    assert backward.ms is None
    json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False)


def test_a_method_that_keeps_other_keys_than_it_says_is_refused():
    attend_others = functools.partial(lev_attention, spec=AttentionSpec("row_norm", k=KEPT))
    assert "the output is off" in _verdict(_contender(attend_others, AttentionSpec("leverage", k=KEPT))).complaint


def test_keys_that_are_not_the_best_are_refused_and_ties_in_rounding_are_not():
    ranked = np.array([4.0, 3.0, 2.0, 2.0 - 1e-6, 1.0])
    assert wrong_keys(ranked, 3, np.array([2, 0, 1])) is None
    assert wrong_keys(ranked, 3, np.array([3, 0, 1])) is None
    assert recall_of(ranked, 3, np.array([3, 0, 1])) == pytest.approx(2 / 3)
    assert "0.500 of the k-th best" in wrong_keys(ranked, 3, np.array([4, 0, 1]))
    assert "keeps 2 keys of k=3" in wrong_keys(ranked, 3, np.array([0, 1, 1]))


def test_gradients_of_long_sequences_are_checked_on_some_queries(monkeypatch):
    monkeypatch.setattr("levattn.bench.check._MAX_PAIRS", 10 * CASE.num_tokens)
    (xla,) = peers("xla", "float32", WIDTH)
    assert _verdict(xla).gradient_error < 1e-5
    shifted = _contender(lambda q, k, v: jax.nn.dot_product_attention(q, k, v).at[:, -1].set(0))
    assert "off" in _verdict(shifted).complaint  # the last query is among them


def test_fused_kernels_are_tried_only_where_they_can_run():
    found = {contender.name: contender for contender in peers(",".join(PEERS), "bfloat16", 64)}
    assert tuple(found) == PEERS
    assert found["xla"].why_not is None
    assert found["cudnn"].why_not == "no GPU"  # tests run on CPUs
    rows = list(_benchmark().run(CASE, [found["cudnn"]]))
    assert [(row.direction, row.ms, row.why_not) for row in rows] == [
        (FORWARD, None, "no GPU"),
        (BACKWARD, None, "no GPU"),
    ]


@pytest.mark.parametrize(
    "function, named",
    [
        (lambda: methods("leverage,levarage", 4), "levarage"),
        (lambda: methods("dense", 4), "among the peers"),
        (lambda: peers("xla,flash", "float32", 8), "flash"),
        (lambda: parse_cases("paper,huge"), "huge"),
        (lambda: parse_cases("8x0x2"), "8x0x2"),
        (lambda: Budget(repeats=0), "repeats=0"),
    ],
)
def test_names_and_numbers_that_cannot_be_are_refused_by_name(function, named):
    with pytest.raises(ValueError, match=named):
        function()


def test_cases_by_name_and_by_shape():
    assert parse_cases("smoke,3x5x7") == [*CASES["smoke"], Case(3, 5, 7)]
    tokens = [case.batch * case.num_tokens * case.num_heads for case in CASES["long"][:2]]
    assert tokens[0] == tokens[1]


def test_what_fails_ends_only_its_own_row():
    def broken(query, key, value):
        raise NotImplementedError("no kernel for this\nand a long story")

    rows = list(_benchmark().run(CASE, [_contender(broken, name="broken"), *peers("xla", "float32", WIDTH)]))
    assert rows[0].why_not == rows[1].why_not == "NotImplementedError: no kernel for this"
    assert rows[2].ms > 0
    assert rows[3].ms > 0


def test_more_keys_than_tokens_are_a_reason_and_not_the_end():
    rows = list(_benchmark().run(CASE, methods("leverage", 41)))
    assert "k=41" in rows[0].why_not


def test_logits_that_do_not_fit_are_never_allocated():
    rows = [
        row
        for contender in (*peers("xla", "float32", WIDTH), *methods("oracle", KEPT))
        for row in _benchmark(max_bytes=2**13).run(CASE, [contender])
    ]
    assert all("GiB, more than" in row.why_not and row.ms is None for row in rows)
    assert len(rows) == 4
    (method,) = methods("leverage", KEPT)  # has no logits; refused by what its program says it needs
    row = next(iter(_benchmark(max_bytes=2**13).run(CASE, [method])))
    assert "GiB" in row.why_not
    assert row.peak_bytes > 2**13


def test_a_row_that_would_take_too_long_is_estimated_from_the_case_before():
    @dataclasses.dataclass
    class Slow:  # a program of ten seconds a call
        program: JaxProgram
        compile_seconds = 0.0
        peak_bytes = None

        def heads(self, places):
            return self.program.heads(places)

        def time(self, budget):
            return Timing(10_000.0, 10_000.0, 10_000.0, 1, 3)

    dense = _contender(jax.nn.dot_product_attention, name="slow")
    kept = _contender(_leverage, AttentionSpec("leverage", k=KEPT), name="kept")
    slow = [
        dataclasses.replace(x, build_fn=lambda *args, build_fn=x.build_fn: Slow(build_fn(*args))) for x in (dense, kept)
    ]
    benchmark = _benchmark(max_seconds=99.0)
    assert all(row.ms == 10_000 for row in benchmark.run(CASE, slow))
    for factor in (2, 4):  # the second estimate builds on the first
        rows = list(benchmark.run(Case(2, factor * CASE.num_tokens, 2), slow))
        assert [row.estimated_ms for row in rows] == pytest.approx([1e4 * factor**2] * 2 + [1e4 * factor] * 2)
        assert all(row.ms is None and "more than 99" in row.why_not for row in rows)


def test_ratios_are_to_the_fastest_dense_contender_of_the_same_pass():
    def row(name, direction, ms, is_dense=False, estimated=None):
        return Row("c", name, is_dense, direction, ms=ms, estimated_ms=estimated)

    rows = [
        row("xla", FORWARD, 4.0, True),
        row("cudnn", FORWARD, 2.0, True),
        row("lev", FORWARD, 1.0),
        row("xla", BACKWARD, None, True, estimated=50.0),
        row("cudnn", BACKWARD, None, True),
        row("lev", BACKWARD, 5.0),
    ]
    found = with_dense_ratios(rows)
    assert [x.dense_ratio for x in found] == [2.0, 1.0, 0.5, None, None, 0.1]
    assert [x.dense_is_estimated for x in found] == [False, False, False, None, None, True]
    assert with_dense_ratios(rows[2:3])[0].dense_ratio is None


def test_leverage_makes_no_buffer_of_queries_times_keys():
    inputs = tuple(jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32) for _ in range(4))
    program = jax.jit(with_gradients(_leverage)).lower(*inputs).compile()
    assert "4096,4096" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 4096


def test_the_table_has_a_line_for_what_ran_and_a_reason_for_what_did_not():
    contenders = [*peers("xla,cudnn", "float32", WIDTH), *methods("leverage", KEPT)]
    rows = with_dense_ratios(list(_benchmark().run(CASE, contenders)))
    text = io.StringIO()
    Console(file=text, width=160).print(case_table(rows))
    lines = text.getvalue().splitlines()
    assert "2x40x2" in lines[0]
    assert any("xla" in line and "1.000" in line for line in lines)
    assert any("leverage" in line and f"{rows[4].ms:,.3f}" in line for line in lines)
    assert any(line.strip() == "cudnn (forward, forward+backward): no GPU" for line in lines)


def test_the_script_prints_the_table_and_leaves_the_numbers(tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "bench_attention.py"
    chosen = ["--cases=1x70x2", "--methods=leverage", "--peers=xla,cudnn", "--dtype=float32"]
    command = [sys.executable, script, *chosen, "--seconds=1e-5", "--bandwidth=10", f"--out={tmp_path / 'a.json'}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert "1x70x2" in done.stdout
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["provenance"]["versions"]["jax"]
    assert record["cases"] == ["1x70x2"]
    assert record["bandwidth"] == 1e10
    assert [(row["name"], row["direction"]) for row in record["rows"]] == [
        (name, direction) for name in ("xla", "cudnn", "leverage") for direction in (FORWARD, BACKWARD)
    ]
    timed = [row for row in record["rows"] if row["name"] != "cudnn"]
    assert all(row["ms"] > 0 and row["floor_ratio"] > 0 and row["dense_ratio"] > 0 for row in timed)


@pytest.mark.optin
@pytest.mark.parametrize("backend", [None, "MATH", "FLASH_ATTENTION"])
def test_pytorch_sees_the_same_inputs_and_passes_the_check(backend):
    pytest.importorskip("torch")
    from levattn.bench.torch_program import TorchProgram

    contender = Contender("torch", functools.partial(TorchProgram, backend))
    assert _verdict(contender).complaint is None
