"""Files of every format give the arrays that were put in; what is no checkpoint is told apart, with the next step."""

import io
import json
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import save_torch

from levattn.models.pretrained import Content, read_content
from levattn.models.pretrained.torch_file import read_torch

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(2.5, np.float64),
    "c": np.arange(4, dtype=np.int64),
    "half": np.linspace(0, 1, 5, dtype=np.float16),
}


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def save(path, arrays=ARRAYS):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    else:
        save_torch(path, arrays)
    return path


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.pth", "no suffix that says anything"])
def test_arrays_come_back_as_they_were_saved(tmp_path, name):
    content = read_content(save(tmp_path / name))
    assert_same_arrays(content.arrays, ARRAYS)
    assert content.metadata == {}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_format_is_told_by_what_is_in_the_file(tmp_path, suffix):
    path = save(tmp_path / f"x{suffix}").rename(tmp_path / "x.bin")
    assert_same_arrays(read_content(path).arrays, ARRAYS)


def test_bfloat16_is_read_from_safetensors_and_from_numpys_raw_bytes(tmp_path):
    numbers = np.array([1.0, -2.5, 3e38], jnp.bfloat16)
    np.savez(tmp_path / "x.npz", w=numbers.view("V2"))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + numbers.tobytes())
    for name in ("x.npz", "x.safetensors"):
        assert_same_arrays(read_content(tmp_path / name).arrays, {"w": numbers})


def test_a_set_of_files_is_read_by_its_index_or_folder(tmp_path):
    halves = {"model-1.safetensors": {"a": np.ones(2)}, "model-2.safetensors": {"b": np.zeros(3)}}
    for name, arrays in halves.items():
        save(tmp_path / name, arrays)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    for path in (index, tmp_path):
        assert_same_arrays(read_content(path).arrays, {"a": np.ones(2), "b": np.zeros(3)})
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"download them too: .*model-2\.safetensors"):
        read_content(tmp_path)
    save(tmp_path / "model-2.safetensors", {"other": np.zeros(3)})
    with pytest.raises(ValueError, match="1 tensors that its files do not hold, such as 'b'"):
        read_content(tmp_path)


def test_json_beside_a_file_comes_along(tmp_path):
    save(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224}')
    assert read_content(tmp_path).metadata == {"config": {"model_type": "vit"}, "preprocessor": {"size": 224}}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' is not valid JSON"):
        read_content(tmp_path)


