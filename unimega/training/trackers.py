"""Where records go beside ``metrics.jsonl``: TensorBoard always, Weights and Biases when asked."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from unimega.config import loader as config_loader
from unimega.config.schema import RunConfig
from unimega.errors import UnimegaError, optional
from unimega.training.metrics import writing

TENSORBOARD_FOLDER, WANDB_ID_FILE, WANDB_PROJECT = "tensorboard", "wandb_id", "unimega"


def check_installed(config: RunConfig) -> None:
    """Refuse ``logging.wandb`` without the package, before ranks meet.

    Raises:
        UnimegaError: names the extra.
    """
    if config.logging.wandb:
        optional("wandb", extra="wandb")


class Trackers:
    """One rank's event file and run; a run that goes on is the same one in both.

    Args:
        config: resolved.
        step: steps that were made before. What was told of later ones is taken back: they come again.
    """

    def __init__(self, config: RunConfig, *, step: int) -> None:
        folder = Path(config.logging.directory)
        self._directory = config.logging.directory
        with writing(self._directory):
            self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1)
        self._run = _wandb_run(config, folder) if config.logging.wandb else None

    def write(self, record: Mapping[str, Any]) -> None:
        """A record as scalars: ``train/KEY``, and keys with a folder as they are; nothing for None, NaN and lists."""
        step = record["step"]
        values = {
            key if "/" in key else f"train/{key}": value
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float) and value - value == 0
        }
        with writing(self._directory):
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def sync(self) -> None:
        """Write what is still in memory: a checkpoint of step N stands for the records up to N."""
        with writing(self._directory):
            self._board.flush()

    def close(self) -> None:
        """End the event file and the run."""
        with writing(self._directory):
            self._board.close()
        if self._run is not None:
            self._run.finish()


def _wandb_run(config: RunConfig, folder: Path) -> Any:
    """The run of this folder. Its name is kept in a file, so that a restart goes on with it."""
    wandb = optional("wandb", extra="wandb")
    file = folder / WANDB_ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    options = {} if "WANDB_PROJECT" in os.environ else {"project": WANDB_PROJECT}
    try:
        return wandb.init(
            id=file.read_text().strip(), resume="allow", dir=str(folder), config=config_loader.dump(config), **options
        )
    except Exception as error:  # not logged in, no network, no room: its own classes differ between versions
        raise UnimegaError(
            f"logging.wandb=true: wandb cannot start ({' '.join(str(error).split())[:200]}). "
            "Log in with 'wandb login', set WANDB_MODE=offline, or set logging.wandb = false."
        ) from error
