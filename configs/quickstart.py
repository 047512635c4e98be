"""A small ViT on data that come with the packages: scikit-learn's digits, every pixel a token.

    python train.py --config configs/quickstart.py:attention=leverage,k=16 --workdir runs/digits

`source=fashion_mnist` trains the same model on Fashion-MNIST in patches of 4x4 (49 tokens and a class token).

Hardware: two CPU cores.  Digits: wall time 3 min 16 s for both, installation included; test accuracy dense 100 %,
leverage k=16 98.1 % (one seed, `results/quickstart/`; leverage with `--config.seed=1` and 2: 97.8 and 98.1 %).
Fashion-MNIST: unmeasured.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, source="digits", **common.ATTENTION)
    digits = arg.source == "digits"
    config = common.new_config(arg)
    config.batch_size = 64 if digits else 256
    config.total_epochs = 65.0 if digits else 3.0
    config.log_every_steps = 100
    config.checkpoint.every_steps = 200
    config.data.source = arg.source
    config.data.crop = "pad"
    config.data.crop_padding = 1 if digits else 2
    config.data.flip = not digits

    config.model.variant = "mu/1" if digits else "mu/4"
    config.model.width = 64
    config.model.depth = 4
    config.model.mlp_dim = 128
    config.model.num_heads = 4
    config.model.num_classes = 10
    config.model.pool = "cls"
    config.model.posemb = "sincos2d"  # learned positions need longer than minutes

    config.optimizer.name = "muon"
    config.optimizer.b1 = 0.95
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_fraction = 0.1
    config.ema_decay = 0.99
    return config
