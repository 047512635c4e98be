"""Checkpoints, data files and configs from strangers: nothing in them is run, and no number in them is believed."""

import gzip
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import random_params, save_torch, to_timm

import levattn
from levattn.data.sources.fashion_mnist import read_idx
from levattn.models import ModelConfig
from levattn.models.pretrained import convert, read_content
from levattn.training.config import to_dict
from levattn.training.export import export_params, load_params
from levattn.training.loaded import load_model
from tests.retrofits import CONFIG, tiny_model

ROOT = Path(__file__).parents[1]
TINY = ModelConfig("mu/4", width=64, depth=1, num_heads=1, mlp_dim=64, num_classes=3, head_zero_init=False)
W = {"w": np.ones((3, 4), np.float32)}


@pytest.fixture(scope="module")
def timm():
    return to_timm(random_params(TINY, 8))


@pytest.fixture(autouse=True)
def _little_memory():
    """An address space of half a GiB more than there is: what is not refused before it is allocated fails otherwise."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(path, message, read_fn=read_content):
    """Reading raises a ValueError that names the file and says this, in a second."""
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as found:
        read_fn(path)
    assert str(path) in str(found.value)
    assert time.perf_counter() - start < 1
    causes = [found.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert not any(isinstance(cause, MemoryError) for cause in causes)


def npy(array=None, header=None, data=b""):
    """A member of an .npz; with a header of one's own."""
    file = io.BytesIO()
    if header is None:
        np.save(file, array)
        return file.getvalue()
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def save_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def save_header(path, header, data=b"", length=None):
    """A safetensors file; a dict is made JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


# Pickles


class Payload:
    """As a pickle: makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_in_a_pth_is_refused_and_not_run(tmp_path, protocol):
    save_torch(tmp_path / "x.pth", W, pickled=pickle.dumps({"w": Payload(tmp_path / "ran")}, protocol))
    refused(tmp_path / "x.pth", r"asks for 'posix\.mkdir'.*nothing was run")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_an_npz_or_under_any_name_is_refused_and_not_run(tmp_path):
    payload = pickle.dumps(Payload(tmp_path / "ran"), 2)
    np.savez(tmp_path / "x.npz", w=np.array([Payload(tmp_path / "ran")], dtype=object))
    refused(tmp_path / "x.npz", r"'w\.npy' holds Python objects, as a pickle that could run any code and was not run")
    save_zip(tmp_path / "y.npz", [("w.npy", payload), ("v.npy", npy(W["w"]))])
    refused(tmp_path / "y.npz", "magic string")
    for name in ("x.pth", "x.npz", "x.safetensors", "x.onnx"):
        (tmp_path / name).write_bytes(payload)
        refused(tmp_path / name, "a bare pickle, which could run any code")
    assert not (tmp_path / "ran").exists()


def nested(depth):
    return b"}X\x01\x00\x00\x00a" * depth + b"}" + b"s" * depth


def doubled(depth):
    """A dict of the same dict twice, which is one of the same dict twice."""
    pickled = b"}q\x00"
    for i in range(1, depth):
        pickled += b"}q%c(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cu" % (i, i - 1, i - 1)
    return pickled


PICKLES = {
    "a memo of four billion places": b"\x80\x02}r\xff\xff\xff\xff.",
    "a memo by a number in decimals": b"\x80\x02}p4000000000\n.",
    "a buffer of an exabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x.",
    "bytes of four gigabytes": b"\x80\x03B\xff\xff\xff\xffx.",
    "bytes of an exabyte": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "a text of an exabyte": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "a frame of an exabyte": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "an extension": b"\x80\x02\x82\x01.",
    "a dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "sixty dicts that are a tree of 2^60": b"\x80\x02" + doubled(60) + b".",
    "a hundred thousand dicts in each other": b"\x80\x02" + nested(100_000) + b".",
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_that_would_fill_memory_or_never_end_is_refused(tmp_path, what):
    save_torch(tmp_path / "x.pth", W, pickled=PICKLES[what])
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"x\.pth' .* cannot be read as a file of torch\.save"):
        read_content(tmp_path / "x.pth")
    assert time.perf_counter() - start < 5


