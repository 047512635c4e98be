"""Other attention in a model that is already trained: without training, or with a little.

The model is a run of this project, a file that one exported, or a checkpoint that others published.

A classifier, every method at every k in one pass over the data (nothing here is read for it):

    python eval.py --checkpoint runs/fmnist_dense --attention dense,leverage,kmeans --k 32,64
    python eval.py --checkpoint vit_s16.npz --source tfds:imagenet2012 --attention dense,leverage --k 32

A classifier of ImageNet-1k on a part of its classes, such as Imagenette, ImageNet-A or -R in folders named by WordNet
ids, among whose outputs alone it then chooses; otherwise `--classes FILE` has the number of each folder's output:

    python eval.py --checkpoint vit_s16.npz --source folder:imagenette2-320 --attention dense,leverage --k 32

What a nameless file does not tell, such as heads and activation, `arch=vit_base_patch16_224` does here and `--arch` for
eval.py.

Features, frozen: linear probe and k-NN fitted under dense attention and read out under the others, agreement with dense
attention, error of each layer (of methods that `--attention` names, else all):

    python eval.py --config configs/retrofit.py:probe=vit_s14.onnx,source=stamps --k 32,64

A k for each layer, chosen on 32 images, and its effect:

    python eval.py --config configs/retrofit.py:probe=vit_s14.onnx,source=stamps --attention leverage --k 32 \\
        --calibrate 32 --out runs/budgets
    python eval.py --config configs/retrofit.py:probe=vit_s14.onnx,source=stamps --attention leverage --k 32 \\
        --budgets runs/budgets/budgets.json

Adaptation, one epoch with the new attention in place, on the labels or (`finetune`) on what the model itself says under
dense attention, which needs no labels:

    python train.py --config configs/retrofit.py:init_from=runs/fmnist_dense,attention=leverage,k=32 --workdir runs/a
    python train.py --config configs/retrofit.py:finetune,init_from=vit_s14.onnx,source=stamps,k=32 --workdir runs/b

Hardware: one GPU, or a CPU and patience.  Wall time: unmeasured.  Probe accuracy and ms an image of CLIP ViT-B/16 on an
H100: results/retrofit.  Adaptation, ImageNet: unmeasured.
"""

from ml_collections import ConfigDict

from configs import common
from levattn.attention import METHODS
from levattn.data import open_source
from levattn.models.pretrained import LoadOptions
from levattn.training.config import DistillConfig, EvalConfig, ProbeConfig, TrainConfig, sections, to_dict
from levattn.training.loaded import load_model


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(
        arg,
        probe="",
        init_from="",
        arch="",
        finetune=False,
        source="",
        epochs=1.0,
        folds=ProbeConfig.folds,
        seeds=ProbeConfig.seeds,
        **(common.ATTENTION | {"attention": ""}),
    )
    if arg.probe:
        return _probe(arg)
    if not arg.init_from:
        raise ValueError(
            "init_from is needed: configs/retrofit.py:init_from=WORKDIR of the run to start from, or probe=CHECKPOINT "
            "with eval.py"
        )
    return _adapt(arg)


def _probe(arg: ConfigDict) -> ConfigDict:
    config = sections(EvalConfig)
    config.checkpoint, config.arch = arg.probe, arg.arch or None
    config.attention = (arg.attention,) if arg.attention else tuple(METHODS)
    config.k = () if arg.k is None else (arg.k,)
    options = {name: arg[name] for name, default in common.ATTENTION.items() if arg[name] != default}
    config.option = {name: value for name, value in options.items() if name not in ("attention", "k")}
    config.source = arg.source or None
    config.probe = ConfigDict({"folds": arg.folds, "seeds": arg.seeds})
    return config


def _adapt(arg: ConfigDict) -> ConfigDict:
    options = LoadOptions(allow_zero_head=True, arch=arg.arch or None)
    trained = load_model(arg.init_from, arg.source or None, options=options)
    arg.attention = arg.attention or "leverage"
    config = sections(TrainConfig)
    config.update(to_dict(trained.config))
    config.model.attention.update(common.attention(arg))
    config.model.attention_by_layer = ()
    config.init_from, config.init_arch = arg.init_from, options.arch
    config.total_steps = None
    config.total_epochs = arg.epochs
    config.ema_decay = None  # an average over a longer run would still be where this one starts
    config.optimizer.learning_rate = trained.config.optimizer.learning_rate / 10
    config.optimizer.warmup_steps = config.optimizer.cooldown_steps = 0  # those of a longer run
    config.optimizer.warmup_fraction = 0.1
    if config.data.train_split == config.data.eval_split:  # a source with one split
        config.data.train_split, config.data.eval_split = "train[:80%]", "train[80%:]"
    config.distill = None
    if arg.finetune:
        data = trained.config.data
        same_classes = open_source(data, data.eval_split).num_classes == trained.config.model.num_classes
        if trained.is_classifier and same_classes:
            config.distill = ConfigDict(to_dict(DistillConfig()))
        else:
            config.distill = ConfigDict(to_dict(DistillConfig("embedding", weight_logits=0.0, weight_features=1.0)))
            config.checkpoint.metric = "loss"
    return config
