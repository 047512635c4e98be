"""The mathematics on arrays: no Flax, no model."""

from levattn.core.countsketch import countsketch_heavy_entries as countsketch_heavy_entries
from levattn.core.functions import Growth as Growth
from levattn.core.functions import Huber as Huber
from levattn.core.functions import Power as Power
from levattn.core.functions import Softmax as Softmax
from levattn.core.heavy import HeavyEntries as HeavyEntries
from levattn.core.heavy import heavy_entries as heavy_entries
from levattn.core.heavy import heavy_entries_blocks as heavy_entries_blocks
from levattn.core.leverage import centre_keys as centre_keys
from levattn.core.leverage import leverage_scores as leverage_scores
from levattn.core.lewis import lewis_weights as lewis_weights
from levattn.core.online import online_leverage_scores as online_leverage_scores
from levattn.core.rowsums import exact_row_sums as exact_row_sums
from levattn.core.rowsums import jl_row_sums as jl_row_sums
from levattn.core.rowsums import sampled_row_sums as sampled_row_sums
from levattn.core.sensitivity import sensitivity_bounds as sensitivity_bounds
from levattn.core.sketch import sketched_leverage_bounds as sketched_leverage_bounds
