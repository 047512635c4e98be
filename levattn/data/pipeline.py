"""Sources to batches. grain orders the examples; the loaders here turn a batch of positions into arrays.

Batches hold `image` (uint8, `b h w c`), `label` (int32, `b`) and `index` (int64, `b`, the position in the source).
Where a row may not count (a damaged image in training, padding in evaluation) there is `mask` (float32, `b`), too.
"""

import multiprocessing
import os
import pickle
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from absl import flags
from jaxtyping import Float64, Int64

from levattn.data.batches import Batches, load_example
from levattn.data.config import DataConfig
from levattn.data.errors import ImageError
from levattn.data.randaugment import randaugment
from levattn.data.sources import Source
from levattn.data.transforms import flip, random_resized_crop, resize_short_and_centre_crop, shift_over_zeros

_MAX_LENGTH = 2**60
_MAX_THREADS = 16


def output_shape(source: Source, config: DataConfig) -> tuple[int, int, int]:
    """The `(height, width, channels)` of every image in a batch.

    Raises:
      ValueError: when `config.image_size` is None and the source has no size of its own, or no square one.
    """
    if config.image_size is not None:
        return config.image_size, config.image_size, source.num_channels
    if source.image_shape is None:
        raise ValueError(f"image_size=None needs images of one size, and {source.name} has several; set image_size")
    if source.image_shape[0] != source.image_shape[1]:
        raise ValueError(f"image_size=None needs square images, and {source.name} has {source.image_shape}; set it")
    return source.image_shape


