"""Sets of keys that contain every heavy attention entry, for queries that need not be known."""

from levattn.universal.calibrate import choose_eps as choose_eps
from levattn.universal.files import load_set as load_set
from levattn.universal.files import open_keys as open_keys
from levattn.universal.files import save_set as save_set
from levattn.universal.merge_reduce import LewisStream as LewisStream
from levattn.universal.offline import universal_set as universal_set
from levattn.universal.online import causal_universal_set as causal_universal_set
from levattn.universal.passes import file_universal_set as file_universal_set
from levattn.universal.passes import stream_universal_set as stream_universal_set
from levattn.universal.sets import UniversalSet as UniversalSet
from levattn.universal.sharded import merge_shards as merge_shards
from levattn.universal.sharded import sharded_universal_set as sharded_universal_set
from levattn.universal.sketched import sketched_universal_set as sketched_universal_set
from levattn.universal.streaming import OnePassStream as OnePassStream
