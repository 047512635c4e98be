"""The accuracies of the paper's table, each with how well it is known. No source code or recipe was published."""

from typing import NamedTuple


class PaperNumber(NamedTuple):
    """Top-1 accuracy on ImageNet-1k, 224 pixels.

    Attributes:
      attention: "dense" is softmax attention over all tokens.
      k: Keys kept; None for all.
      trained_with: "dense", or "leverage" where the model was trained with what it is evaluated with.
      model: S/16 and L/16 have 197 tokens, L/8 has 785.
      accuracy: In per cent.
      standing: "unverified" (remembered, not compared with the print) or "second hand".
    """

    attention: str
    k: int | None
    trained_with: str
    model: str
    accuracy: float
    standing: str


MODELS = ("S/16", "L/16", "L/8")

CLAIM = "a model trained with the top 32 keys of each head reaches more than 90 % of the accuracy of softmax attention"
"""Printed in the paper."""

_UNVERIFIED = {
    ("dense", None, "dense"): (76.47, 78.83, 79.47),
    ("leverage", 32, "dense"): (13.3, 48.58, 0.8),
    ("row_norm", 32, "dense"): (3.3, 8.9, None),
    ("leverage", 32, "leverage"): (68.30, 75.12, 71.96),
    ("leverage", 64, "leverage"): (72.48, 77.27, 74.64),
}

NUMBERS = (
    *(
        PaperNumber(*row, model, accuracy, "unverified")
        for row, accuracies in _UNVERIFIED.items()
        for model, accuracy in zip(MODELS, accuracies, strict=True)
        if accuracy is not None
    ),
    PaperNumber("leverage", 128, "leverage", "L/16", 77.17, "second hand"),
)
