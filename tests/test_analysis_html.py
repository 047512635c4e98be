"""The page holds what was measured and what the model does, to a stated error, and asks for nothing from anywhere."""

import html.parser
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from retrofits import CONFIG, MODEL, TOKENS, tiny_model

from levattn.analysis import write_results
from levattn.analysis.html import explorer_payload, page_bytes, read_measurements, write_page
from levattn.analysis.html.blob import layout_of, pack, unpack
from levattn.analysis.html.choices import choose
from levattn.analysis.html.explorer import run_captured
from levattn.analysis.html.logits import attention_error, factorise, restore, round_factors, signed, zigzag
from levattn.analysis.html.page import page_text
from levattn.attention import AttentionSpec
from levattn.attention.layer import attend_coreset
from levattn.attention.matched import settle
from levattn.data import eval_batches, normalize, open_source
from levattn.training.attentions import scanned

RNG = np.random.default_rng(0)
SIZES = (6, 13)
METHODS = ("leverage", "random", "kmeans", "matched", "pivoted")
GRID = (4, 4)
RECORD = {
    "command": "eval.py --a",
    "time": "2026-01-01",
    "commit": "0" * 40,
    "dirty": False,
    "hardware": {"platform": "cpu", "device_kind": "cpu", "num_devices": 1, "num_processes": 1, "num_cpus": 2},
    "versions": {"python": "3.11", "flax": None},
}
ROW = {
    "dataset": "digits",
    "model": "mu/1",
    "tokens": 65,
    "attention": "leverage",
    "k": 8,
    "trained_with": "dense",
    "accuracy": 0.5,
    "examples": 4,
    "seconds": 2.0,
    "images_per_second": 2.0,
}


def softmax64(logits):
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def trained():
    return tiny_model()


@pytest.fixture(scope="module")
def payload(trained):
    return explorer_payload(trained, num_images=2, methods=METHODS, ks=(6, 13, 99))


@pytest.fixture(scope="module")
def layers(trained):
    """Queries, keys and values of every layer for the images of the payload."""
    source = open_source(CONFIG.data, CONFIG.data.eval_split)
    batch = next(iter(eval_batches(source, CONFIG.data, batch_size=80)))
    images = normalize(batch["image"][[0, 40]], CONFIG.data)
    return list(run_captured(trained.config.model, trained.params, images)[1])


def coreset_of(method, k, qkv, layer):
    rng = jax.random.fold_in(jax.random.key(CONFIG.seed), layer)
    spec = AttentionSpec(method, k=k, keep_prefix=1)
    return choose(*qkv, rng, spec=spec, grid=GRID), spec


def test_packed_arrays_come_back_whole_with_a_layout_that_went_through_json():
    arrays = {
        "a": RNG.integers(0, 256, (3, 4), np.uint8),
        "b": RNG.integers(0, 2**16, (2, 0, 1), np.uint16),
        "c": RNG.integers(0, 2**16, (5,), np.uint16),
        "d": RNG.normal(size=(2, 3, 1)).astype(np.float32),
    }
    found = unpack(pack(arrays), json.loads(json.dumps(layout_of(arrays))))
    assert list(found) == list(arrays)
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    with pytest.raises(ValueError, match="int64"):
        layout_of({"a": np.arange(3)})


def test_zigzag_keeps_every_number_that_fits_and_small_ones_small():
    x = np.arange(-32767, 32768)
    np.testing.assert_array_equal(signed(zigzag(x)), x)
    assert zigzag(np.array([0, -1, 1, -2, 2])).tolist() == [0, 1, 2, 3, 4]


def test_rounded_logits_give_the_attention_of_float64_with_an_error_that_falls_with_the_step_and_is_stated_right():
    query, key = (RNG.normal(size=(n, 3, 8)) * 3 for n in (11, 15))
    key += 5 * RNG.normal(size=(1, 3, 8))  # a shift of all keys, which softmax does not see
    exact = softmax64(np.einsum("thd,shd->hts", query, key) / np.sqrt(8))
    factors, means = factorise(query, key), []
    for step in (2.0, 0.2, 0.02, 0.002):
        rounded = round_factors(factors, step)
        error = np.abs(softmax64(restore(rounded).astype(np.float64)) - exact).sum(axis=-1) / 2
        np.testing.assert_allclose(attention_error(query, key, rounded), error, atol=2e-6)
        means.append(error.mean())
        assert len(rounded.scale) <= 8
    assert means[0] > 5 * means[1] > 25 * means[2]
    assert means[-1] < 1e-3


