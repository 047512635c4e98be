"""Vision Transformers with any attention in any layer."""

from levattn.models.config import ModelConfig as ModelConfig
from levattn.models.config import attention_specs as attention_specs
from levattn.models.config import patch_grid as patch_grid
from levattn.models.cost import activation_bytes as activation_bytes
from levattn.models.cost import count_params as count_params
from levattn.models.cost import forward_flops as forward_flops
from levattn.models.params import scan_to_unrolled as scan_to_unrolled
from levattn.models.params import unrolled_to_scan as unrolled_to_scan
from levattn.models.variants import SIZES as SIZES
from levattn.models.variants import Variant as Variant
from levattn.models.variants import decode as decode
from levattn.models.vit import Features as Features
from levattn.models.vit import ViT as ViT