def train_batches(
    source: Source,
    config: DataConfig,
    *,
    global_batch_size: int,
    seed: int,
    start_step: int = 0,
    shard_index: int = 0,
    num_shards: int = 1,
) -> Batches:
    """An endless stream of augmented batches, the same for every number of workers.

    Position p of the stream holds an example that depends on (seed, p), augmented by random numbers that depend on
    (seed, p); every epoch is a new permutation. Step s covers positions s * global_batch_size onwards, and shard i
    of n takes the i-th block of them: a run resumes from its step alone, on any number of shards, and its batches put
    together are in the same order on any.

    An image that cannot be read is skipped and never replaced: its row is zeros with `mask` 0 (float32, `b`; 1
    elsewhere), to be left out of the loss, and `Batches` logs and counts it. Sources in memory have nothing to decode
    and no `mask`.

    Args:
      source: the images.
      config: crop, augmentation, workers and the share of images that may be damaged.
      global_batch_size: examples in a step, over all shards.
      seed: at least 0, below 2**63.
      start_step: the first step to yield.
      shard_index: which shard this is.
      num_shards: number of shards, commonly processes; divides `global_batch_size`.

    Returns:
      An iterator over this shard's part of each step, `global_batch_size / num_shards` rows. `close()` ends its
      threads or processes early.

    Raises:
      ValueError: for arguments out of range.
      ImageError: while iterating, when more than `config.max_damaged` of the images are damaged, naming them.
      ChildProcessError: while iterating, when a worker process died.
    """
    _check_shards(shard_index, num_shards)
    if global_batch_size < 1 or global_batch_size % num_shards:
        raise ValueError(f"{global_batch_size=} must be a positive multiple of {num_shards=}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{seed=} must be in [0, 2**63)")
    if start_step < 0:
        raise ValueError(f"{start_step=} must not be negative")
    # grain adds the epoch to a 32-bit seed: hashing keeps epoch 1 of seed 0 from being epoch 0 of seed 1.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    stream = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed).repeat().map_with_index(_with_position)
    # The endless stream is as long as an int can say, one more than grain can iterate over in batches of one.
    mine = stream[start_step * global_batch_size : _MAX_LENGTH]
    if num_shards > 1:
        block = _Block(mine, shard_index, num_shards, global_batch_size // num_shards)
        mine = grain.MapDataset.range(len(mine) // num_shards).map(block)
    steps = mine.batch(global_batch_size // num_shards, batch_fn=np.array)
    return _iterate(steps, _TrainLoader(source, config, output_shape(source, config), seed))


def eval_batches(
    source: Source, config: DataConfig, *, batch_size: int, shard_index: int = 0, num_shards: int = 1
) -> Batches:
    """Every example once, in order, in batches of one shape.

    Rows past the last example have `mask` 0 (float32, `b`; 1 elsewhere), `index` -1 and zeros for the rest. Every
    shard yields the same number of batches; the masks of all shards sum to `len(source)`.

    Args:
      source: the images.
      config: resize, crop and workers.
      batch_size: rows in each batch of this shard (the step of all shards has `batch_size * num_shards`).
      shard_index: which shard this is.
      num_shards: number of shards, commonly processes.

    Returns:
      An iterator over this shard's batches.

    Raises:
      ValueError: for arguments out of range.
      ImageError: while iterating, naming the first file that cannot be decoded: a score over the others would be one
        of another data set.
      ChildProcessError: while iterating, when a worker process died.
    """
    _check_shards(shard_index, num_shards)
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    num_steps = -(-len(source) // (batch_size * num_shards))
    positions = grain.MapDataset.range(num_steps * batch_size * num_shards)[shard_index::num_shards]
    steps = positions.batch(batch_size, batch_fn=np.array)
    return _iterate(steps, _EvalLoader(source, config, output_shape(source, config)))


@dataclass(frozen=True)
class _TrainLoader:
    """Loads and augments the examples of `(position in the stream, index in the source)` rows."""

    source: Source
    config: DataConfig
    shape: tuple[int, int, int]
    seed: int

    def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        config = self.config
        batch = _empty_batch(len(rows), self.shape)
        batch["index"][:] = rows[:, 1]
        if not self.source.in_memory:
            batch["mask"] = np.ones(len(rows), np.float32)
        for row, (position, index) in enumerate(rows.tolist()):
            try:
                image, batch["label"][row] = load_example(self.source, index)
                batch["image"][row] = self._crop_and_augment(image, position)
            except ImageError:
                batch["mask"][row] = 0
        # Cheap transforms are drawn for the whole batch: a generator for each small image would cost more than they do.
        draws = _position_draws(self.seed, rows[:, 0])
        if config.crop == "pad":
            shifts = np.floor(draws[:, :2] * (2 * config.crop_padding + 1)).astype(np.int64) - config.crop_padding
            batch["image"] = shift_over_zeros(batch["image"], shifts)
        if config.flip:
            batch["image"] = flip(batch["image"], draws[:, 2] < 0.5)
        return batch

    def _crop_and_augment(self, image: np.ndarray, position: int) -> np.ndarray:
        config, size = self.config, self.shape[0]
        if config.crop != "random_resized" and not config.randaugment_layers:
            return _centre(image, size, config)
        rng = np.random.default_rng((self.seed, position))
        if config.crop == "random_resized":
            image = random_resized_crop(image, size, rng, area_min=config.crop_area_min)
        else:
            image = _centre(image, size, config)
        if config.randaugment_layers:
            image = randaugment(
                image, rng, num_layers=config.randaugment_layers, magnitude=config.randaugment_magnitude
            )
        return image


@dataclass(frozen=True)
class _EvalLoader:
    """Loads the examples at some positions of the source; positions past its end become padding."""

    source: Source
    config: DataConfig
    shape: tuple[int, int, int]

    def __call__(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        batch = _empty_batch(len(positions), self.shape)
        batch["index"] = np.where(positions < len(self.source), positions, -1)
        batch["mask"] = (positions < len(self.source)).astype(np.float32)
        for row, index in enumerate(batch["index"].tolist()):
            if index >= 0:
                image, batch["label"][row] = load_example(self.source, index)
                batch["image"][row] = _centre(image, self.shape[0], self.config)
        return batch


def _position_draws(seed: int, positions: Int64[np.ndarray, " b"]) -> Float64[np.ndarray, "b 4"]:
    """Four uniform numbers in [0, 1) for each position of the stream, which depend on the seed and the position only.

    Philox makes four numbers for each value of its counter: the counter is the position.
    """
    first, last = int(positions[0]), int(positions[-1])
    philox = np.random.Philox(key=seed, counter=first)
    return np.random.Generator(philox).random((last - first + 1, 4))[positions - first]


@dataclass(frozen=True)
class _Block:
    """The places of a stream that one shard has: of every `num_shards * size` in a row, its `size`."""

    stream: grain.MapDataset
    shard_index: int
    num_shards: int
    size: int

    def __call__(self, place: int) -> tuple[int, int]:
        step, row = divmod(place, self.size)
        return self.stream[(step * self.num_shards + self.shard_index) * self.size + row]


def _with_position(position: int, index: int) -> tuple[int, int]:
    return position, index


def _empty_batch(num_rows: int, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {
        "image": np.zeros((num_rows, *shape), np.uint8),
        "label": np.zeros(num_rows, np.int32),
        "index": np.zeros(num_rows, np.int64),
    }


def _centre(image: np.ndarray, size: int, config: DataConfig) -> np.ndarray:
    return resize_short_and_centre_crop(image, size, short_side=config.eval_resize, interpolation=config.interpolation)


def _iterate(steps: grain.MapDataset, loader: _TrainLoader | _EvalLoader) -> Batches:
    load_fn = _ByFile(loader) if loader.config.num_workers else loader
    return Batches(_grain_iterator(steps.map(load_fn), loader.source, loader.config), loader.source, loader.config)


class _ByFile:
    """A function that goes to other processes by a file.

    What a process starts from goes to it through a pipe, which holds 64 KiB: whoever writes more than that, such as a
    source, to a process that is killed before it reads waits for ever.
    """

    def __init__(self, function: Callable):
        self._function = function
        # At once: iterators of several workers are made, and this is pickled, in threads.
        number, self._path = tempfile.mkstemp(prefix="levattn-")
        weakref.finalize(self, Path(self._path).unlink, missing_ok=True)
        with open(number, "wb") as file:
            pickle.dump(function, file)

    def __call__(self, *args):
        return self._function(*args)

    def __reduce__(self):
        return _unpickle, (self._path,)


def _unpickle(path: str) -> Callable:
    # The first that a worker does.
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()
    with open(path, "rb") as file:
        return pickle.load(file)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Ends this process when its parent is gone: one that was killed cannot end its workers."""
    parent.join()  # Not the kernel's signal at a parent's death: it comes when the thread that started us has ended.
    os._exit(1)


def _grain_iterator(steps: grain.MapDataset, source: Source, config: DataConfig) -> grain.DatasetIterator:
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read its flags.
            flags.FLAGS.mark_as_parsed()
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        workers = grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=2)
        return iter(steps.to_iter_dataset(one_thread).mp_prefetch(workers))
    # Decoding leaves the interpreter lock, so threads help; slicing arrays does not. Each thread holds a batch.
    num_threads = 1 if source.in_memory else min(_MAX_THREADS, _num_cpus())
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)))


def _num_cpus() -> int:
    # The cores this process may use, where the system tells; a container's share can be far below the machine's count.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_shards(shard_index: int, num_shards: int) -> None:
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"{shard_index=} must be in [0, {num_shards=})")
