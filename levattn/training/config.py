"""The whole of a training run in one frozen record.

A config file returns a ConfigDict that names only what it changes. `from_config_dict` turns it, once and at the
edge, into these dataclasses; past that point a config is immutable, complete and valid.
"""

import dataclasses
from typing import Any, Literal

from levattn.data import DataConfig
from levattn.models import ModelConfig
from levattn.training.config_dict import from_config_dict as from_config_dict
from levattn.training.config_dict import no_such_field as no_such_field
from levattn.training.config_dict import sections as sections
from levattn.training.config_dict import to_dict as to_dict

_MAX_STEPS = 2**31 - 1  # a step is counted by 32 bits
_MAX_TIMEOUT = 1e7  # seconds: clocks of threads take no more


def _require(config: Any, name: str, holds: bool, must_be: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r} must be {must_be}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move.

    Args:
      name: "adamw", "adafactor" (factored second moments, no scaling by parameter norm), "sgd" (momentum) or "muon"
        (orthogonalised momentum for the kernels inside the blocks, Adam for everything else).
      learning_rate: Peak of the schedule.
      weight_decay: Decay of kernels only, multiplied by the scheduled learning rate as in optax and PyTorch. A
        decay of 1e-4 that is not multiplied by a learning rate of 1e-3 is 0.1 here.
      b1: Decay of the momentum (Muon: 0.95 is usual).
      b2: Decay of the second moments; the cap of the growing decay in Adafactor.
      eps: Added to the root of the second moments.
      momentum_dtype: In which the momentum is stored. bfloat16 halves its memory.
      schedule: Shape of the learning rate after the warm-up.
      warmup_steps: Linear rise from 0.
      warmup_fraction: The same as a share of the run, whatever its length; at most one of the two.
      cooldown_steps: Linear fall to 0 at the end, on top of the schedule; for "rsqrt" and "constant".
      rsqrt_timescale: Steps after which "rsqrt" has fallen to 1/sqrt(2) of its peak.
      grad_clip_norm: Gradients with a larger global norm are scaled down to it. None: no clipping.
    """

    name: Literal["adamw", "adafactor", "sgd", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    schedule: Literal["cosine", "rsqrt", "constant", "linear"] = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    cooldown_steps: int = 0
    rsqrt_timescale: int = 10_000
    grad_clip_norm: float | None = 1.0

    def __post_init__(self):
        _require(self, "learning_rate", self.learning_rate > 0, "positive")
        _require(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _require(self, "b1", 0 <= self.b1 < 1, "in [0, 1)")
        _require(self, "b2", 0 <= self.b2 < 1, "in [0, 1)")
        _require(self, "eps", self.eps > 0, "positive")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")
        _require(self, "warmup_fraction", 0 <= self.warmup_fraction < 1, "in [0, 1)")
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(f"set one of warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction}")
        _require(self, "cooldown_steps", self.cooldown_steps >= 0, "at least 0")
        _require(self, "rsqrt_timescale", self.rsqrt_timescale > 0, "positive")
        _require(self, "grad_clip_norm", self.grad_clip_norm is None or self.grad_clip_norm > 0, "positive or None")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Args:
      kind: Softmax or sigmoid cross-entropy; the latter is summed over classes.
      label_smoothing: Share of the target spread evenly over all classes.
      mixup_alpha: MixUp with Beta(alpha, alpha). 0: none.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0

    def __post_init__(self):
        _require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        _require(self, "mixup_alpha", self.mixup_alpha >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. The batch is split over all of them, parameters over `fsdp`.

    Args:
      data: Devices along the axis that replicates parameters. -1: all that `fsdp` leaves.
      fsdp: Devices along the axis that splits parameters and optimiser state.
      fsdp_min_size: Arrays with fewer elements are replicated.
    """

    data: int = -1
    fsdp: int = 1
    fsdp_min_size: int = 2**16

    def __post_init__(self):
        _require(self, "data", self.data == -1 or self.data > 0, "positive, or -1 for all remaining devices")
        _require(self, "fsdp", self.fsdp > 0, "positive")
        _require(self, "fsdp_min_size", self.fsdp_min_size >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run.

    Args:
      every_steps: Interval of saves. None: only at the end.
      keep_last: Newest checkpoints kept.
      keep_best: Best checkpoints, by `metric`, kept beside them.
      metric: The evaluation metric that ranks checkpoints: "top1", "top5" or "loss".
    """

    every_steps: int | None = None
    keep_last: int = 1
    keep_best: int = 1
    metric: Literal["top1", "top5", "loss"] = "top1"

    def __post_init__(self):
        _require(self, "every_steps", self.every_steps is None or self.every_steps > 0, "positive or None")
        _require(self, "keep_last", self.keep_last > 0, "positive")
        _require(self, "keep_best", self.keep_best >= 0, "at least 0")

    @property
    def best_mode(self) -> Literal["max", "min"]:
        """Whether the largest or the smallest `metric` is the best."""
        return "min" if self.metric == "loss" else "max"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Learning from a frozen teacher: the model as it starts, the parameters of `init_from`, under dense attention.

    The loss is the weighted sum of the parts below, each a mean over images; a part of weight 0 is not computed.

    Args:
      head: What the model's output is. "classifier": logits, of the classes of the data. "embedding": a vector with no
        classes, of a model without a head or with a projection; there are no labels then, and the loss of evaluation is
        that of `weight_features` with weight 1.
      weight_labels: Of the cross-entropy with the labels, `LossConfig` included.
      weight_logits: Of the Kullback-Leibler divergence from the teacher's classes to the student's (Hinton et al.,
        arXiv 1503.02531), scaled by the squared temperature.
      weight_features: Of 1 - cosine similarity of the embeddings: what the head reads of a classifier, else the output.
      weight_tokens: Of the squared error of all tokens after the last block and its LayerNorm, relative to the
        teacher's squared norm.
      temperature: Divides the logits of both in the divergence.
    """

    head: Literal["classifier", "embedding"] = "classifier"
    weight_labels: float = 0.0
    weight_logits: float = 1.0
    weight_features: float = 0.0
    weight_tokens: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        weights = ("weight_labels", "weight_logits", "weight_features", "weight_tokens")
        for name in weights:
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"one of {', '.join(weights)} must be positive: there is nothing to learn")
        if self.head == "embedding":
            for name in ("weight_labels", "weight_logits"):
                _require(self, name, getattr(self, name) == 0, "0 with head='embedding', which has no classes")
        _require(self, "temperature", self.temperature > 0, "positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
      data: Where images come from and how they are changed.
      model: The network, its attention included.
      optimizer: How parameters move.
      loss: What is minimised.
      mesh: How devices are laid out.
      checkpoint: What is kept.
      seed: Of initialisation, data order, augmentation, MixUp and dropout.
      batch_size: Examples a step, over all devices and microbatches.
      total_steps: Length of the run. Goes before `total_epochs`.
      total_epochs: Length of the run in passes over the training split.
      log_every_steps: Interval of training metrics.
      eval_every_steps: Interval of evaluations. None: only at the end.
      accumulate_steps: Microbatches a step. More of them need less memory and give the same gradients.
      ema_decay: Decay of the average of parameters that is evaluated and exported. None: no average.
      init_from: A finished run, an export or a published checkpoint whose parameters start the run (fine-tuning).
      init_arch: Name of the published model that tells what the checkpoint leaves open, see `levattn.load_pretrained`.
      distill: Learn from the model of `init_from` under dense attention. None: from the labels alone.
      nonfinite: What to do with a step whose loss or gradient is not finite; its update is left out either way. "stop":
        end the run, naming the step, the records and the first layer. "skip": go on with the next batch.
      max_skipped: Steps of a run that "skip" may leave out, over all its restarts; one more ends it.
      hang_timeout: Seconds that a batch, a step or a batch of an evaluation may take; past them the process prints the
        stacks of all its threads and exits with 69. First steps (they compile) and saves may take longer. 0: no limit.
    """

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = 0
    batch_size: int = 128
    total_steps: int | None = None
    total_epochs: float | None = None
    log_every_steps: int = 50
    eval_every_steps: int | None = None
    accumulate_steps: int = 1
    ema_decay: float | None = None
    init_from: str | None = None
    init_arch: str | None = None
    distill: DistillConfig | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    hang_timeout: float = 600.0

    def __post_init__(self):
        if self.total_steps is None and self.total_epochs is None:
            raise ValueError("total_steps=None and total_epochs=None: set one of them, the length of the run")
        for name in ("batch_size", "total_steps", "total_epochs", "log_every_steps", "eval_every_steps"):
            value = getattr(self, name)
            _require(self, name, value is None or value > 0, "positive")
        steps = self.total_steps
        _require(self, "total_steps", steps is None or steps <= _MAX_STEPS, f"at most {_MAX_STEPS}")
        _require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        _require(self, "max_skipped", self.max_skipped >= 0, "at least 0")
        fits = 0 <= self.hang_timeout <= _MAX_TIMEOUT
        _require(self, "hang_timeout", fits, f"a number of seconds up to {_MAX_TIMEOUT:g}, or 0 for no limit")
        _require(self, "accumulate_steps", self.accumulate_steps > 0, "positive")
        _require(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1) or None")
        if self.batch_size % self.accumulate_steps:
            raise ValueError(
                f"batch_size={self.batch_size} must be divisible by accumulate_steps={self.accumulate_steps}"
            )
        if self.init_arch is not None and self.init_from is None:
            raise ValueError(f"init_arch={self.init_arch!r} needs init_from, the checkpoint that it tells something of")
        if self.distill is not None and self.init_from is None:
            raise ValueError("distill needs init_from, the checkpoint to start from, which is also the teacher")
        if not self.is_classifier:
            if self.checkpoint.metric != "loss":
                raise ValueError("checkpoint.metric must be 'loss' with distill.head='embedding': there are no classes")
            _require(self.loss, "mixup_alpha", self.loss.mixup_alpha == 0, "0 with distill.head='embedding'")

    @property
    def is_classifier(self) -> bool:
        """Whether the model's output is logits, and labels have a meaning."""
        return self.distill is None or self.distill.head == "classifier"

    def num_steps(self, num_examples: int) -> int:
        """Steps of the run on a training split of `num_examples`; epochs are rounded to whole steps, at least one.

        Raises:
          ValueError: They are more than 32 bits count.
        """
        if self.total_steps is not None:
            return self.total_steps
        num_steps = max(1, round(self.total_epochs * num_examples / self.batch_size))
        if num_steps > _MAX_STEPS:
            raise ValueError(
                f"total_epochs={self.total_epochs} are {num_steps} steps; at most {_MAX_STEPS} can be counted"
            )
        return num_steps


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How the features of a frozen model are judged.

    Args:
      folds: Of the stratified cross-validation.
      seeds: Divisions into folds; results are means over them.
      neighbours: Of the k-NN classifier.
      regularisation: Strength of the L2 penalty of the linear probe on features of length 1, 1 / C in scikit-learn's
        terms.
      error_images: Images at the start of the source on which the attention of each layer is compared.
    """

    folds: int = 5
    seeds: int = 3
    neighbours: int = 5
    regularisation: float = 0.01
    error_images: int = 64

    def __post_init__(self):
        _require(self, "folds", self.folds >= 2, "at least 2")
        for name in ("seeds", "neighbours", "error_images"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "regularisation", self.regularisation > 0, "positive")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What eval.py is to measure.

    Args:
      checkpoint: As `levattn.training.loaded.load_model` takes it.
      arch: Name of the published model that tells what a checkpoint leaves open, see `levattn.load_pretrained`.
      attention: Methods to put into all layers. Empty: as the model was trained.
      k: Numbers of keys for each method; None: as many as eps can keep.
      option: Values of other fields of `AttentionSpec`.
      budgets: A file of `calibrate`, whose attention by layer comes as one more row.
      source: Data in place of the run's own; a published checkpoint needs it.
      split: Of the data. None: the run's own, or the first of test, validation and train that there is.
      image_size: Side of the images in pixels, if not as trained; position embeddings are resized.
      classes: A file that says which output each class of the data is, see `levattn.training.classes.on_classes_of`.
      batch_size: Images at a time. None: as in training.
      probe: Judge frozen features, in place of the model's own classes.
      calibrate: Number of images on which to choose a k for each layer, in place of an evaluation.
      calibrate_heads: Choose a k for each head of each layer.
      target_error: Relative error of each layer to reach by the smallest k, in place of a mean k.
      out: Folder for the results. None: that of the checkpoint.
    """

    checkpoint: str
    arch: str | None = None
    attention: tuple[str, ...] = ()
    k: tuple[int | None, ...] = ()
    option: dict = dataclasses.field(default_factory=dict)
    budgets: str | None = None
    source: str | None = None
    split: str | None = None
    image_size: int | None = None
    classes: str | None = None
    batch_size: int | None = None
    probe: ProbeConfig | None = None
    calibrate: int | None = None
    calibrate_heads: bool = False
    target_error: float | None = None
    out: str | None = None

    def __post_init__(self):
        for name in ("image_size", "batch_size", "calibrate"):
            value = getattr(self, name)
            _require(self, name, value is None or value > 0, "positive")
        _require(self, "target_error", self.target_error is None or 0 < self.target_error < 1, "in (0, 1)")
        if self.target_error is not None and self.calibrate is None:
            raise ValueError(f"target_error={self.target_error} needs calibrate, the number of images to measure it on")
        if self.calibrate_heads and (self.calibrate is None or self.target_error is not None):
            raise ValueError("calibrate_heads needs calibrate, the number of images, and no target_error")
        if self.classes is not None and (self.probe is not None or self.calibrate is not None):
            raise ValueError(f"classes={self.classes!r} tells of logits, at which neither a probe nor calibrate looks")
        if self.calibrate is not None and (len(self.attention) != 1 or len(self.k) > 1):
            raise ValueError("calibrate needs one attention and at most one k, the mean over the layers")
