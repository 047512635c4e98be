"""The mathematics on arrays: no Flax, no model."""

from levattn.core.leverage import centre_keys as centre_keys
from levattn.core.leverage import leverage_scores as leverage_scores