# Archives


@pytest.mark.parametrize("name, member", [("x.npz", "w.npy"), ("x.pth", "archive/data/0")])
def test_a_zip_bomb_is_refused_by_its_directory(tmp_path, name, member):
    save_torch(tmp_path / "x.pth", W)
    zeros = bytes(2**27)
    with zipfile.ZipFile(tmp_path / name, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy" if name == "x.npz" else "archive/data/7", zeros)
    assert (tmp_path / name).stat().st_size < 2**18
    refused(tmp_path / name, "that is a zip bomb")


def test_zeros_that_compress_well_are_no_bomb(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros((1000, 1000), np.float32))
    assert read_content(tmp_path / "x.npz").arrays["w"].shape == (1000, 1000)


def test_members_in_the_place_of_each_other_are_refused(tmp_path):
    """A bomb whose directory names one member many times has many members for the bytes of one."""
    path = save_zip(tmp_path / "x.npz", [("a.npy", npy(W["w"])), ("b.npy", npy(W["w"]))])
    data = bytearray(path.read_bytes())
    first, second = (i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    refused(path, r"'b\.npy' lies in the place of another")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name, member", [("x.npz", "w.npy"), ("x.pth", "archive/data/0"), ("x.pth", "archive/data.pkl")]
)
def test_a_member_that_is_there_twice_is_refused(tmp_path, name, member):
    if name == "x.pth":
        save_torch(tmp_path / name, W)
    with zipfile.ZipFile(tmp_path / name, "a") as archive:
        for _ in range(2):
            archive.writestr(member, npy(W["w"]))
    refused(tmp_path / name, f"it holds '{member}' more than once")


@pytest.mark.parametrize("member", ["../w.npy", "/etc/w.npy", "a/../../w.npy", "..\\w.npy", "C:w.npy"])
@pytest.mark.parametrize("name", ["x.npz", "x.pth"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path, name, member):
    if name == "x.pth":
        save_torch(tmp_path / name, W)
        member = member.removesuffix(".npy")
    with zipfile.ZipFile(tmp_path / name, "a") as archive:
        archive.writestr(member, npy(W["w"]))
    refused(tmp_path / name, "leads out of the archive")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_ways_of_packing_are_refused(tmp_path, method):
    refused(save_zip(tmp_path / "x.npz", [("w.npy", npy(W["w"]))], method), "packed by another method than deflate")


@pytest.mark.parametrize(
    "shape",
    ["(1099511627776,)", "(3, 1099511627776)", "(4611686018427387904, 4611686018427387904)", "(-3,)", "(2,)", "(4,)"],
)
def test_a_shape_in_a_header_is_believed_only_with_the_bytes_of_it(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
    refused(
        save_zip(tmp_path / "x.npz", [("w.npy", npy(header=header, data=bytes(12)))]), r"'w\.npy' is to be of shape"
    )


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<U1', 'fortran_order': False, 'shape': (3,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}",
        "{'descr': '<f4', 'fortran_order': False}",
        "__import__('os').mkdir('ran')",
        "(" * 100,
        "-" * 100 + "1",
    ],
)
def test_a_header_of_another_form_is_refused_and_not_run(tmp_path, header, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_zip(tmp_path / "x.npz", [("w.npy", npy(header=header, data=b"\xff" * 12))])
    refused(path, "cannot be read as a NumPy archive")
    assert not (tmp_path / "ran").exists()


def test_a_storage_shorter_than_its_tensor_is_refused(tmp_path):
    save_torch(tmp_path / "x.pth", {"w": np.ones(100, np.float32)})
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    members = [(name, data[:40] if name.endswith("/0") else data) for name, data in members]
    refused(save_zip(tmp_path / "y.pth", members), "storage 0 holds 10 numbers, not 100")


# safetensors


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": tensor(0, 16), "b": tensor(8, 24)}, "tensors 'a' and 'b' overlap"),
        ({"a": tensor(0, 16), "b": tensor(0, 16), "c": tensor(16, 24)}, "tensors '[ab]' and '[ab]' overlap"),
        ({"a": tensor(0, 8), "b": tensor(12, 24)}, "tensors 'a' and 'b' leave a hole between them"),
        ({"a": tensor(0, 24), "b": tensor(24, 48)}, "tensor 'b' ends at byte 48 of 24"),
        ({"a": tensor(0, 8)}, "16 bytes behind the last tensor, 'a', are of none"),
        ({"a": tensor(0, 24, [7])}, r"tensor 'a' of shape \[7\] is to have 28 bytes, and has 24"),
        ({"a": tensor(0, 24, [2**40, 2**40])}, "tensor 'a' of shape"),
        ({"a": tensor(0, 24, [2**62, 0])}, "tensor 'a' of shape"),
        ({"a": tensor(0, 24, [-2, -3])}, "tensor 'a' has shape"),
        ({"a": tensor(0, 24, [True, 6])}, "tensor 'a' has shape"),
        ({"a": tensor(0, 24, dtype="F31")}, "tensor 'a' is of unknown dtype F31"),
        ({"a": tensor(0, 24, dtype=[])}, "tensor 'a' is of unknown dtype"),
        ({"a": tensor(0, 24) | {"data_offsets": [0, 2**80]}}, "tensor 'a' has shape"),
        ({"a": tensor(0, 24) | {"data_offsets": [24, 0]}}, "tensor 'a' of shape"),
        ({"a": tensor(0, 24) | {"data_offsets": 3}}, "tensor 'a' has shape"),
        ({"a": []}, "tensor 'a' has no dtype"),
        ({"a": tensor(0, 24), "__metadata__": {"config": 3}}, "no record of texts"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 24)).encode(),) * 2), "its header has 'a' 2 times"),
        (b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [6], "data_offsets": [0, 24]}}', "'dtype' 2 times"),
        (b"{" + b'"a":[' * 100_000, "cannot be read as safetensors"),
        (b"{\xff}", "cannot be read as safetensors"),
    ],
)
def test_a_safetensors_header_that_does_not_fit_is_refused_by_the_name_of_the_tensor(tmp_path, header, message):
    refused(save_header(tmp_path / "x.safetensors", header, bytes(24)), message)


