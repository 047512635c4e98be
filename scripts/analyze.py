"""What the attention of a trained model looks like: by layer and head, on images of your own.

    python scripts/analyze.py --checkpoint clip_encoder.int8.onnx --source stamps --out runs/clip \\
        --attention leverage,row_norm,random,oracle --k 8,16,32,64
    python scripts/analyze.py --checkpoint runs/dense --attention leverage --k 32 --out runs/dense/attention
    python scripts/analyze.py --checkpoint vit.safetensors --images photos/ cat.jpg --num_images 100 --out runs/vit

Of each set of keys that a method would keep: the share of dense attention and of its heavy entries that lies on it, in
the window around each query, and on both; and how alike the sets of heads, layers and views of one image are. Of each
head: its leverage scores, and rank and condition of its keys. Several checkpoints (of one run, or of runs of one
config) say how alike their sets are: the last is looked at, and the others are compared with it.

`--checkpoint` takes what `levattn.load_pretrained` reads. A run brings its data; of others `--source` or `--images`
says what to look at. Options of the methods as in eval.py: `--option keep_prefix=1`. Writes sets.csv, heads.csv,
analysis.json (with provenance and what the columns mean), and captured, heavy, heads, scores and overlap.png.
"""

import argparse

from levattn.analysis.analyze import AnalyzeConfig, run_analysis
from levattn.training.cli import read_literal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", required=True, help="models; the last is looked at")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--source", help="data, in place of the run's: stamps, folder:PATH, tfds:NAME, ...")
    parser.add_argument("--split", help="split of the source, with slices such as test[:100]")
    parser.add_argument(
        "--images", nargs="+", default=(), help="image files, and folders of them, in place of a source"
    )
    parser.add_argument("--num_images", type=int, default=64, help="the most that are looked at; 64")
    parser.add_argument("--attention", type=_words, default=("leverage",), help="methods, with commas; leverage")
    parser.add_argument("--k", type=_numbers, help="sizes of the sets; 8,16,32,64, unless a threshold says how many")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a field of AttentionSpec")
    parser.add_argument(
        "--window", default="3x3", help="local tokens: 3x3, cross, an odd number along the sequence, none"
    )
    parser.add_argument("--eps", type=_numbers, default=(0.01, 0.1, 0.5), help="thresholds of heavy entries")
    parser.add_argument("--views", type=_words, default=("flip", "colour", "crop"), help="views of an image; none")
    parser.add_argument("--spectra_images", type=int, default=8, help="images on which rank and condition are taken; 8")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time; 8")
    parser.add_argument("--image_size", type=int, help="side in pixels, if not as the model was trained")
    parser.add_argument("--arch", help="published model that tells what a file leaves open, as for eval.py")
    args = vars(parser.parse_args())
    args["option"] = {
        name: read_literal(text) for name, _, text in (option.partition("=") for option in args["option"])
    }
    args["window"] = _window(args["window"])
    args["views"] = () if args["views"] == ("none",) else args["views"]
    try:
        run_analysis(AnalyzeConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in args.items()}))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[float | int, ...]:
    numbers = tuple(read_literal(word) for word in text.split(","))
    if not all(isinstance(number, int | float) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas")
    return numbers


def _window(text: str) -> int | tuple[int, int] | str | None:
    sides = tuple(read_literal(side) for side in text.split("x"))
    return {"none": None}.get(text, sides[0] if len(sides) == 1 else sides)


if __name__ == "__main__":
    main()
