"""Feeds damaged and hostile input to every reader of files and of configs, and counts what comes of it.

    python -m scripts.fuzz --out results/fuzz/fuzz.json            # 120,000 inputs, some minutes on one core
    python -m scripts.fuzz --inputs 2000 --only pth,npz --seed 7

An input is a good file with a few things changed in it: bits, numbers, lengths, parts cut out, doubled or taken from
another file; in archives also members, with checksums made right again, so that what lies behind them is reached. A
reader may take it, or refuse it by the errors that it documents. Anything else is a failure: another error, more than
five seconds, an allocation of more than one GiB (the address space is limited to that much more than at the start), or
the end of this process, which leaves its last input in the folder it prints. Failing inputs are kept there, too. The
same seed makes the same inputs.
"""

import argparse
import collections
import copy
import faulthandler
import gzip
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from configs import fashion_mnist
from levattn.data import DataConfig, ImageError, decode_image
from levattn.data.sources.fashion_mnist import read_idx
from levattn.models import ModelConfig
from levattn.models.pretrained import convert, nest, read_content
from levattn.training.config import TrainConfig, from_config_dict, to_dict
from levattn.training.export import check_own, load_params, read_export_config
from levattn.training.workdir import provenance, write_json
from tests.checkpoints import random_params, save_torch, to_timm

MAX_SECONDS, MAX_BYTES = 5.0, 2**30
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", "../x", [], [1, 2], {}, {"a": 1}, [[[]]], float("nan"))
NAMES = ("../x.npy", "/etc/x.npy", "..\\x.npy", "x", "C:x.npy", "a" * 60_000)
TINY = ModelConfig("mu/4", width=64, depth=1, num_heads=1, mlp_dim=64, num_classes=3, head_zero_init=False)


@dataclass(frozen=True)
class Reader:
    """What is fed.

    Attributes:
      read_fn: Takes a path and raises nothing but `refusals`.
      refusals: The errors that it documents.
      seeds: Good files.
      mutate_fn: Changes one of them.
      share: Of all inputs, relative to the other readers.
    """

    read_fn: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...]
    seeds: list[bytes]
    mutate_fn: Callable[[bytes, random.Random], bytes]
    share: int = 10
    suffix: str = ""


class Hang(BaseException):
    """No reader may catch it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=120_000, help="over all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of readers, joined by commas")
    parser.add_argument("--failures", type=Path, help="folder for failing inputs; default: a new one in /tmp")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args()

    readers = make_readers()
    names = args.only.split(",") if args.only else list(readers)
    if unknown := set(names) - set(readers):
        parser.error(f"--only knows {', '.join(readers)}, not {', '.join(sorted(unknown))}")
    failures = args.failures or Path(tempfile.mkdtemp(prefix="fuzz_"))
    failures.mkdir(parents=True, exist_ok=True)
    print(f"failing inputs go to {failures}", flush=True)
    start = provenance()  # before memory is short
    limit_memory()
    total = sum(readers[name].share for name in names)
    rows = []
    print(f"{'reader':<16} {'inputs':>7} {'read':>7} {'refused':>7} {'failed':>6} {'longest ms':>10} {'inputs/s':>8}")
    for name in names:
        num_inputs = -(-args.inputs * readers[name].share // total)
        row = {"reader": name} | fuzz(name, readers[name], num_inputs, args.seed, failures)
        rows.append(row)
        print(
            f"{name:<16} {row['inputs']:>7,} {row['read']:>7,} {row['refused']:>7,} {row['failed']:>6} "
            f"{row['longest_ms']:>10.1f} {row['inputs'] / row['seconds']:>8,.0f}",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    num_failed = sum(row["failed"] for row in rows)
    print(f"{sum(row['inputs'] for row in rows):,} inputs, {num_failed} failed, peak memory {peak / 2**20:,.0f} MiB")
    if args.out:
        limits = {"max_seconds": MAX_SECONDS, "max_bytes_beyond_start": MAX_BYTES}
        write_json(
            args.out, {"provenance": start, "seed": args.seed, **limits, "peak_resident_bytes": peak, "rows": rows}
        )
    return 1 if num_failed else 0


def limit_memory() -> None:
    """Lets this process have `MAX_BYTES` of address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, resource.RLIM_INFINITY))