@pytest.mark.parametrize("length", [0, 2**40, 2**63, 2**64 - 1])
def test_a_safetensors_header_longer_than_the_file_is_refused(tmp_path, length):
    refused(save_header(tmp_path / "x.safetensors", {"a": tensor(0, 24)}, bytes(24), length), "cannot be read as safet")


def test_the_librarys_own_files_are_read_as_by_the_library(tmp_path):
    """Every dtype that both know, scalars and empty tensors among them."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{dtype}{shape}": rng.integers(0, 2, shape).astype(dtype)
        for dtype in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
        for shape in ((), (3,), (0, 4), (2, 3, 1))
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "pt"})
    found, expected = (
        read_content(tmp_path / "x.safetensors").arrays,
        safetensors.numpy.load_file(tmp_path / "x.safetensors"),
    )
    assert found.keys() == expected.keys() == arrays.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


# Sets of files, pipes, JSON


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/x.safetensors", "..", ""])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(safetensors.numpy.save(W))
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refused(tmp_path / "a.index.json", "only files beside it are read")


def test_a_tensor_in_two_files_of_a_set_is_refused(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        (tmp_path / name).write_bytes(safetensors.numpy.save(W))
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"w": "1.safetensors", "v": "2.safetensors"}}))
    refused(tmp_path / "a.index.json", r"'w' is in '2\.safetensors' and in a file before it")


def test_a_pipe_or_a_device_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    for name in ("pipe.npz", "zero.pth"):
        refused(tmp_path / name, "is no regular file")


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' * 100_000, b"1" * 10_000])
def test_json_of_no_use_beside_a_checkpoint_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(W))
    (tmp_path / "config.json").write_bytes(text)
    refused(tmp_path / "config.json", "is not valid JSON", lambda path: read_content(path.parent))


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": 3},
        {"architecture": "vit", "model_args": [1]},
        {"architecture": "vit", "model_args": {"num_heads": 0.5}},
        {"architecture": "vit", "model_args": {"num_heads": 7}},
        {"architecture": "vit", "pretrained_cfg": {"mean": None, "std": "x"}},
        {"architecture": "vit", "pretrained_cfg": {"input_size": 5}},
        {"architecture": "vit", "model_args": {"act_layer": []}},
    ],
)
def test_a_config_of_another_form_beside_a_checkpoint_is_refused(tmp_path, timm, config):
    (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(timm))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"recognised as timm|num_heads=7"):
        levattn.load_pretrained(tmp_path)


# What the numbers say


def converted(path):
    return convert(read_content(path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
def test_numbers_that_are_not_finite_are_refused_by_the_names_of_their_tensors(tmp_path, timm, suffix, value):
    arrays = {name: array.copy() for name, array in timm.items()}
    for name in ("pos_embed", "blocks.0.attn.qkv.weight"):
        arrays[name].flat[3] = value
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    elif suffix == ".pth":
        save_torch(path, arrays)
    else:
        path.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in arrays.items()}))
    with pytest.raises(ValueError, match=r"(?s)pos_embed .* in 1 places.*qkv\.weight .* in 1 places"):
        levattn.load_pretrained(path)


def test_numbers_past_float32_are_refused(tmp_path, timm):
    path = tmp_path / "x.npz"
    np.savez(path, **(timm | {"pos_embed": np.full(timm["pos_embed"].shape, 1e300)}))
    with pytest.raises(ValueError, match=r"pos_embed .* is NaN or infinite in 256 places"):
        levattn.load_pretrained(path)


def test_all_that_does_not_fit_a_checkpoint_is_told_at_once(tmp_path, timm):
    arrays = dict(timm)
    del arrays["norm.bias"]
    arrays["blocks.0.mlp.fc1.bias"] = np.ones(5, np.float32)
    arrays["stranger"] = np.ones(2, np.float32)
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError) as found:
        levattn.load_pretrained(tmp_path / "x.npz")
    for part in (
        "blocks.0.mlp.fc1.bias is (5,), not (64,)",
        "norm.bias (64,) is missing",
        "stranger is not known here",
    ):
        assert part in str(found.value)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.999999999.norm1.weight": np.ones(64, np.float32)},
        {"patch_embed.proj.weight": np.zeros((2**40, 0, 4, 4), np.float32)},
        {
            "patch_embed.proj.weight": np.ones((2**16, 1, 1, 1), np.float32),
            "blocks.0.mlp.fc2.weight": np.ones((1, 2**16)),
        },
        {"pos_embed": np.zeros((1, 2**40, 0), np.float32)},
    ],
)
def test_sizes_that_somebody_made_up_are_refused_before_anything_is_allocated(tmp_path, timm, change):
    np.savez(tmp_path / "x.npz", **(timm | change))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"depth=|is empty|more than the|how many heads"):
        converted(tmp_path / "x.npz")
    assert time.perf_counter() - start < 2


def test_positions_for_an_image_of_any_size_are_not_made(tmp_path, timm):
    np.savez(tmp_path / "x.npz", **timm)
    with pytest.raises(ValueError, match=r"position embeddings of .* patches are too many"):
        levattn.load_pretrained(tmp_path / "x.npz", image_size=400_000)


# This project's own exports


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_export_that_does_not_fit_its_config_is_refused_with_all_that_does_not(tmp_path, suffix):
    params = {**tiny_model().params}
    path = tmp_path / f"params{suffix}"
    head = {"kernel": np.ones((7, 10), np.float32), "bias": np.asarray(params["head"]["bias"])}
    export_params(path, {**params, "head": head, "extra": np.ones(2, np.float32)}, to_dict(CONFIG))
    for load_fn in (levattn.load_pretrained, load_model):
        with pytest.raises(
            ValueError, match=r"head/kernel is \(7, 10\), not .*(.|\n)*extra \(2,\) is not in the model"
        ):
            load_fn(path)
    export_params(
        path, {**params, "head": {**params["head"], "bias": np.full(10, np.nan, np.float32)}}, to_dict(CONFIG)
    )
    for load_fn in (levattn.load_pretrained, load_model, load_params):
        with pytest.raises(ValueError, match=r"head/bias \(10,\) is NaN or infinite in 10 places"):
            load_fn(path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"data": 3, "model": 4, "optimizer": {}}, "data: expected DataConfig"),
        ({"data": {}, "model": {"varient": "S/2"}, "optimizer": {}}, r"did you mean 'model\.variant'"),
    ],
)
def test_a_config_in_an_export_is_validated_as_any_other(tmp_path, config, message):
    export_params(tmp_path / "params.npz", tiny_model().params, config)
    with pytest.raises(ValueError, match=message) as found:
        load_model(tmp_path / "params.npz")
    assert "params.npz" in str(found.value)


def test_names_that_begin_each_other_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(safetensors.numpy.save({"a": np.ones(2), "a/b": np.ones(2)}))
    refused(tmp_path / "x.safetensors", "a tensor cannot be a folder, too", load_params)


# idx


def idx(shape, data, kind=8):
    return struct.pack(">HBB", 0, kind, len(shape)) + struct.pack(f">{len(shape)}I", *shape) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00\x08",
        idx((2, 3), bytes(5)),
        idx((2, 3), bytes(7)),
        idx((2, 3), bytes(6), kind=13),
        idx((2**32 - 1,) * 3, b""),
        idx((2**32 - 1,) * 3 + (0,), b""),
        idx((2**31,), b""),
        b"\x00\x00\x08\xff" + bytes(10),
        b"<html>",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_file_whose_header_does_not_fit_is_refused(tmp_path, data, packed):
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(data) if packed else data)
    refused(path, "cannot be read", read_idx)


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx((2, 3), bytes(2**27)), 9))
    refused(path, "cannot be read", read_idx)
    path.write_bytes(gzip.compress(idx((2**31,), bytes(2**24)), 9))
    refused(path, "cannot be read", read_idx)


def test_a_sound_idx_file_is_read(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx((2, 3), bytes(range(6)))))
    np.testing.assert_array_equal(read_idx(path), np.arange(6, dtype=np.uint8).reshape(2, 3))


# ONNX


def save_onnx(path, *tensors):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "graph", [], [], tensors)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def test_an_onnx_file_that_points_to_another_file_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret").write_bytes(bytes(16))
    for place in ("secret", "../../etc/passwd", "/etc/passwd"):
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=place)
        refused(save_onnx(tmp_path / "x.onnx", tensor), "tensor 'w' lies in another file, which is not opened")


@pytest.mark.parametrize("dims", [[2**62], [2**40, 2**40], [-1], [7]])
@pytest.mark.parametrize("kind", [1, 3, 10, 16, 22])
def test_a_shape_in_an_onnx_file_is_believed_only_with_the_bytes_of_it(tmp_path, dims, kind):
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=kind, dims=dims, raw_data=bytes(3))
    refused(save_onnx(tmp_path / "x.onnx", tensor), "cannot be read as ONNX")


# Everything else


def test_thousands_of_damaged_files_and_configs_raise_what_the_readers_document(tmp_path):
    """A short form of scripts/fuzz.py, in a process of its own for its limit of memory."""
    command = [sys.executable, "-m", "scripts.fuzz", "--inputs", "1000", "--failures", str(tmp_path), "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "fuzz.json")], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert sum(row["inputs"] for row in result["rows"]) >= 1000
    assert all(row["failed"] == 0 and row["longest_ms"] < 5000 for row in result["rows"])
    assert all(row["refused"] > 0 for row in result["rows"])
