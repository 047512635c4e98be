"""ImageNet-1k from scratch: the models of the paper's table, S/16 and L/16 (197 tokens) and L/8 (785), at 224 pixels.

    python train.py --config configs/imagenet.py:variant=S/16,attention=leverage,k=32 --workdir runs/s16_lev32
    for k in 32 64 128; do for v in S/16 L/16 L/8; do
      python train.py --config configs/imagenet.py:variant=$v,attention=leverage,k=$k --workdir runs/$v-$k; done; done

The paper does not publish its recipe. This is the nearest public one, big_vision's for ViT-S/16 on ImageNet-1k (90
epochs, batch 1024, Adam, learning rate 1e-3, weight decay 1e-4, RandAugment(2, 10), MixUp 0.2, clipping at 1), with the
class token of the paper's 197 tokens and learned positions, which are a guess; `pool=gap,posemb=sincos2d` is its own.
Prepare the data with `python scripts/prepare_imagenet.py --help`.

Hardware: made for 8 or more accelerators; `accumulate=4` divides the memory of activations by 4.
Wall time and accuracy: unmeasured.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(
        arg,
        variant="S/16",
        epochs=90,
        pool="cls",
        posemb="learned",
        source="tfds:imagenet2012",
        accumulate=1,
        fsdp=1,
        workers=8,
        **common.ATTENTION,
    )
    config = common.new_config(arg)
    config.batch_size = 1024
    config.total_epochs = float(arg.epochs)
    config.accumulate_steps = arg.accumulate
    config.log_every_steps = 100
    config.eval_every_steps = 5_000
    config.checkpoint.every_steps = 2_500
    config.mesh.fsdp = arg.fsdp

    config.data.source = arg.source
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.crop = "random_resized"
    config.data.flip = True
    config.data.randaugment_layers = 2
    config.data.randaugment_magnitude = 10
    config.data.num_workers = arg.workers

    config.model.variant = arg.variant
    config.model.num_classes = 1000
    config.model.pool = arg.pool
    config.model.posemb = arg.posemb
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1  # times the learning rate: big_vision's 1e-4
    config.optimizer.warmup_steps = 10_000
    config.loss.mixup_alpha = 0.2
    return config
