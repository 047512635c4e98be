"""Writes one HTML file to open and to send: result tables, charts, loss curves and an explorer of attention.

    python scripts/report.py --results results/fashion_mnist --checkpoint runs/dense --images 4 --out report.html

Either of `--results` and `--checkpoint` may be left out. Published checkpoints need `--source`, as for eval.py.
"""

from absl import flags

from levattn.analysis.html import explorer_payload, page_bytes, read_measurements, write_page
from levattn.analysis.html.explorer import METHODS, SIZES
from levattn.attention import AttentionSpec
from levattn.models.pretrained import LoadOptions
from levattn.training.cli import read_literal, run
from levattn.training.config import from_config_dict
from levattn.training.loaded import load_model

RESULTS = flags.DEFINE_list("results", [], "Files and folders: results.json, .csv, metrics.jsonl, and all below.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir, exported file or published checkpoint to explore.")
SOURCE = flags.DEFINE_string("source", None, "Images, in place of the run's: stamps, folder:PATH, tfds:NAME, ...")
SPLIT = flags.DEFINE_string("split", None, "Split, in place of the run's evaluation split.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Side of the images in pixels, if not as the model was trained.")
ARCH = flags.DEFINE_string("arch", None, "Published model that tells heads, activation, input.")
IMAGES = flags.DEFINE_integer("images", 4, "Images to explore, at even distances in the split.")
ATTENTION = flags.DEFINE_list("attention", list(METHODS), "Methods to explore.")
K = flags.DEFINE_list("k", list(map(str, SIZES)), "Numbers of keys to explore.")
OPTION = flags.DEFINE_multi_string("option", [], "name=value for a field of AttentionSpec; may be repeated.")
MEGABYTES = flags.DEFINE_float("megabytes", 4.9, "Most that the file may take; logits are rounded until it fits.")
TITLE = flags.DEFINE_string("title", None, "Heading. None: LevAttention, and the model's name.")
OUT = flags.DEFINE_string("out", "report.html", "File to write.")


def main() -> None:
    measurements = read_measurements(RESULTS.value) if RESULTS.value else None
    explorer, title = None, TITLE.value or "LevAttention"
    if CHECKPOINT.value is not None:
        options = LoadOptions(IMAGE_SIZE.value, allow_zero_head=True, arch=ARCH.value)
        trained = load_model(CHECKPOINT.value, SOURCE.value, SPLIT.value, options)
        title = TITLE.value or f"LevAttention: {trained.name}"
        explorer = explorer_payload(
            trained,
            num_images=IMAGES.value,
            methods=ATTENTION.value,
            ks=[int(k) for k in K.value],
            options=chosen_options(trained.config.model.num_prefix_tokens),
            max_bytes=int(1e6 * MEGABYTES.value) - page_bytes(measurements),
        )
    size = write_page(OUT.value, title=title, measurements=measurements, explorer=explorer)
    print(f"{OUT.value}: {size / 1e6:.2f} MB, open it in any browser")


def chosen_options(num_prefix: int) -> AttentionSpec:
    """The options of all methods: those that are given, and class tokens kept."""
    given = {name: read_literal(text) for name, _, text in (option.partition("=") for option in OPTION.value)}
    return from_config_dict(AttentionSpec, {"keep_prefix": num_prefix} | given, name="--option")


if __name__ == "__main__":
    run(main)