def test_huge_logits_are_rounded_more_coarsely_and_never_wrap_around():
    query, key = (1e4 * RNG.normal(size=(9, 2, 4)) for _ in range(2))
    rounded = round_factors(factorise(query, key), 1e-3)
    exact, found = np.einsum("thd,shd->hts", query, key) / 2, restore(rounded)
    exact, found = (x - x.mean(axis=-1, keepdims=True) for x in (exact, found))
    assert np.abs(found - exact).max() < 1e-3 * np.abs(exact).max()


def test_the_page_gives_the_attention_of_every_layer_and_head_to_the_error_it_states(payload, layers):
    errors = []
    for layer, (query, key, _) in enumerate(layers):
        exact = softmax64(np.einsum("bthd,bshd->bhts", *(np.asarray(x, np.float64) for x in (query, key))) / 4)
        for image in range(2):
            arrays = unpack(payload["blobs"][image][layer], payload["layout"])
            left, right = (signed(arrays[name]).astype(np.float64) for name in ("left", "right"))
            right /= 2.0 ** ((arrays["precision"] - 64.0) / 4)
            found = softmax64(np.einsum("rht,rhs,rh->hts", left, right, arrays["scale"].astype(np.float64)))
            errors.append(np.abs(found - exact[image]).sum(axis=-1) / 2)
    stated = payload["exactness"]
    assert np.mean(errors) == pytest.approx(stated["mean_error"], rel=1e-3, abs=1e-6)
    assert np.max(errors) == pytest.approx(stated["largest_error"], rel=1e-3, abs=1e-6)
    assert stated["mean_error"] < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_choices_on_the_page_are_those_of_the_method(payload, layers, method):
    facts = next(m for m in payload["methods"] if m["name"] == method)
    layer, image = 1, 1
    arrays = unpack(payload["blobs"][image][layer], payload["layout"])
    for at, k in enumerate(SIZES):
        coreset, _ = coreset_of(method, k, layers[layer], layer)
        valid = np.asarray(coreset.valid[image])
        for head in range(2):
            kept = np.asarray(coreset.indices)[image, head]
            if facts["ranked"]:
                assert set(arrays[f"{method}.order"][head][:k].tolist()) == set(kept[valid[head]].tolist())
                continue
            slots = arrays[f"{method}.slots"][at, head].astype(int)
            if coreset.assignment is None:
                expected = np.full(TOKENS, 255)
                expected[kept[valid[head]]] = np.flatnonzero(valid[head])
                assert {tuple(np.flatnonzero(slots == s)) for s in slots[slots < 255]} == {
                    (i,) for i in kept[valid[head]]
                }
                np.testing.assert_array_equal(slots < 255, expected < 255)
            else:
                np.testing.assert_array_equal(slots, np.asarray(coreset.assignment)[image, head])
            if facts["weighted"]:
                weights = signed(arrays[f"{method}.log_weights"][at, head])[: valid.shape[-1]] / payload["weight_steps"]
                exact = np.asarray(coreset.log_weights)[image, head]
                np.testing.assert_allclose(weights[valid[head]], exact[valid[head]], atol=0.5 / 64 + 1e-6)


def test_sizes_that_the_model_has_no_tokens_for_are_left_out_and_images_are_described(payload):
    assert payload["ks"] == list(SIZES)
    assert payload["tokens"] == TOKENS
    assert [image["index"] for image in payload["images"]] == [0, 40]
    for image in payload["images"]:
        assert image["uri"].startswith("data:image/png;base64,")
        assert 0.1 <= image["confidence"] <= 1


def test_what_does_not_fit_is_rounded_until_it_does_or_refused(trained, payload):
    size = sum(len(text) for of_image in payload["blobs"] for text in of_image)
    small = explorer_payload(trained, num_images=2, methods=METHODS, ks=SIZES, max_bytes=int(0.85 * size))
    assert sum(len(text) for of_image in small["blobs"] for text in of_image) <= 0.85 * size
    assert small["exactness"]["mean_error"] > payload["exactness"]["mean_error"]
    with pytest.raises(ValueError, match="fewer images"):
        explorer_payload(trained, num_images=2, methods=METHODS, ks=SIZES, max_bytes=1000)


def test_what_the_page_cannot_show_is_refused(trained):
    for options in (AttentionSpec(eps=0.1), AttentionSpec(power=2, keep_prefix=1), AttentionSpec(k_per_head=(3, 4))):
        with pytest.raises(ValueError, match="cannot be explored"):
            explorer_payload(trained, options=options)
    with pytest.raises(ValueError, match="num_images"):
        explorer_payload(trained, num_images=81)
    with pytest.raises(ValueError, match="must hold a number"):
        explorer_payload(trained, ks=(99,))