def fuzz(name: str, reader: Reader, num_inputs: int, seed: int, failures: Path) -> dict[str, Any]:
    """Feeds one reader and counts."""
    signal.signal(signal.SIGALRM, _raise_hang)
    faulthandler.enable()
    counts, messages, longest, start = collections.Counter(), set(), 0.0, time.perf_counter()
    path = failures / f"last{reader.suffix}"
    for number in range(num_inputs):
        rng = random.Random(f"{seed}/{name}/{number}")
        data = reader.mutate_fn(rng.choice(reader.seeds), rng)
        path.write_bytes(data)
        began = time.perf_counter()
        outcome = feed(reader, path)
        took = time.perf_counter() - began
        longest = max(longest, took)
        if outcome.startswith("failed") or took > MAX_SECONDS:
            (failures / f"{name.replace(' ', '_')}_{number}{reader.suffix}").write_bytes(data)
            print(f"  {name} {number}: {outcome}, {took:.2f} s", flush=True)
            counts["failed"] += 1
        else:
            counts[outcome.partition(" ")[0]] += 1
            messages.add(outcome[:60])
    path.unlink(missing_ok=True)
    return {
        "inputs": num_inputs,
        "read": counts["read"],
        "refused": counts["refused"],
        "failed": counts["failed"],
        "different_messages": len(messages),
        "longest_ms": longest * 1e3,
        "seconds": time.perf_counter() - start,
    }


def feed(reader: Reader, path: Path) -> str:
    """What came of one input: "read", "refused ...", or "failed ..."."""
    faulthandler.dump_traceback_later(10 * MAX_SECONDS, exit=True)  # for what no signal ends
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        reader.read_fn(path)
        return "read"
    except Hang:
        return "failed by a hang"
    except Exception as error:
        chain = [error]
        while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 20:
            chain.append(inner)
        if any(isinstance(link, MemoryError) for link in chain):
            return f"failed by memory: {error!r}"
        if isinstance(error, reader.refusals):
            return f"refused {error}"
        return f"failed by {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _raise_hang(*_: object) -> None:
    raise Hang


# Readers


def make_readers() -> dict[str, Reader]:
    """All of them, by name."""
    warnings.simplefilter("ignore")
    params = random_params(TINY, 8)
    own = {"w": params["head/kernel"], "half": np.linspace(0, 1, 5, dtype=np.float16), "n": np.arange(3)}
    timm = to_timm(params)
    config = to_dict(from_config_dict(TrainConfig, fashion_mnist.get_config()))
    text = json.dumps(config)
    refusals, checkpoint = (ValueError, FileNotFoundError), {"refusals": (ValueError, FileNotFoundError)}
    readers = {
        "image": Reader(_read_image, (ImageError,), _images(), mutate_image, 25),
        "idx": Reader(read_idx, (ValueError,), [_idx()], mutate_bytes, 5),
        "idx.gz": Reader(read_idx, (ValueError,), [gzip.compress(_idx())], mutate_gzip, 5, ".gz"),
        "npz": Reader(read_content, seeds=_npz(own), mutate_fn=mutate_zip, suffix=".npz", share=20, **checkpoint),
        "pth": Reader(read_content, seeds=_pth(own), mutate_fn=mutate_zip, suffix=".pth", share=25, **checkpoint),
        "safetensors": Reader(read_content, refusals, _safetensors(own), mutate_safetensors, 15, ".safetensors"),
        "index.json": Reader(read_content, refusals, [_index()], mutate_json, 5, ".index.json"),
        "converted": Reader(_convert, refusals, [_pack(timm)], mutate_tensors, 1, ".safetensors"),
        "config beside": Reader(_convert_with_json(timm), refusals, _hub_configs(), mutate_json, 1, ".json"),
        "export": Reader(_read_export, refusals, _exports(own, _own_config().decode()), mutate_either, 5),
        "config.json": Reader(_read_config, (ValueError,), [text.encode()], mutate_json, 5, ".json"),
        "export's config": Reader(_check_config(params), (ValueError,), [_own_config()], mutate_json, 1, ".json"),
        "file.py:args": Reader(_read_arguments, (ValueError,), [_ARGUMENTS], mutate_bytes, 3),
    }
    try:
        import onnx
    except ImportError:  # an extra of this project
        return readers
    return readers | {"onnx": Reader(read_content, refusals, _onnx(onnx, own), mutate_bytes, 10, ".onnx")}


def _read_image(path: Path) -> None:
    data = path.read_bytes()
    pixels = decode_image(data, 1 if len(data) % 4 == 0 else 3)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.size == 0:
        raise AssertionError(f"pixels of {pixels.dtype} {pixels.shape}")


def _convert(path: Path) -> None:
    convert(read_content(path))


def _convert_with_json(timm: dict[str, np.ndarray]) -> Callable[[Path], None]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz_beside_"))
    (folder / "model.safetensors").write_bytes(_pack(timm))

    def read(path: Path) -> None:
        for name in ("config.json", "preprocessor_config.json", "open_clip_config.json"):
            (folder / name).write_bytes(path.read_bytes())
        _convert(folder)

    return read


def _read_export(path: Path) -> None:
    path = path.rename(path.with_suffix(".npz" if path.read_bytes()[:2] == b"PK" else ".safetensors"))
    try:
        config = read_export_config(path)
        params, _ = load_params(path)
        if config:
            check_own(from_config_dict(TrainConfig, config), params)
    finally:
        path.unlink()


