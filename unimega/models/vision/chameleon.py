"""Chameleon's tokenizer of pictures: its checkpoint, its preprocessing, its codes.

The checkpoint is a folder with ``vqgan.yaml`` (``model.params`` of taming-transformers) and ``vqgan.ckpt``, or
``vqgan.safetensors`` with the same names.
"""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from unimega import backend
from unimega.errors import CheckpointError, optional
from unimega.models.vision.pixels import square
from unimega.models.vision.vqgan import NORM_GROUPS, VQGAN, VQGANConfig

CONFIG_FILE, WEIGHT_FILES = "vqgan.yaml", ("vqgan.safetensors", "vqgan.ckpt")
_BATCH = 8
_TRAINING_ONLY = "loss."
"""Prefix of the discriminator and perceptual loss in a checkpoint: the only names that may be left over."""

_SIZES = {
    "resolution": "resolution",
    "in_channels": "in_channels",
    "out_ch": "out_channels",
    "ch": "base_channels",
    "num_res_blocks": "blocks",
    "z_channels": "latent_channels",
}
_LISTS = {"ch_mult": "multipliers", "attn_resolutions": "attention_sides"}
_FIXED: dict[str, tuple[Any, ...]] = {"double_z": (False,), "resamp_with_conv": (True,), "attn_type": ("vanilla",)}
_UNUSED = ("dropout",)
_FROM_BYTE = (np.arange(256) / 255.0 * 2 - 1).astype(np.float32)
"""Pixels in -1..1, rounded once, as the original does it."""


