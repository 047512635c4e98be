"""A 12-layer ViT (width 384, 6 heads) on Fashion-MNIST at the token counts of the paper: 197 (`patch=2`) and 785 (1).

    python train.py --config configs/fashion_mnist.py:attention=leverage,k=32 --workdir runs/fmnist_leverage
    python train.py --config configs/fashion_mnist.py:attention=leverage,k=32,patch=1 --workdir runs/fmnist_785

Hardware: one H100.  197 tokens, 45 epochs, dense: wall time 11 minutes with scanned layers (4,000 images/s; unrolled,
the default, runs at 5,900); test accuracy 93.2 % (one seed, `results/fashion_mnist/dense_45_epochs`).  A first look,
`epochs=8` with `--config.batch_size=512`: two to three minutes, dense 91.2 %, leverage k=32 89.2 %
(`results/fashion_mnist/`).  785 tokens: unmeasured.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, patch=2, variant="S", epochs=45, dtype="bfloat16", **common.ATTENTION)
    config = common.new_config(arg)
    config.batch_size = 256
    config.total_epochs = float(arg.epochs)
    config.log_every_steps = 50
    config.eval_every_steps = 1000
    config.checkpoint.every_steps = 1000

    config.data.source = "fashion_mnist"
    config.data.crop = "pad"
    config.data.crop_padding = 2
    config.data.flip = True
    config.data.mean = (0.286,)
    config.data.std = (0.353,)

    config.model.variant = f"{arg.variant}/{arg.patch}"
    config.model.num_classes = 10
    config.model.pool = "cls"
    config.model.posemb = "sincos2d"
    config.model.stochastic_depth = 0.1
    config.model.dtype = arg.dtype

    config.optimizer.name = "muon"
    config.optimizer.b1 = 0.95
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_fraction = 0.1
    config.loss.label_smoothing = 0.1
    return config
