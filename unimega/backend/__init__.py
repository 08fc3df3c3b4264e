"""What a process runs on: device, collectives, random numbers, streams, memory, rates. Only here have devices names."""

from typing import TypeVar

from unimega.backend.base import Backend
from unimega.backend.choice import current, use

T = TypeVar("T")

__all__ = ["Backend", "current", "to_device", "use"]


def to_device(batch: T) -> T:
    """``current().to_device(batch)``: a ``Microbatch`` of numpy arrays becomes one of tensors on the device."""
    return current().to_device(batch)
