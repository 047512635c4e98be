"""The stream of batches is a function of (source, config, seed, step): nothing else may change it."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from levattn.data import DataConfig, ImageError, eval_batches, open_source, output_shape, train_batches

SMALL = DataConfig(source="fake:num_classes=3,size=12,examples=22", crop="pad", flip=True)
HEAVY = DataConfig(
    source="fake:num_classes=3,size=12,examples=22",
    image_size=8,
    crop="random_resized",
    flip=True,
    randaugment_layers=2,
)


def take(config, num_steps, *, split="train", **options):
    batches = train_batches(open_source(config, split), config, **{"global_batch_size": 8, "seed": 3} | options)
    taken = list(itertools.islice(batches, num_steps))
    batches.close()
    return taken


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("config", [SMALL, HEAVY])
def test_batches_have_the_promised_shapes_and_types(config):
    (batch,) = take(config, 1)
    shape = output_shape(open_source(config, "train"), config)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((8, *shape), "uint8"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
    }
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


@pytest.mark.parametrize("config", [SMALL, HEAVY])
def test_the_same_seed_gives_the_same_stream_and_another_seed_another(config):
    assert_equal(take(config, 6), take(config, 6))
    assert (take(config, 1)[0]["index"] != take(config, 1, seed=4)[0]["index"]).any()


@pytest.mark.parametrize("config", [SMALL, HEAVY])
@pytest.mark.parametrize("start_step", [1, 5])
def test_resuming_needs_the_step_alone(config, start_step):
    assert_equal(take(config, 3, start_step=start_step), take(config, 8)[start_step : start_step + 3])


@pytest.mark.parametrize("config", [SMALL, HEAVY])
@pytest.mark.parametrize("num_shards", [2, 4])
def test_the_shards_together_are_the_whole_batch(config, num_shards):
    whole = take(config, 5, start_step=2)
    parts = [take(config, 5, start_step=2, shard_index=i, num_shards=num_shards) for i in range(num_shards)]
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([part[step][key] for part in parts]))


def test_batches_of_one_are_the_examples_of_a_larger_batch_one_by_one():
    (batch,) = take(SMALL, 1)
    ones = take(SMALL, 8, global_batch_size=1)
    assert_equal([{key: np.concatenate([one[key] for one in ones]) for key in batch}], [batch])


def test_every_epoch_is_another_permutation_and_epochs_do_not_repeat_under_the_next_seed():
    def epochs(seed):
        indices = np.concatenate([batch["index"] for batch in take(SMALL, 11, seed=seed)])
        return indices.reshape(4, 22)

    orders = np.concatenate([epochs(0), epochs(1)])
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(22), (8, 1)))
    assert len(np.unique(orders, axis=0)) == 8


def test_an_example_is_augmented_anew_each_time_it_comes():
    config = DataConfig(source="fake:size=12,examples=1", crop="pad", crop_padding=3, flip=True)
    images = np.concatenate([batch["image"] for batch in take(config, 4)])
    assert len(np.unique(images.reshape(32, -1), axis=0)) > 16


def test_pad_shifts_by_every_amount_equally_often_and_flips_half():
    config = DataConfig(source="fake:size=12,examples=1", crop="pad", crop_padding=1, flip=True)
    plain = open_source(config, "train")[0]["image"]
    padded = np.pad(plain, ((1, 1), (1, 1), (0, 0)))
    windows = [padded[y : y + 12, x : x + 12] for y in range(3) for x in range(3)]
    expected = {
        (w[:, ::-1] if flipped else w).tobytes(): (k, flipped) for k, w in enumerate(windows) for flipped in (0, 1)
    }
    assert len(expected) == 18
    counts = np.zeros((9, 2), int)
    for batch in take(config, 20, global_batch_size=90):
        for image in batch["image"]:
            counts[expected[image.tobytes()]] += 1
    assert counts.sum() == 1800
    assert counts.min() > 60  # 100 each on average.
    assert counts.max() < 145


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_the_stream():
    reference = take(HEAVY, 7, start_step=1)
    for num_workers in (1, 4):
        assert_equal(take(dataclasses.replace(HEAVY, num_workers=num_workers), 7, start_step=1), reference)


@pytest.mark.parametrize("num_examples", [1, 7, 8, 22])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_evaluation_counts_every_example_once_and_pads_with_zeros(num_examples, num_shards):
    config = DataConfig(source=f"fake:num_classes=3,size=12,examples={num_examples}")
    source = open_source(config, "test")
    shards = [
        list(eval_batches(source, config, batch_size=4, shard_index=i, num_shards=num_shards))
        for i in range(num_shards)
    ]
    assert len({len(shard) for shard in shards}) == 1
    seen = []
    for batch in itertools.chain.from_iterable(shards):
        assert batch["image"].shape == (4, 12, 12, 3)
        assert batch["mask"].dtype == np.float32
        real = batch["mask"] == 1
        np.testing.assert_array_equal(batch["mask"], batch["index"] >= 0)
        assert not batch["image"][~real].any()
        assert not batch["label"][~real].any()
        seen += batch["index"][real].tolist()
        for row in np.flatnonzero(real):
            np.testing.assert_array_equal(batch["image"][row], source[int(batch["index"][row])]["image"])
            assert batch["label"][row] == source[int(batch["index"][row])]["label"]
    assert sorted(seen) == list(range(num_examples))


def test_a_damaged_image_stops_the_stream_and_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "good.png")
    (tmp_path / "cat" / "bad.jpg").write_bytes(b"<html>404</html>")
    config = DataConfig(source=f"folder:{tmp_path}", image_size=8)
    with pytest.raises(ImageError, match=r"cat/bad\.jpg"):
        take(config, 1)


def test_bad_arguments_are_refused_by_name(tmp_path):
    source = open_source(SMALL, "train")
    for name, options in {
        "global_batch_size": {"num_shards": 3},
        "shard_index": {"shard_index": 2, "num_shards": 2},
        "seed": {"seed": -1},
        "start_step": {"start_step": -1},
    }.items():
        with pytest.raises(ValueError, match=name):
            train_batches(source, SMALL, **{"global_batch_size": 8, "seed": 0} | options)
    with pytest.raises(ValueError, match="batch_size"):
        eval_batches(source, SMALL, batch_size=0)


def test_images_of_many_sizes_need_an_image_size(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "0.png")
    config = DataConfig(source=f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="image_size"):
        output_shape(open_source(config, "train"), config)