class ChameleonTokenizer:
    """Pictures to codes and back, in fp32 on the process's device."""

    def __init__(self, model: VQGAN, *, device: torch.device | None = None) -> None:
        """Take a model; ``device`` absent: the backend's."""
        self.device = backend.current().device if device is None else device
        self.model = model.to(self.device).eval().requires_grad_(False)

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return self.model.config.codebook

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.model.config.side, self.model.config.side

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of the sizes and all weights."""
        digest = hashlib.sha256(json.dumps(asdict(self.model.config), sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def prepare(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """float32 [3, R, R] in -1..1 of a uint8 picture [H, W, 3]: shorter side to R (Lanczos), middle, scaled.

        Raises:
            UnimegaError: Pillow is not installed.
        """
        return _FROM_BYTE[square(image, self.model.config.resolution)].transpose(2, 0, 1)

    def encode(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int32]:
        """int32 [N, rows x columns] of uint8 pictures [H, W, 3] of any sizes."""
        codes = [np.zeros((0, self.grid[0] * self.grid[1]), dtype=np.int32)]
        for start in range(0, len(images), _BATCH):
            batch = np.stack([self.prepare(image) for image in images[start : start + _BATCH]])
            with _exact():
                found = self.model.encode(torch.from_numpy(batch).to(self.device))
            codes.append(found.cpu().numpy().astype(np.int32))
        return np.concatenate(codes)

    def decode(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
        """uint8 [N, R, R, 3] of codes [N, rows x columns]."""
        side = self.model.config.resolution
        images = [np.zeros((0, side, side, 3), dtype=np.uint8)]
        for start in range(0, len(codes), _BATCH):
            batch = torch.from_numpy(np.asarray(codes[start : start + _BATCH], dtype=np.int64))
            with _exact():
                pixels = self.model.decode(batch.to(self.device))
            unit = (pixels.clamp(-1, 1) + 1) / 2
            images.append((unit.permute(0, 2, 3, 1).cpu().numpy() * 255).astype(np.uint8))
        return np.concatenate(images)


def load(path: Path) -> ChameleonTokenizer:
    """The tokenizer in a folder with ``vqgan.yaml`` and weights, or whose weights are the file ``path`` beside it.

    Raises:
        CheckpointError: a file is missing or damaged, sizes that are not understood, or names or shapes that differ.
        UnimegaError: PyYAML is not installed.
    """
    folder = path if path.is_dir() else path.parent
    found = [path] if path.is_file() else [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found or not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path}: no VQGAN. A folder with {CONFIG_FILE} and {' or '.join(reversed(WEIGHT_FILES))} is needed."
        )
    with torch.device("meta"):  # the weights follow: no memory and no time for random ones
        model = VQGAN(read_config(folder / CONFIG_FILE))
    tensors = _read_weights(found[0])
    _check_names(found[0], tensors, model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)
    return ChameleonTokenizer(model)


def read_config(path: Path) -> VQGANConfig:
    """The sizes in ``model.params`` (or ``params``, or at the top) of a YAML file of taming-transformers.

    Raises:
        CheckpointError: not such a file, a size that is missing or wrong, or a choice that this model does not have.
        UnimegaError: PyYAML is not installed.
    """
    yaml = optional("yaml", extra="data")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
    for key in ("model", "params"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(content.get("ddconfig"), dict):
        raise CheckpointError(f"{path}: no model.params.ddconfig in it. Chameleon's {CONFIG_FILE} has one.")
    if content.get("remap") is not None:
        raise CheckpointError(f"{path}: remap={content['remap']!r} renumbers codes, which is not supported.")
    values = _sizes(path, content["ddconfig"], content)
    _check_sizes(path, config := VQGANConfig(**values))
    return config


def _sizes(path: Path, sizes: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    known = {*_SIZES, *_LISTS, *_FIXED, *_UNUSED}
    if unknown := sorted(set(sizes) - known):
        raise CheckpointError(f"{path}: ddconfig.{unknown[0]} is not known. Known: {', '.join(sorted(known))}.")
    for key, allowed in _FIXED.items():
        if key in sizes and sizes[key] not in allowed:
            raise CheckpointError(f"{path}: ddconfig.{key}={sizes[key]!r} is not supported, only {allowed[0]!r}.")
    named = [(f"ddconfig.{key}", field, sizes.get(key)) for key, field in _SIZES.items()]
    named += [("embed_dim", "width", params.get("embed_dim")), ("n_embed", "codebook", params.get("n_embed"))]
    values: dict[str, Any] = {}
    for name, field, value in named:
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {name}={value!r} is not a whole number above 0.")
        values[field] = value
    for key, field in _LISTS.items():
        value = sizes.get(key)
        if not isinstance(value, list) or any(type(item) is not int or item < 1 for item in value):
            raise CheckpointError(f"{path}: ddconfig.{key}={value!r} is not a list of whole numbers above 0.")
        values[field] = tuple(value)
    return values


def _check_sizes(path: Path, config: VQGANConfig) -> None:
    if not config.multipliers or config.resolution % (1 << (len(config.multipliers) - 1)):
        raise CheckpointError(
            f"{path}: ddconfig.resolution={config.resolution} cannot be halved {max(0, len(config.multipliers) - 1)} "
            "times, once for each entry of ch_mult after the first."
        )
    for multiplier in (1, *config.multipliers):
        if config.base_channels * multiplier % NORM_GROUPS:
            raise CheckpointError(
                f"{path}: ddconfig.ch={config.base_channels} times {multiplier} is not divisible by {NORM_GROUPS}, the "
                "groups of a norm."
            )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without those of the losses."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read ({why}). The file is damaged or holds more than tensors: nothing else is loaded."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: not a table of tensors, and no 'state_dict' in it.")
    return {name: tensor for name, tensor in content.items() if not name.startswith(_TRAINING_ONLY)}


def _check_names(path: Path, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        parts = [f"{len(missing)} of {len(wanted)} tensors are missing (first {missing[0]})"] if missing else []
        parts += [f"{len(unknown)} are not known (first {unknown[0]})"] if unknown else []
        raise CheckpointError(f"{path}: {' and '.join(parts)}. Not a VQGAN of the sizes in {CONFIG_FILE}.")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} is {list(found[name].shape)}, {CONFIG_FILE} asks for {list(tensor.shape)}."
            )
        if not found[name].is_floating_point() or not torch.isfinite(found[name]).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite floats. The file is damaged.")


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """No gradients, and products in all 24 bits: a device that rounds inputs gives other codes for some patches."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