def _read_config(path: Path) -> TrainConfig:
    try:
        mapping = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError("no JSON") from error
    return from_config_dict(TrainConfig, mapping)


def _check_config(arrays: dict[str, np.ndarray]) -> Callable[[Path], None]:
    params = nest(arrays, "the parameters")
    return lambda path: check_own(_read_config(path), params)


def _read_arguments(path: Path) -> None:
    from_config_dict(TrainConfig, fashion_mnist.get_config(path.read_bytes().decode(errors="replace")))


# Good files


_ARGUMENTS = b"attention=leverage,k=32,patch=2,keep_prefix=1,local_window=3x3,epochs=8,dtype=float32,eps=None,centre"


def _saved(save_fn: Callable, *args: Any, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    save_fn(file, *args, **kwargs)
    return file.getvalue()


def _images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    pixels[:, :17] = np.arange(21, dtype=np.uint8)[:, None, None] * 9
    rgb, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    kinds = [
        (rgb, {"format": "JPEG"}),
        (rgb, {"format": "JPEG", "progressive": True}),
        (rgb, {"format": "JPEG", "exif": exif}),
        (rgb.convert("CMYK"), {"format": "JPEG"}),
        (rgb.convert("L"), {"format": "JPEG"}),
        (rgb, {"format": "PNG"}),
        (rgb.convert("P"), {"format": "PNG", "transparency": 3}),
        (rgb.convert("LA"), {"format": "PNG", "exif": exif}),
        (sixteen, {"format": "PNG"}),
        (sixteen, {"format": "TIFF"}),
        (rgb, {"format": "TIFF", "compression": "tiff_lzw"}),
        (rgb, {"format": "TIFF", "compression": "jpeg"}),
        (rgb, {"format": "WEBP"}),
        (rgb, {"format": "WEBP", "lossless": True, "exif": exif}),
        (rgb, {"format": "GIF"}),
        (rgb, {"format": "BMP"}),
        (rgb, {"format": "PPM"}),
    ]
    return [_saved(lambda file, image=image, options=options: image.save(file, **options)) for image, options in kinds]


def _idx() -> bytes:
    return struct.pack(">HBBIII", 0, 8, 3, 4, 28, 28) + bytes(4 * 28 * 28)


def _npz(arrays: dict[str, np.ndarray]) -> list[bytes]:
    objects = {"o": np.array([{"a": 1}], dtype=object)}
    return [_saved(np.savez, **arrays), _saved(np.savez_compressed, **arrays), _saved(np.savez, **objects)]


def _pth(arrays: dict[str, np.ndarray]) -> list[bytes]:
    return [_saved(save_torch, arrays), _saved(save_torch, arrays, wrapped_in=("state_dict", "model"))]


def _pack(arrays: dict[str, np.ndarray], **metadata: str) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, metadata or None)


def _safetensors(arrays: dict[str, np.ndarray]) -> list[bytes]:
    return [_pack(arrays), _pack(arrays, config='{"a": 1}', format="pt")]


def _index() -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors", "b": "y"}}).encode()


def _hub_configs() -> list[bytes]:
    normal = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    timm = {
        "architecture": "vit_test",
        "model_args": {"num_heads": 1, "act_layer": "gelu", "global_pool": "token"},
        "pretrained_cfg": {"tag": "in1k", "input_size": [3, 8, 8], "crop_pct": 0.9, "interpolation": "bicubic"}
        | normal,
    }
    hub = {"num_attention_heads": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "vision_config": {"patch_size": 4}}
    return [json.dumps(timm).encode(), json.dumps(hub | {"size": {"height": 8, "width": 8}}).encode()]


def _own_config() -> bytes:
    return json.dumps(to_dict(TrainConfig(DataConfig("fake:size=8"), TINY, total_steps=1))).encode()


def _exports(arrays: dict[str, np.ndarray], config: str) -> list[bytes]:
    named = {f"params/{name}": array for name, array in arrays.items()}
    return [_saved(np.savez, **named, __config__=np.array(config)), _pack(arrays, config=config)]


def _onnx(onnx: Any, arrays: dict[str, np.ndarray]) -> list[bytes]:
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    initializers.append(onnx.numpy_helper.from_array(np.ones((3, 2), np.int8), "q_quantized"))
    initializers += [onnx.numpy_helper.from_array(np.float32(2), f"q_{part}") for part in ("scale", "zero_point")]
    initializers.append(onnx.numpy_helper.from_array(np.ones((3, 2), np.float32), "onnx::MatMul_1"))
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/layer.0/mlp/MatMul"),
        onnx.helper.make_node("Identity", ["w"], ["w2"], name="/Identity"),
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [], [], initializers)
    return [onnx.helper.make_model(graph).SerializeToString()]


