"""Why an implementation cannot run, without importing what it needs: the ``why_not`` of the tables."""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

INTERPRET = "TRITON_INTERPRET"
"""Environment variable that makes Triton run kernels in Python; read when triton is imported."""


@functools.cache
def missing(package: str) -> str | None:
    """``X is not installed``, or None."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules holds None or a module without a spec
        found = False
    return None if found else f"{package} is not installed"


def triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device: the package, an old GPU, or a CPU without the interpreter."""
    if (reason := missing("triton")) is not None:
        return reason
    if device.type == "cpu":
        interprets = os.environ.get(INTERPRET) == "1"
        return None if interprets else f"runs on a CPU in its interpreter alone: set {INTERPRET}=1"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def npu(*operators: str) -> Callable[[torch.device], str | None]:
    """The ``why_not`` of an implementation that calls these operators of torch-npu; versions have different ones."""

    def why_not(device: torch.device) -> str | None:
        if (reason := missing("torch_npu")) is not None:
            return reason.replace("torch_npu", "torch-npu")
        absent = [name for name in operators if not hasattr(torch.ops.npu, name)]
        return f"this torch-npu has no {', '.join(absent)}" if absent else None

    return why_not


def packages(*names: str) -> Callable[[torch.device], str | None]:
    """The ``why_not`` of an implementation that calls these packages."""
    return lambda device: next((reason for name in names if (reason := missing(name))), None)


def flash_attn(device: torch.device) -> str | None:
    """Why flash-attn cannot run; what is not causal is our Triton kernel's."""
    return missing("flash_attn") or triton(device)


def torch_varlen(device: torch.device) -> str | None:
    """Why torch's own varlen kernel cannot run: it takes grouped heads from 2.13 on."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        return f"needs torch 2.13, this is {torch.__version__}"
    return triton(device)
