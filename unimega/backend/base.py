"""What every backend answers, and what is the same on all of them."""

import abc
import contextlib
import dataclasses
import datetime
import os
import time
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")

GEMM_SECONDS = 0.2


class Backend(abc.ABC):
    """One kind of device: where tensors live, how ranks talk, and what they can do. ``current()`` gives it."""

    name: str
    """``cpu``, ``cuda`` or ``npu``."""
    collective: str
    """Name of torch.distributed's backend: ``gloo``, ``nccl`` or ``hccl``."""
    keeps_sent_tensors: bool
    """Whether ``collective`` keeps what it sends alive until it is sent: then a pipeline may free it at once."""
    runs_apex: bool = False
    """Whether the kernels of Apex and TransformerEngine run here: they know CUDA alone."""
    device: torch.device
    """This process's device: that of its LOCAL_RANK, if there are several."""
    note: str = ""
    """What whoever runs on it should know; ``doctor`` prints it."""
    gemm_size: int
    """Rows, columns and depth of the product that measures the GEMM rate: large enough to reach it."""

    def __init__(self) -> None:
        self._gemm_flops: dict[torch.dtype, float] = {}

    @abc.abstractmethod
    def get_rng_state(self) -> torch.Tensor:
        """State of the device's random number generator, a uint8 tensor on the host."""

    @abc.abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Put back what ``get_rng_state`` returned."""

    @abc.abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the device's generator; on CPU it is the one that host code uses as well."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything it was given."""

    @abc.abstractmethod
    def current_stream(self) -> Any:
        """The stream that work goes to now."""

    @abc.abstractmethod
    def new_stream(self) -> Any:
        """Another stream; inert on CPU."""

    @abc.abstractmethod
    def event(self) -> Any:
        """A mark in the current stream: ``record()``, and ``elapsed_time(later)`` in ms once both have happened."""

    @abc.abstractmethod
    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Send the work of a ``with`` block to a stream."""

    @abc.abstractmethod
    def memory_allocated(self) -> int:
        """Bytes of device memory that tensors hold (CPU: resident memory of the process)."""

    @abc.abstractmethod
    def memory_peak(self) -> int:
        """Most bytes held since the start or the last ``reset_memory_peak``."""

    @abc.abstractmethod
    def reset_memory_peak(self) -> None:
        """Start a new peak from what is held now (CPU: where the system allows it)."""

    @abc.abstractmethod
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """The maker's dense GEMM rate in FLOP/s, or None where none is known: measure it then."""

    @abc.abstractmethod
    def to_tensor(self, array: np.ndarray) -> torch.Tensor:
        """Bring one array to the device, same shape and dtype; no wait for the copy."""

    def to_host(self, values: torch.Tensor) -> "HostCopy":
        """Start to copy a small tensor to the host; nobody waits until the copy is read."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.device.type != "cpu")
        host.copy_(values, non_blocking=True)
        event = self.event()
        event.record()
        return HostCopy(host, event)

    def to_device(self, batch: T) -> T:
        """Bring a frozen dataclass (a ``Microbatch``) to the device.

        Args:
            batch: numpy arrays become tensors of the same shape and dtype, dataclasses in it are followed; ints, tuples
                and whatever else stay the host values they are.

        Returns:
            The same class. No host sync: work on the current stream comes after the copies by itself.
        """
        if isinstance(batch, np.ndarray):
            return self.to_tensor(batch)  # type: ignore[return-value]
        if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
            return batch
        fields = {f.name: self.to_device(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
        return type(batch)(**fields)

    def measured_gemm_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of the best of the square GEMMs that fit into 0.2 s, measured once per dtype. Waits for the device."""
        if dtype not in self._gemm_flops:
            a = torch.ones(self.gemm_size, self.gemm_size, dtype=dtype, device=self.device)
            out = torch.mm(a, a)
            best = float("inf")
            start = time.perf_counter()
            while (begin := time.perf_counter()) - start < GEMM_SECONDS or best == float("inf"):
                self.synchronize()
                begin = time.perf_counter()
                torch.mm(a, a, out=out)
                self.synchronize()
                best = min(best, time.perf_counter() - begin)
            self._gemm_flops[dtype] = 2 * self.gemm_size**3 / best
        return self._gemm_flops[dtype]

    @abc.abstractmethod
    def select(self) -> None:
        """Make ``device`` this process's default device of its kind."""

    def init_process_group(self, *, timeout: datetime.timedelta, store: dist.Store | None = None) -> None:
        """Join the world that torchrun started; a process of its own is a world of one.

        Args:
            timeout: how long a collective may wait for a rank that hangs.
            store: how ranks find each other; absent: MASTER_ADDR and MASTER_PORT. RANK and WORLD_SIZE come from the
                environment in both cases.

        Collectives: all ranks must call it. Does nothing in a process that has joined.
        """
        if dist.is_initialized():
            return
        self.select()
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if store is None and "RANK" not in os.environ:
            store = dist.HashStore()
        if store is None:
            dist.init_process_group(self.collective, timeout=timeout)
        else:
            dist.init_process_group(self.collective, timeout=timeout, store=store, rank=rank, world_size=world)


def host_tensor(array: np.ndarray) -> torch.Tensor:
    """The array's memory as a tensor; a copy if it is read-only, since a tensor could write to it (a mapped corpus)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class HostCopy:
    """Values on their way to the host."""

    def __init__(self, values: torch.Tensor, event: Any) -> None:
        self._values, self._event = values, event

    def read(self) -> Any:
        """Wait for this copy, not for what the device was given later; its numbers as nested lists."""
        self._event.synchronize()
        return self._values.tolist()


class InertStream:
    """A stream or event where there are none: everything is done at once, all of them are equal."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time = time.perf_counter()

    def __enter__(self) -> "InertStream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InertStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record(self, stream: Any = None) -> None:
        """Remember now."""
        self._time = time.perf_counter()

    def record_event(self, event: "InertStream | None" = None) -> "InertStream":
        """An event that has happened."""
        return InertStream() if event is None else event

    def query(self) -> bool:
        """Everything is done."""
        return True

    def elapsed_time(self, end: "InertStream") -> float:
        """Milliseconds from this event's record to that of ``end``."""
        return (end._time - self._time) * 1e3