def test_a_scanned_model_is_explored_like_an_unrolled_one(trained):
    model, params = scanned(trained.config.model, trained.params)
    images = normalize(np.zeros((1, 8, 8, 1), np.uint8), CONFIG.data)
    _, ours = run_captured(model, params, images)
    _, theirs = run_captured(MODEL, trained.params, images)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)


class Checker(html.parser.HTMLParser):
    """Collects elements, and refuses what is not nested as it should be."""

    VOID = ("meta", "input", "img", "link", "br")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.texts.setdefault(self.open[-1], []).append(data)


def test_the_page_is_sound_html_that_asks_for_nothing_and_holds_the_data_unchanged(payload, tmp_path):
    strange = "</script><script>alert(1)</script><!-- @@DATA@@ & \u2028 ü"
    table = {"name": strange, "provenance": None, "columns": [{"name": "a", "kind": "text"}], "rows": [[strange]]}
    measurements = {"tables": [table], "points": [], "curves": []}
    path = tmp_path / "page.html"
    size = write_page(path, title="A < B & C", measurements=measurements, explorer=payload, record=RECORD)
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) == size == path.stat().st_size
    assert size < page_bytes(measurements) + len(json.dumps(payload["blobs"])) + 10_000

    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    ids = [attributes["id"] for _, attributes in checker.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in checker.seen:
        assert not attributes.get("src"), tag
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    data, script = checker.texts["script"]
    assert "A &lt; B &amp; C" in text
    stored = json.loads(data)
    assert stored["explorer"] == json.loads(json.dumps(payload))
    assert stored["tables"] == [table]
    addresses = set(re.findall(r"\b(?:https?|wss?)://[^\"'\s]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place to go to
    for name in ("fetch(", "XMLHttpRequest", "import(", "importScripts", "WebSocket", "EventSource", "sendBeacon"):
        assert name not in script
    assert "url(" not in "".join(checker.texts["style"])


def test_a_page_needs_something_to_show_and_numbers_that_are_finite(tmp_path):
    with pytest.raises(ValueError, match="nothing to show"):
        write_page(tmp_path / "a.html", title="a")
    with pytest.raises(ValueError, match="must end in"):
        write_page(tmp_path / "a.txt", title="a", explorer={})
    with pytest.raises(ValueError, match="not JSON compliant"):
        page_text({"title": "a", "x": float("nan")})


def test_tables_points_and_curves_are_found_below_a_folder_and_say_where_they_come_from(tmp_path):
    rows = [ROW, ROW | {"attention": "dense", "k": 65, "accuracy": 0.75, "images_per_second": 4.0}]
    write_results(rows, tmp_path / "all" / "run", record=RECORD)
    lines = [{"step": s, "time": 100.0 + s, "train/loss": 1 / s} for s in (10, 20)]
    (tmp_path / "all" / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "ti')
    (tmp_path / "all" / "run" / "config.json").write_text('{"rows": [{"a": 1}]}')
    (tmp_path / "all" / "other.csv").write_text("name,ms,text\na,1.5,\nb,2,x\n")
    (tmp_path / "all" / "nested.json").write_text('{"rows": [{"a": [1]}]}')
    found = read_measurements([tmp_path / "all"])
    other, run = found["tables"]
    assert (other["name"], run["name"]) == ("all/other", "all/run")
    assert other["columns"] == [
        {"name": "name", "kind": "text"},
        {"name": "ms", "kind": "number"},
        {"name": "text", "kind": "text"},
    ]
    assert other["rows"] == [["a", 1.5, None], ["b", 2, "x"]]
    assert run["provenance"] == RECORD
    assert {"name": "accuracy", "kind": "percent"} in run["columns"]
    assert [(p["series"], p["k"], p["value"], p["ms"]) for p in found["points"]] == [
        ("dense", 65, 0.75, 250.0),
        ("leverage", 8, 0.5, 500.0),
    ]
    assert found["curves"] == [
        {
            "name": "all/run",
            "hardware": None,
            "command": None,
            "metrics": {"train/loss": [(10, 0.0, 0.1), (20, 10.0, 0.05)]},
        }
    ]


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path):
    lines = [{"step": s, "time": float(s), "loss": float(s)} for s in range(1, 1502)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    points = read_measurements([tmp_path])["curves"][0]["metrics"]["loss"]
    assert len(points) <= 401
    assert points[-1] == (1501, 1500.0, 1501.0)


def test_results_that_are_not_there_or_none_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_measurements([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no results"):
        read_measurements([tmp_path])
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json.*holds no results"):
        read_measurements([tmp_path / "a.json"])
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_measurements([tmp_path])


def reference_attention(method, k, qkv, layer):
    """Attention of the library on every key: its output for values that are one at a key, and zero elsewhere."""
    query, key, value = qkv
    coreset, spec = coreset_of(method, k, qkv, layer)
    spec = settle(spec, TOKENS, GRID)
    head_dim, found = key.shape[-1], []
    for start in range(0, TOKENS, head_dim):
        one_hot = (jnp.arange(TOKENS)[:, None] == start + jnp.arange(head_dim)).astype(jnp.float32)
        one_hot = jnp.broadcast_to(one_hot[None, :, None], value.shape)
        if coreset.assignment is None:
            along = jnp.swapaxes(coreset.indices, 1, 2)[..., None]
            slot_values = jnp.take_along_axis(one_hot, along, axis=1)
        else:
            members = jax.nn.one_hot(coreset.assignment, coreset.valid.shape[-1])
            slot_values = jnp.einsum("bhsk,bshd->bkhd", members, one_hot)
            slot_values /= jnp.maximum(jnp.swapaxes(members.sum(axis=2), 1, 2), 1)[..., None]
        out = attend_coreset(query, key, one_hot, coreset.replace(values=slot_values), spec, grid=GRID)
        found.append(np.moveaxis(np.asarray(out), 2, 1))
    return np.concatenate(found, axis=-1)[..., :TOKENS]


@pytest.fixture(scope="module")
def browser_page(payload, tmp_path_factory):
    """The page in headless Chromium, and what it complained about or asked for."""
    sync_api = pytest.importorskip("playwright.sync_api")
    folder = tmp_path_factory.mktemp("page")
    rows = [ROW | {"k": k, "attention": a, "accuracy": k / 99} for k in (8, 16) for a in ("leverage", "kmeans")]
    write_results(rows, folder / "run", record=RECORD)
    lines = [{"step": s, "time": float(s), "train/loss": 1 / s} for s in (10, 20, 30)]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_page(
        folder / "page.html", title="t", measurements=read_measurements([folder]), explorer=payload, record=RECORD
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, complaints = browser.new_page(viewport={"width": 390, "height": 844}), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url[:5] == "http:" else None)
        page.goto((folder / "page.html").as_uri())
        page.wait_for_selector("#explorer[data-ready]")
        yield page, complaints
        browser.close()


@pytest.mark.optin
@pytest.mark.parametrize("method", METHODS)
def test_the_browser_takes_the_attention_that_the_library_takes(browser_page, layers, method):
    page, _ = browser_page
    for layer in range(MODEL.dims.depth):
        for at, k in enumerate(SIZES):
            exact = reference_attention(method, k, layers[layer], layer)
            for image in range(2):
                for head in range(2):
                    where = {"head": head, "method": METHODS.index(method), "kIndex": at}
                    found = page.evaluate(
                        "async ([image, layer, where]) => { const arrays = await explorer.blob(image, layer);"
                        "return headView(arrays, explorer.payload, where).reduced.map((row) => Array.from(row)) }",
                        [image, layer, where],
                    )
                    assert np.abs(np.array(found) - exact[image, head]).sum(axis=-1).max() / 2 < 0.015


@pytest.mark.optin
def test_the_browser_loads_without_complaint_and_mouse_and_keys_change_the_view(browser_page):
    page, complaints = browser_page

    def state():
        page.wait_for_timeout(100)
        return page.evaluate("({...explorer.state})"), page.inner_text("[data-part=status]")

    before, said = state()
    page.locator("#token-3").click()
    after, now = state()
    assert after["query"] == 3 != before["query"]
    assert now != said
    page.focus("[data-part=panel-image] svg")
    for key, name, value in (("ArrowRight", "query", 4), ("ArrowRight", "query", 4), ("ArrowDown", "query", 8)):
        page.keyboard.press(key)
        assert state()[0][name] == value
    for key, name in (("l", "layer"), ("h", "head"), ("m", "method"), ("k", "k"), ("i", "image")):
        old, heard = state()
        page.keyboard.press(key)
        new, hears = state()
        assert {n for n in new if new[n] != old[n]} == {name}
        assert hears != heard or name == "image"
        page.keyboard.press(f"Shift+{key.upper()}")
        assert state()[0] == old
    first = page.inner_text("#tables tbody tr:first-child")
    page.get_by_role("button", name="accuracy %").first.click()
    assert page.get_attribute("#tables th[aria-sort=descending]", "class") == "percent"
    assert page.inner_text("#tables tbody tr:first-child") != first
    page.focus("[data-part=by-k] svg")
    page.keyboard.press("ArrowRight")
    assert "k = 8" in page.inner_text("[data-part=by-k] .tip")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert complaints == []
