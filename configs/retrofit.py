"""Other attention in a model that is already trained: without training, or with a little.

Inference only, every method at every k in one pass over the data (nothing here is read for it):

    python eval.py --checkpoint runs/fmnist_dense --attention dense,leverage,kmeans --k 32,64

Adaptation: go on training from the checkpoint, on its own data, with the new attention in place:

    python train.py --config configs/retrofit.py:init_from=runs/fmnist_dense,attention=leverage,k=32 --workdir runs/a

Hardware: as for the checkpoint's own training.  Wall time and accuracy: unmeasured.
"""

from ml_collections import ConfigDict

from configs import common
from levattn.training.config import TrainConfig, sections, to_dict
from levattn.training.evaluate import load_trained


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, init_from="", epochs=1.0, **(common.ATTENTION | {"attention": "leverage"}))
    if not arg.init_from:
        raise ValueError("init_from is needed: configs/retrofit.py:init_from=WORKDIR of the run to start from")
    trained, _ = load_trained(arg.init_from)
    config = sections(TrainConfig)
    config.update(to_dict(trained))
    config.model.attention.update(common.attention(arg))
    config.model.attention_by_layer = ()
    config.init_from = arg.init_from
    config.total_steps = None
    config.total_epochs = arg.epochs
    config.optimizer.learning_rate = trained.optimizer.learning_rate / 10
    config.optimizer.warmup_steps = config.optimizer.cooldown_steps = 0  # those of a longer run
    config.optimizer.warmup_fraction = 0.1
    return config
