"""The families of checkpoints that are read, one a file. The first that recognises a file converts it."""

from levattn.models.pretrained.layout import Layout
from levattn.models.pretrained.layouts import big_vision, clip, dinov2, hugging_face, timm

LAYOUTS: tuple[Layout, ...] = (
    big_vision.LAYOUT,
    hugging_face.LAYOUT,
    *dinov2.LAYOUTS,
    *clip.LAYOUTS,
    timm.LAYOUT,
)