def test_a_folder_of_several_checkpoints_is_not_guessed_at(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        read_content(tmp_path)
    save(tmp_path / "one.npz")
    assert read_content(tmp_path).name == "one"
    save(tmp_path / "two.npz")
    with pytest.raises(ValueError, match=r"several checkpoints, give the path of one of them: one\.npz, two\.npz"):
        read_content(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_content(tmp_path / "three.npz")


@pytest.mark.parametrize(
    "path, name",
    [
        (
            "B_16-i21k-300ep-lr_0.001--imagenet2012-steps_20k-res_384.npz",
            "B_16-i21k-300ep-lr_0.001--imagenet2012-steps_20k-res_384",
        ),
        ("vit_base_patch16_224.augreg_in21k/model.safetensors", "vit_base_patch16_224.augreg_in21k"),
        ("deit_small_patch16_224-cd65a155.pth", "deit_small_patch16_224-cd65a155"),
        (f"hub/models--timm--vit_small.dino/snapshots/{'0a' * 20}/model.safetensors", "vit_small.dino"),
        ("x/model.safetensors.index.json", "x"),
        ("moco.pth.tar", "moco"),
    ],
)
def test_a_checkpoint_is_called_by_the_part_of_its_path_that_says_something(tmp_path, path, name):
    assert Content(tmp_path / path, {}, {}).name == name


@pytest.mark.parametrize(
    "data, what",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346284714\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html lang='en'>", "a web page: download the file itself"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an error message of a file server"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"rest", r"before PyTorch 1\.6.*weights_only=True"),
        (pickle.dumps({"a": 1}), "a bare pickle, which could run any code"),
        (b"", "cannot be read as|empty"),
        (b"something else", "cannot be read as|in no known format"),
    ],
)
@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.pth", "x"])
def test_what_is_no_checkpoint_is_told_apart(tmp_path, data, what, name):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=what):
        read_content(tmp_path / name)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.pth"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_truncated_file_is_refused_with_its_size(tmp_path, name, keep):
    path = save(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(
        ValueError, match=rf"x\.\w+' \({int(keep * len(data)):,} bytes\) cannot be read.*download it again"
    ):
        read_content(path)


@pytest.mark.parametrize("name", ["x.npz", "x.pth"])
def test_a_flipped_bit_is_found(tmp_path, name):
    path = save(tmp_path / name, {"w": np.ones(100, np.float32)})
    data = bytearray(path.read_bytes())
    data[data.find(np.ones(10, np.float32).tobytes()) + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as"):
        read_content(path)


def test_an_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match=r"cannot be read as a NumPy archive.*allow_pickle"):
        read_content(tmp_path / "x.npz")


def test_a_repository_in_a_download_cache_is_one_checkpoint(tmp_path):
    folder = tmp_path / "models--timm--vit_small.dino" / "snapshots" / ("0a" * 20)
    folder.mkdir(parents=True)
    save(folder / "model.safetensors")
    assert read_content(tmp_path / "models--timm--vit_small.dino").name == "vit_small.dino"


# Files of torch.save


@pytest.mark.parametrize("wrapped_in", [(), ("state_dict",), ("model_ema",), ("model", "state_dict")])
def test_weights_are_found_inside_what_a_training_script_saved(tmp_path, wrapped_in):
    save_torch(tmp_path / "x.pth", {f"module.{name}": x for name, x in ARRAYS.items()}, wrapped_in=wrapped_in)
    assert_same_arrays(read_torch(tmp_path / "x.pth"), ARRAYS)


def test_big_endian_numbers_keep_their_values(tmp_path):
    save_torch(tmp_path / "x.pth", ARRAYS, byteorder="big")
    for name, array in read_torch(tmp_path / "x.pth").items():
        np.testing.assert_array_equal(array, ARRAYS[name])


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


class SystemCall:
    def __reduce__(self):
        import os

        return os.system, ("false",)


@pytest.mark.parametrize(
    "payload, asks_for",
    [
        (pickle.dumps(Bomb(), protocol=2), r"_pytest\.outcomes"),
        (pickle.dumps(Bomb(), protocol=4), r"_pytest\.outcomes"),  # the name comes from the stack
        (pickle.dumps(SystemCall(), protocol=2), r"posix\.system"),
        (b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.", r"builtins\.eval"),
        (b"(X\x03\x00\x00\x001+1ibuiltins\neval\n.", r"builtins\.eval"),  # the opcode INST
        (b"\x80\x02ctorch._utils\n_rebuild_tensor\n.", r"torch\._utils\._rebuild_tensor'"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_before_it_does(tmp_path, payload, asks_for):
    save_torch(tmp_path / "x.pth", {}, pickled=payload)
    with pytest.raises(ValueError, match=rf"its pickle asks for '{asks_for}.*nothing was run"):
        read_content(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00xK\x01sb.",  # sets an attribute of the class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",  # and of the reader
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # calls a storage
        b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00xX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02}(X\x01\x00\x00\x00a",  # ends too soon
        b"\x80\x02K\x01.",  # a number
    ],
)
def test_pickles_that_twist_what_is_allowed_change_nothing_and_are_refused(tmp_path, payload):
    save_torch(tmp_path / "x.pth", ARRAYS, pickled=payload)
    with pytest.raises(ValueError, match=r"cannot be read as a file of torch\.save"):
        read_content(tmp_path / "x.pth")
    assert_same_arrays(read_content(save(tmp_path / "y.pth")).arrays, ARRAYS)


@pytest.mark.parametrize(
    "shape, strides, offset", [((7,), (1,), 0), ((3,), (3,), 0), ((2,), (1,), 5), ((1,), (1,), -1)]
)
def test_a_tensor_cannot_reach_outside_of_its_storage(tmp_path, shape, strides, offset):
    path = tmp_path / "x.pth"
    save_torch(path, {"w": np.zeros(6, np.float32)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    old = b"J" + struct.pack("<i", 0) + b"(J" + struct.pack("<i", 6) + b"t(J" + struct.pack("<i", 1) + b"t"
    assert old in pickled
    numbers = [b"J" + struct.pack("<i", n) for n in (offset, *shape, *strides)]
    save_torch(path, {"w": np.zeros(6, np.float32)}, pickled=pickled.replace(old, b"%b(%bt(%bt" % tuple(numbers)))
    with pytest.raises(ValueError, match="storage"):
        read_content(path)


@pytest.mark.optin
def test_what_torch_saves_is_what_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    from argparse import Namespace

    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "part of the same storage": base[1:3, 2:],
        "bfloat16": base.bfloat16(),
        "half": base.half(),
        "bool": base > 3,
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    saved = {
        "state_dict": tensors,
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]).state_dict(),
        "args": Namespace(lr=0.1, device=torch.device("cpu"), dtype=torch.float32),
        "best": np.float64(0.5),
        "epoch": 7,
    }
    torch.save(saved, tmp_path / "x.pth")
    arrays = read_content(tmp_path / "x.pth").arrays
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name].astype(np.float64), tensor.detach().double().numpy())
    torch.save(saved, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before PyTorch 1\.6"):
        read_content(tmp_path / "old.pth")
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(2, 3), buffer)  # a module and not its state dict
    (tmp_path / "module.pth").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"asks for 'torch\.nn.*save nothing but the model's state_dict"):
        read_content(tmp_path / "module.pth")


@pytest.mark.optin
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archives_give_the_state_dict(tmp_path):
    """As which OpenAI published CLIP."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Sequential(torch.nn.BatchNorm2d(4))).eval()
    torch.jit.trace(model, torch.zeros(1, 3, 8, 8)).save(str(tmp_path / "x.pt"))
    arrays = read_content(tmp_path / "x.pt").arrays
    expected = model.state_dict()
    assert arrays.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())
