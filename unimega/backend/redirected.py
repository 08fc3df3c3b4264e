"""The pieces of which ``redirection`` makes its lists: a redirected name, and what stands behind many of them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MEGATRON = "megatron.core"

# fmt: off
FACTORIES = (
    "tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint",
    "randperm", "eye", "linspace", "as_tensor", "scalar_tensor", "tril_indices", "empty_strided", "empty_like",
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "load",
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Row:
    """One redirected name."""

    where: str
    """``torch``, ``torch.cuda``, ``torch.cuda.nvtx``: in the proxies that megatron's modules see. ``torch.Tensor``,
    ``torch.nn.Module``: the class itself, for calls from megatron's modules. ``logging``: a logger. Else: a module of
    megatron itself."""
    name: str
    new: Any
    """What it leads to; for a class a function of (original, self, ...), for the logger a filter."""

    @property
    def title(self) -> str:
        """The dotted name."""
        return f"{self.where}.{self.name}"


def nothing(*_: Any, **__: Any) -> None:
    """Stands for what has no meaning here."""


def as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands for torch.compile: with a function, or as a decorator with options."""
    return as_it_is if function is None else function


def factory(original: Callable[..., Any], target: torch.device) -> Callable[..., Any]:
    """A function of torch with a ``device``, which makes on ``target`` what was to be made on CUDA."""

    @functools.wraps(original)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        for key in ("device", "map_location"):
            if key in kwargs:
                kwargs[key] = _instead(kwargs[key], target)
        return original(*args, **kwargs)

    return redirected


def move(target: torch.device) -> Callable[..., torch.Tensor]:
    """What stands in for ``Tensor.to``: to ``target`` where CUDA was meant."""

    def to(original: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _instead(kwargs["device"], target)
        return original(tensor, *(_instead(arg, target) for arg in args), **kwargs)

    return to


def type_on_cuda(original: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Without an argument: what megatron compares with 'torch.cuda.FloatTensor'."""
    answer = original(tensor, *args, **kwargs)
    return answer if args or kwargs else f"torch.cuda.{answer.rpartition('.')[2]}"


def _instead(device: Any, target: torch.device) -> Any:
    """``device``, or the target where that names a CUDA device."""
    if isinstance(device, str):
        return target if device.startswith("cuda") else device
    return target if isinstance(device, torch.device) and device.type == "cuda" else device
