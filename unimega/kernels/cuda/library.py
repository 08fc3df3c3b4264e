"""The shared library that CMake builds from csrc/routing.cu: where it is, and its functions for ctypes."""

import ctypes
import functools
from pathlib import Path

import torch

from unimega.errors import KernelUnavailable

NAME = "libunimega_routing.so"
ROOT = Path(__file__).resolve().parents[3]
PLACES = (ROOT / "unimega" / NAME, ROOT / "build" / NAME)
"""Where ``cmake --install`` and ``cmake --build`` leave it."""

LIMITS = {"experts": 512, "top_k": 16}
"""The most experts, and slots of a token, that the kernels take."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, with the types of its functions.

    Raises:
        KernelUnavailable: it has not been built, or cannot be loaded.
    """
    path = next((place for place in PLACES if place.exists()), None)
    if path is None:
        raise KernelUnavailable(
            f"{NAME} is not built. Run: cmake -S . -B build -DUNIMEGA_BUILD=cuda && cmake --build build && "
            "cmake --install build --prefix ."
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(f"{path} cannot be loaded ({error}). Build it again on this machine.") from error
    return typed(loaded)


def typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions of csrc/routing.cu."""
    address, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.unimega_routing_workspace.argtypes = [wide, number]
    loaded.unimega_routing_workspace.restype = wide
    choice = (address, address, wide, wide, number, number, number, number, ctypes.c_float, number, number)
    loaded.unimega_route.argtypes = [*choice, *(address,) * 7]
    loaded.unimega_topk_routing.argtypes = [*choice, *(address,) * 3]
    loaded.unimega_expert_order.argtypes = [address, wide, number, number, *(address,) * 5]
    loaded.unimega_error.argtypes = [number]
    loaded.unimega_error.restype = ctypes.c_char_p
    return loaded


def why_not(device: torch.device) -> str | None:
    """Why the library cannot run on a device."""
    try:
        library()
    except KernelUnavailable as error:
        return str(error).rstrip(".")
    return None