# Changes


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to eight small changes, that know of no format."""
    data = bytearray(data)
    for _ in range(2 ** rng.randrange(4)):
        at, length = rng.randrange(len(data) + 1), rng.randrange(1, 17)
        match rng.randrange(8):
            case 0:
                if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
            case 1:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice(NUMBERS) % 2 ** (8 * width)
                data[at : at + width] = number.to_bytes(width, order)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                data[at:at] = data[at : at + length] * rng.randrange(1, 5)
            case 5:
                if rng.randrange(4) == 0:
                    del data[at:]
            case 6:
                other = rng.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case 7:
                _replace_number(data, at, rng)
    return bytes(data)


def _replace_number(data: bytearray, at: int, rng: random.Random) -> None:
    """Another number for the first one in decimals after a place, often of the same length."""
    digits = b"0123456789"
    while at < len(data) and data[at] not in digits:
        at += 1
    end = at
    while end < len(data) and data[end] in digits:
        end += 1
    new = str(rng.choice(NUMBERS)).encode()
    if end > at:
        data[at:end] = new if rng.randrange(2) else (new * 20)[: end - at]


def mutate_image(data: bytes, rng: random.Random) -> bytes:
    """As `mutate_bytes`; the checksums of a PNG mostly made right again."""
    changed = bytearray(mutate_bytes(data, rng))
    if changed.startswith(b"\x89PNG") and rng.randrange(4):
        at = 8
        while at + 12 <= len(changed):
            end = at + 8 + int.from_bytes(changed[at : at + 4], "big")
            if end + 4 > len(changed):
                break
            changed[end : end + 4] = zlib.crc32(changed[at + 4 : end]).to_bytes(4, "big")
            at = end + 4
    return bytes(changed)


def mutate_gzip(data: bytes, rng: random.Random) -> bytes:
    """Changes what is packed, or the packing."""
    if rng.randrange(3) == 0:
        return mutate_bytes(data, rng)
    return gzip.compress(mutate_bytes(gzip.decompress(data), rng), 1)


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Changes the archive, or its members, of which checksums and lengths are then right."""
    if rng.randrange(4) == 0:
        return mutate_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    for _ in range(rng.randrange(1, 3)):
        member = rng.choice(members)
        match rng.randrange(8):
            case 0:
                member[0] = rng.choice((*NAMES, rng.choice(members)[0]))
            case 1:
                members.append([*rng.choice(members)])
            case 2:
                members.remove(member)
            case 3:
                member[1] = rng.choice(members)[1]
            case _:
                member[1] = mutate_bytes(member[1], rng)
        members = members or [["x.npy", b""]]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes the header, whose length is then right, or any byte."""
    if rng.randrange(4) == 0:
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    change = mutate_json if rng.randrange(2) else mutate_bytes
    header = change(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate_either(data: bytes, rng: random.Random) -> bytes:
    """Of an export in either format."""
    return (mutate_zip if data.startswith(b"PK") else mutate_safetensors)(data, rng)


def mutate_tensors(data: bytes, rng: random.Random) -> bytes:
    """A sound file with other tensors: renamed, of another shape, left out, NaN."""
    arrays = dict(safetensors.numpy.load(data))
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice([*arrays])
        array = arrays.pop(name)
        match rng.randrange(6):
            case 0:
                arrays[mutate_bytes(name.encode(), rng).decode(errors="replace")] = array
            case 1:
                arrays[name] = array.reshape(-1)
            case 2:
                arrays[name] = np.zeros((rng.choice((1, 7, 2**40)), 0, 3), np.float32)
            case 3:
                arrays[name] = np.full_like(array, np.nan)
            case 4:
                arrays[name] = np.zeros(rng.choices((1, 2, 3, 64), k=rng.randrange(5)), np.float32)
            case 5:
                arrays[name.replace("blocks.0", f"blocks.{rng.choice((1, 99, 10**9))}")] = array
    return _pack(arrays)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Puts odd values into places of the tree, or changes the text."""
    if rng.randrange(4) == 0:
        return mutate_bytes(data, rng)
    tree = json.loads(data)
    for _ in range(2 ** rng.randrange(3)):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and rng.randrange(4):
                node = node[key]
                continue
            match rng.randrange(4):
                case 0 if isinstance(node, dict):
                    node[mutate_bytes(str(key).encode(), rng).decode(errors="replace")] = node.pop(key)
                case 1:
                    node[key] = rng.choice(NUMBERS)
                case _:
                    node[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return json.dumps(tree).encode() if rng.randrange(50) else b"[" * rng.choice((100, 100_000)) + data


if __name__ == "__main__":
    sys.exit(main())
