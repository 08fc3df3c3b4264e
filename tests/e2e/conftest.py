"""Exports of every kind of model and of every oracle, made once for all tests of the export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import exports, oracle
from tests.distributed.harness import run_dist


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``checkpoints/NAME``, ``checkpoints/hf/ORACLE``, ``out/NAME``; transformers keeps the code it runs here too."""
    import torch
    import transformers.dynamic_module_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("exports")
    ALL_ATTENTION_FUNCTIONS.register("flash_on_cpu", exports.flash_on_cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(place / "modules"))
        yield place


@pytest.fixture(scope="session")
def engine_logits(export_folder: Path) -> dict[str, np.ndarray]:
    """By name of a spec, of ``exports.packed``."""
    from unimega.hf.export import export_checkpoint

    logits = run_dist(exports.make_checkpoints, world=1, args=(str(export_folder / "checkpoints"),))[0]
    for name in (*exports.SPECS, *oracle.UNIX, *oracle.DENSE):
        export_checkpoint(export_folder / "checkpoints" / name, export_folder / "out" / name)
    return logits


@pytest.fixture(scope="session")
def out(export_folder: Path, engine_logits: Any) -> Path:
    """Folder of the exports."""
    return export_folder / "out"
