"""The parity oracles of ``tests/data/oracle`` as folders, and random folders of the same kind for options they lack."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data" / "oracle"
UNIX = ("unix_x", "unix_x_tied", "unix_x_bias", "unix_x_share", "unix_moe", "unix_mot")
DENSE = ("hf_qwen2", "hf_qwen3")


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    """All tensors of an oracle's model."""
    file = DATA / case / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        names = (opened.metadata() or {}).get("as_in_unix_x", "").split()
    base = load_file(DATA / "unix_x" / "model.safetensors") if names else {}
    return {**load_file(file), **{name: base[name] for name in names}}


def config_of(case: str) -> dict[str, Any]:
    return json.loads((DATA / case / "config.json").read_text())


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A folder as ``save_pretrained`` writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def whole_folder(case: str, folder: Path) -> Path:
    """An oracle with all its weights, at ``folder``."""
    write_folder(folder, config_of(case), tensors_of(case))
    for file in DATA.joinpath(case).glob("*.npz"):
        shutil.copy(file, folder)
    return folder


def import_folder(folder: Path, target: Path, *, separator_ids: Any = None, **options: Any) -> Any:
    """A folder's own model as a checkpoint; what it is."""
    from unimega.hf.convert import import_folder
    from unimega.hf.folder import read_config
    from unimega.hf.read import describe

    what = describe(read_config(folder), folder=folder, separator_ids=separator_ids)
    import_folder(folder, target, what=what, **options)
    return what


def random_tensors(shapes: dict[str, tuple[int, ...]], *, seed: int) -> dict[str, torch.Tensor]:
    """Random values for all tensors, norms and biases too, so that a dropped or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 1 + 0.3 * torch.randn(shape, generator=generator)
        if "norm" in name
        else 0.15 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
