"""Published checkpoints as models of this project.

`read_pretrained` takes a file or folder; `Layout` is what another family of checkpoints has to say of itself.
"""

from levattn.models.pretrained.files import find_checkpoint as find_checkpoint
from levattn.models.pretrained.files import read_content as read_content
from levattn.models.pretrained.layout import AS_PUBLISHED as AS_PUBLISHED
from levattn.models.pretrained.layout import Content as Content
from levattn.models.pretrained.layout import ImageSize as ImageSize
from levattn.models.pretrained.layout import Layout as Layout
from levattn.models.pretrained.layout import LoadOptions as LoadOptions
from levattn.models.pretrained.layout import Preprocess as Preprocess
from levattn.models.pretrained.layout import Pretrained as Pretrained
from levattn.models.pretrained.load import check_params as check_params
from levattn.models.pretrained.load import convert as convert
from levattn.models.pretrained.load import read_pretrained as read_pretrained
from levattn.models.pretrained.load import warn_of_guesses as warn_of_guesses
from levattn.models.pretrained.load import with_image_size as with_image_size
from levattn.models.pretrained.tensors import nest as nest
from levattn.models.pretrained.tensors import refuse_nonfinite as refuse_nonfinite
