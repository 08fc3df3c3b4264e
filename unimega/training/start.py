"""What a run finds where it starts: folders, the run that was there before, and where its data goes on."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from unimega import log
from unimega.config import loader as config_loader
from unimega.config.schema import RunConfig
from unimega.data.plan import DataPlan
from unimega.errors import ConfigError, DataError
from unimega.parallel.step_folder import steps
from unimega.training.metrics import FILE, writing

RUN_FILE = "run.json"
MAY_CHANGE = ("model.hf_config", "model.init", "model.init_vision", "data.evaluation", "data.tokenizer")
"""Keys of [model] and [data] that change nothing in the middle of a run."""
MUST_AGREE = ("training.trainable", "training.precision", "optimizer.kind")
"""Keys beside [model] that say which state an optimizer has."""

logger = log.get(__name__)


def prepare_folders(config: RunConfig) -> None:
    """Make the folders of the run, on all ranks: nodes may not share a disk.

    Raises:
        ConfigError: one cannot be made or written.
    """
    for key, directory in (
        ("checkpoint.directory", config.checkpoint.directory),
        ("logging.directory", config.logging.directory),
    ):
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(
                f"{key}={directory!r} is no folder that can be written ({error.strerror}). Name another one."
            ) from error


def holds_steps(directory: str) -> bool:
    """Whether there is a checkpoint to go on from, whole or not."""
    return bool(steps(Path(directory)))


def check_before(config: RunConfig) -> None:
    """Compare the run with the one that was started in its folders before, as ``run.json`` tells it.

    What may change is logged, what gives another order of documents needs ``data.allow_change``.

    Raises:
        ConfigError: the folders belong to another run; names the key and both values.
    """
    file = Path(config.checkpoint.directory) / RUN_FILE
    before = _read(file)
    resumes = holds_steps(config.checkpoint.directory)
    records = Path(config.logging.directory) / FILE
    same_place = (before or {}).get("logging", {}).get("directory") == config.logging.directory
    if not same_place and records.exists() and records.stat().st_size > 0:
        raise ConfigError(
            f"logging.directory={config.logging.directory!r} holds {FILE} of another run than checkpoint.directory="
            f"{config.checkpoint.directory!r}. Name another directory, or remove this one."
        )
    if resumes and before is not None:
        _compare(file, before, config)


def _compare(file: Path, before: Mapping[str, Any], config: RunConfig) -> None:
    old, new = dict(_flat(_by_name(before))), dict(_flat(_by_name(config_loader.dump(config))))
    changed = {key: (old[key], new[key]) for key in new if key in old and old[key] != new[key]}
    harmless = []
    for key, (was, now) in changed.items():
        said = f"{key} was {json.dumps(was)}, is {json.dumps(now)}"
        section = key.split(".")[0]
        if key.startswith(MAY_CHANGE) or (section not in ("model", "data") and key not in MUST_AGREE):
            harmless.append(said)
        elif section == "data" and config.data.allow_change:
            logger.warning("%s: from here on the order is another one, documents may come again or never", said)
        elif section == "data":
            raise ConfigError(
                f"{file}: {said}: documents would come again or never. "
                "Put it back, or go on all the same with --data.allow_change true."
            )
        else:
            raise ConfigError(
                f"{file}: {said}. A run goes on with what it was started with: put it back, or start another one in "
                "another checkpoint.directory, with checkpoint.initial for the weights."
            )
    if harmless:
        logger.info("changed since this run was started before: %s", "; ".join(harmless))


def _by_name(run: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped run whose corpora are known by name, as the order knows them: they may have moved."""
    data = {key: value for key, value in run["data"].items() if key != "allow_change"}
    data["train"] = [{**source, "path": PurePath(source["path"]).name} for source in data["train"]]
    return {**run, "data": data}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix != "training.":  # loss_weights and kernels hold free names
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(file: Path) -> dict[str, Any] | None:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return run if {"model", "data", "logging"} <= run.keys() else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): this run is not compared with the one before", file, error)
        return None


def write_run(config: RunConfig) -> None:
    """Store the resolved run beside its checkpoints, whole or not at all."""
    file = Path(config.checkpoint.directory) / RUN_FILE
    temporary = file.with_suffix(".tmp")
    with writing(config.checkpoint.directory, key="checkpoint.directory"):
        with temporary.open("w", encoding="utf-8") as sink:
            sink.write(json.dumps(config_loader.dump(config), indent=1))
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, file)


@dataclass(frozen=True)
class Position:
    """Where a run stands in the order of its packs; the order is a pure function, so a number says it all."""

    packs: int = 0
    """Packs that were trained on."""

    def state(self, plan: DataPlan) -> dict[str, Any]:
        """For a checkpoint: the position, and what tells whether the order is still the same."""
        last = max(0, self.packs - 1)
        return {"packs": self.packs, "plan": plan.hash(last), "order": plan.state(last), "corpora": _corpora(plan)}

    @staticmethod
    def restored(state: Mapping[str, Any], plan: DataPlan, *, allow_change: bool) -> "Position":
        """The position in a checkpoint.

        Raises:
            DataError: the order is another one now, though no key was changed: a corpus was, or a file of templates.
        """
        if state["order"]["cursors"].keys() == _corpora(plan).keys():
            plan.start_at(state["order"])
        if state["plan"] != plan.hash(max(0, state["packs"] - 1)):
            now, before = _corpora(plan), state["corpora"]
            name = next((name for name in now if before.get(name) != now[name]), None)
            what = "the templates or the code that plans the data changed"
            if name is not None:
                what = f"corpus {name!r} had {before.get(name)} [documents, bytes], now {now[name]}"
            if not allow_change:
                raise DataError(
                    f"cannot resume: {what} since pack {state['packs']}. "
                    "Put it back, or go on all the same with --data.allow_change true."
                )
            logger.warning("%s: from here on the order is another one, documents may come again or never", what)
        return Position(state["packs"])

    def step(self, global_batch_packs: int) -> int:
        """Number of the step, in steps of so many packs, that begins here; packs before it are left out."""
        step = -(-self.packs // global_batch_packs)
        if missed := step * global_batch_packs - self.packs:
            logger.warning(
                "training.global_batch_packs=%d does not divide the %d packs so far: %d packs are left out",
                global_batch_packs,
                self.packs,
                missed,
            )
        return step


def _corpora(plan: DataPlan) -> dict[str, list[int]]:
    return {
        corpus.name: [corpus.num_documents, Path(f"{corpus.source.path}.bin").stat().st_size] for corpus in plan.corpora
    }
