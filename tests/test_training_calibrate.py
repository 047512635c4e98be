"""Budgets keep their total, are the best there are by what was measured, and come back from their file."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.attention import AttentionSpec
from levattn.data import open_source
from levattn.training.agreement import first_images, layer_errors
from levattn.training.calibrate import allocate, calibrate, read_budgets, write_budgets
from levattn.training.config import EvalConfig
from tests.retrofits import MODEL, TOKENS, tiny_model

SPEC = AttentionSpec("leverage", k=6, keep_prefix=1)
CANDIDATES = (2, 4, 10)  # few: each is a program to compile


@pytest.fixture(scope="module")
def setup():
    trained = tiny_model()
    images = first_images(open_source(trained.config.data, "test"), trained.config.data, 16)
    return trained.params, images


@pytest.fixture(scope="module")
def budgets(setup):
    params, images = setup
    return calibrate(MODEL, params, images, SPEC, classifier=True, candidates=CANDIDATES)


@given(
    costs=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3, unique=True),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_an_allocation_is_the_cheapest_of_all_that_give_the_total(costs, sizes, data):
    combinations = list(itertools.product(range(3), repeat=len(costs)))
    total = sum(sizes[i] for i in data.draw(st.sampled_from(combinations)))
    chosen = allocate(np.array(costs), sizes, total)

    def cost(choice):
        return sum(row[i] for row, i in zip(costs, choice, strict=True))

    assert sum(sizes[i] for i in chosen) == total
    possible = [cost(choice) for choice in combinations if sum(sizes[i] for i in choice) == total]
    assert cost(chosen) == pytest.approx(min(possible))


def test_a_total_that_no_choice_gives_is_refused():
    with pytest.raises(ValueError, match="total=5"):
        allocate(np.zeros((2, 2)), [2, 4], 5)


def test_budgets_keep_the_mean_and_are_never_worse_than_an_equal_share(budgets, setup):
    assert sum(budgets.k) == 3 * SPEC.k
    assert set(budgets.k) <= {*CANDIDATES, SPEC.k}
    assert budgets.objective <= 1
    assert budgets.cosine >= budgets.uniform_cosine
    weights = np.array(budgets.influence) ** budgets.strength / np.square(budgets.uniform_error)
    costs = [np.sum(weights * np.square(error)) for error in (budgets.error, budgets.uniform_error)]
    assert costs[0] <= costs[1]
    assert budgets.objective == pytest.approx(costs[0] / costs[1])
    measured = layer_errors(MODEL, *setup, [budgets.attention, SPEC])
    np.testing.assert_allclose(np.sqrt(measured), [budgets.error, budgets.uniform_error], rtol=1e-5)
    assert all(spec.method == "leverage" and spec.keep_prefix == 1 for spec in budgets.attention)


@pytest.fixture(scope="module")
def by_head(setup):
    params, images = setup
    return calibrate(MODEL, params, images, SPEC, classifier=True, by_head=True, candidates=CANDIDATES)


def test_budgets_by_head_keep_the_mean_and_are_never_worse_than_an_equal_share(by_head, setup):
    assert sum(by_head.k) == pytest.approx(3 * SPEC.k)
    assert any(spec.k_per_head is not None for spec in by_head.attention)
    for spec in by_head.attention:
        assert {*(spec.k_per_head or (spec.k,))} <= {*CANDIDATES, SPEC.k}
        assert (spec.method, spec.keep_prefix) == ("leverage", 1)
    assert by_head.objective <= 1
    assert by_head.num_images == sum(map(len, setup[1]))
    assert by_head.cosine >= by_head.uniform_cosine
    measured = layer_errors(MODEL, *setup, [by_head.attention, SPEC])
    np.testing.assert_allclose(np.sqrt(measured), [by_head.error, by_head.uniform_error], rtol=1e-5)


def test_an_error_by_head_is_that_of_the_layer_if_the_other_heads_are_dense(setup):
    """Keeping all tokens is dense attention: then the whole error is that of the head that does not."""
    of_heads = layer_errors(MODEL, *setup, [AttentionSpec("leverage", k=4)], by_head=True)[0]
    assert of_heads.shape == (MODEL.depth, MODEL.num_heads)
    one_head = [AttentionSpec("leverage", k_per_head=k) for k in ((4, TOKENS), (TOKENS, 4))]
    np.testing.assert_allclose(of_heads.T, layer_errors(MODEL, *setup, one_head), rtol=1e-4)


def test_budgets_by_head_come_back_from_their_file(by_head, tmp_path):
    write_budgets(tmp_path / "budgets.json", by_head)
    assert read_budgets(tmp_path / "budgets.json") == by_head.attention


def test_a_target_is_reached_by_the_fewest_keys(setup):
    params, images = setup
    ks = (1, 4, 6, 10, 12, TOKENS)
    errors = np.sqrt(layer_errors(MODEL, params, images, [dataclasses.replace(SPEC, k=k) for k in ks]))
    target = float(np.median(errors[:-1]))
    found = calibrate(MODEL, params, images, SPEC, classifier=True, target_error=target, candidates=ks[:-1])
    for layer, k in enumerate(found.k):
        assert found.error[layer] <= target
        assert all(errors[i, layer] > target for i in range(ks.index(k)))
    assert len(set(found.k)) > 1
    all_keys = calibrate(MODEL, params, images, SPEC, classifier=True, target_error=1e-9, candidates=(4,))
    assert all_keys.k == (TOKENS,) * 3
    assert all_keys.cosine == pytest.approx(1, abs=1e-4)


def test_all_tokens_are_what_is_left_to_choose_where_the_mean_is_all_tokens(setup):
    found = calibrate(MODEL, *setup, AttentionSpec("row_norm", k=TOKENS), classifier=True)
    assert found.k == (TOKENS,) * 3
    assert found.objective <= 1


def test_the_default_candidates_are_in_range_and_hold_the_mean(setup):
    found = calibrate(MODEL, *setup, AttentionSpec("row_norm", k=5, keep_prefix=5), classifier=True)
    assert found.k == (5, 5, 5)  # none may keep fewer than its prefix


def test_budgets_come_back_from_their_file(budgets, tmp_path):
    write_budgets(tmp_path / "budgets.json", budgets)
    assert read_budgets(tmp_path / "budgets.json") == budgets.attention
    (tmp_path / "by_hand.json").write_text('{"attention": [{"method": "leverage", "k": 4}, {"method": "dense"}]}')
    assert read_budgets(tmp_path / "by_hand.json") == (AttentionSpec("leverage", k=4), AttentionSpec())


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"attention": [{"kk": 4}]}', '{"attention": 3}'])
def test_a_file_that_holds_no_budgets_is_refused_by_name(tmp_path, text):
    (tmp_path / "budgets.json").write_text(text)
    with pytest.raises(ValueError, match=r"budgets\.json.*no file of budgets"):
        read_budgets(tmp_path / "budgets.json")
    with pytest.raises(FileNotFoundError, match="--calibrate"):
        read_budgets(tmp_path / "none.json")


@pytest.mark.parametrize(
    "spec, message",
    [
        (AttentionSpec("dense"), "only k can be chosen"),
        (AttentionSpec("leverage", k=None, eps=0.5), "only k can be chosen"),
        (AttentionSpec("leverage", k_per_head=(4, 8)), "only k can be chosen"),
        (AttentionSpec("leverage", k=18), r"k=18 must be in \[1, 17\]"),
    ],
)
def test_what_has_no_k_to_choose_is_refused(setup, spec, message):
    with pytest.raises(ValueError, match=message):
        calibrate(MODEL, *setup, spec, classifier=True)


def test_a_target_for_heads_is_refused(setup):
    with pytest.raises(ValueError, match=r"target_error=0\.1 must be None with by_head"):
        calibrate(MODEL, *setup, SPEC, classifier=True, by_head=True, target_error=0.1)
    for wrong in ({"calibrate_heads": True}, {"calibrate_heads": True, "calibrate": 4, "target_error": 0.1}):
        with pytest.raises(ValueError, match="calibrate_heads needs calibrate"):
            EvalConfig("run", attention=("leverage",), **wrong)
