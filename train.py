"""Trains a Vision Transformer: `python train.py --config configs/NAME.py:attention=leverage,k=32 --workdir runs/a`.

Any field of the config can be set on the command line: `--config.batch_size=256 --config.optimizer.learning_rate=3e-4`.
Several processes, one a host: the same command on each, with `--distributed` on a cluster that JAX knows (TPU pods,
SLURM, MPI, Kubernetes), elsewhere with `--coordinator_address=HOST:PORT --num_processes=N --process_id=I`.
"""

import jax
from absl import flags
from ml_collections import config_flags

from levattn.training.cli import run
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.loop import train

# Fields that the file leaves at their defaults can be set, too; `from_config_dict` refuses those that do not exist.
CONFIG = config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; one that holds a checkpoint is gone on with.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Open the data, print the estimate, and stop.")
PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps to WORKDIR/profile.")
ALLOW_CHANGED = flags.DEFINE_list("allow_changed", [], "Config fields that may differ from the checkpoint's: seed,data")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of the cluster.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where there is no cluster.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
flags.mark_flags_as_required(["config", "workdir"])


@flags.multi_flags_validator(
    ["distributed", "coordinator_address", "num_processes", "process_id"],
    message="--num_processes and --process_id need --coordinator_address=HOST:PORT of process 0, or --distributed",
)
def _processes_can_meet(values: dict) -> bool:
    alone = values["num_processes"] is None and values["process_id"] is None
    return alone or values["distributed"] or values["coordinator_address"] is not None


def main() -> None:
    config = from_config_dict(TrainConfig, CONFIG.value)
    if DISTRIBUTED.value or COORDINATOR.value:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    options = {"dry_run": DRY_RUN.value, "profile": PROFILE.value, "allow_changed": ALLOW_CHANGED.value}
    train(config, WORKDIR.value, **options)


if __name__ == "__main__":
    run(main)
