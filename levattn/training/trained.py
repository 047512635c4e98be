"""The config and the parameters of a run of this project, finished or not."""

import os
from pathlib import Path

import jax
from jaxtyping import PyTree

from levattn.data import open_source, output_shape
from levattn.models import ModelConfig, ViT
from levattn.models.pretrained.archive import is_bomb
from levattn.training.checkpoint import Checkpointer
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.export import check_own, load_params
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE
from levattn.training.workdir import read_config


def load_trained(path: str | os.PathLike) -> tuple[TrainConfig, PyTree]:
    """The config and the parameters of a run.

    Args:
      path: Workdir of a run, finished or not, or a `.safetensors` or `.npz` file that a run exported. Of a run that is
        not finished the best checkpoint is read, else the newest; of `WORKDIR/checkpoints/STEP` the one of that step.

    Returns:
      The config and the parameters that the run evaluates (their average, where it keeps one).

    Raises:
      FileNotFoundError: There is no run at `path`.
      ValueError: A file without the config that made it, or whose parameters are not those of that config's model.
    """
    path, step = split_step(path)
    if step is not None or (path.is_dir() and not (path / EXPORT_FILE).exists()):
        return _load_checkpoint(path, step)
    file = path / EXPORT_FILE if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"checkpoint={str(path)!r} does not exist: name a run's workdir or an exported file")
    params, config = load_params(file)
    if not config:
        raise ValueError(f"checkpoint={str(file)!r} holds no config: it was not exported by a run of train.py")
    config = from_config_dict(TrainConfig, config, name=f"the config in {str(file)!r}")
    check_own(config, params)
    return config, params


def split_step(path: str | os.PathLike) -> tuple[Path, int | None]:
    """Workdir and step of `WORKDIR/checkpoints/STEP`; any other path as it is, and None."""
    path = Path(path)
    if path.parent.name == CHECKPOINT_FOLDER and path.name.isdecimal():
        return path.parents[1], int(path.name)
    return path, None


def _load_checkpoint(workdir: Path, step: int | None) -> tuple[TrainConfig, PyTree]:
    config = read_config(workdir)
    if config is None:
        raise FileNotFoundError(f"checkpoint={str(workdir)!r} is not the workdir of a run: it holds no config.json")
    config = from_config_dict(TrainConfig, config)
    name = "params" if config.ema_decay is None else "ema_params"
    source = open_source(config.data, config.data.eval_split)
    template = _params_template(config.model, output_shape(source, config.data))
    rank = {"best_metric": config.checkpoint.metric, "best_mode": config.checkpoint.best_mode}
    with Checkpointer(workdir / CHECKPOINT_FOLDER, **rank, read_only=True) as checkpointer:
        if step is None:
            best = checkpointer.best_step()
            step = checkpointer.latest_step() if best is None else best
        if step is None:
            raise FileNotFoundError(f"checkpoint={str(workdir)!r} holds no checkpoint yet: the run saved none so far")
        _refuse_bomb(template, workdir / CHECKPOINT_FOLDER / str(step))
        return config, checkpointer.restore({name: template}, step, partial=True)[name]


def _refuse_bomb(template: PyTree, folder: Path) -> None:
    """Refuses a config whose parameters the files of a checkpoint cannot fill, before they are allocated."""
    wanted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(template))
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if is_bomb(wanted, held):
        raise ValueError(
            f"checkpoint={str(folder)!r}: its {held:,} bytes are to unpack to {wanted:,} of parameters: those are no "
            "weights"
        )


def _params_template(model: ModelConfig, image_shape: tuple[int, ...]) -> PyTree:
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    shapes = jax.eval_shape(lambda x: ViT(model).init(jax.random.key(0), x), images)["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
