"""What lets megatron-core run on a CPU: every redirected name does what megatron needs and nobody else notices."""

import ast
import importlib.metadata
import inspect
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import unimega.parallel  # noqa: F401  (before megatron)
from unimega import backend
from unimega.backend import redirection
from unimega.errors import BackendError

if backend.current().name != "cpu":
    pytest.skip("nothing is redirected on this device", allow_module_level=True)

import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import megatron.core.tensor_parallel
import megatron.core.transformer.moe.moe_layer
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

proxy: Any = parallel_state.torch  # type: ignore[attr-defined]
NO_CUDA = (AssertionError, RuntimeError)  # torch without CUDA; torch with CUDA, no device


def loaded() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.startswith("megatron.core")}


def called_by(module: str, expression: str, value: Any) -> Any:
    """Evaluate an expression of ``t`` as code of that module."""
    return eval(f"(lambda t: {expression})", {"__name__": module, "torch": torch})(value)


# One check per row ------------------------------------------------------------


def check_current_device() -> None:
    assert torch.empty(1, device=proxy.cuda.current_device()).device.type == "cpu"


def check_value(name: str, value: Any) -> Callable[[], None]:
    def check() -> None:
        assert getattr(proxy.cuda, name)() == value

    return check


def check_any_arguments(name: str) -> Callable[[], None]:
    def check() -> None:
        owner, _, method = name.rpartition(".")
        function = getattr(proxy.cuda.nvtx if owner else proxy.cuda, method)
        assert function() is None
        assert function(0) is None
        assert function(device="cuda:0") is None

    return check


def check_rng_round_trip() -> None:
    state = proxy.cuda.get_rng_state()
    expected = torch.rand(4)
    proxy.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), expected)


def check_seed(name: str) -> Callable[[], None]:
    def check() -> None:
        getattr(proxy.cuda, name)(7)
        seen = torch.rand(4)
        assert torch.equal(seen, torch.rand(4, generator=torch.Generator().manual_seed(7)))

    return check


def check_streams() -> None:
    stream, event = proxy.cuda.Stream(), proxy.cuda.Event(enable_timing=True)
    with proxy.cuda.stream(stream), stream:
        stream.wait_stream(proxy.cuda.current_stream())
        event.record(stream)
        stream.wait_event(event)
    event.wait()
    event.synchronize()
    assert stream.query()
    assert stream == proxy.cuda.default_stream()
    assert len({stream, proxy.cuda.current_stream()}) == 1
    assert event.elapsed_time(stream.record_event()) >= 0


FACTORY_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "tensor": ([1.0],),
    "as_tensor": ([1.0],),
    "scalar_tensor": (1.0,),
    "full": ((2,), 1.0),
    "full_like": (torch.zeros(2), 1.0),
    "randint": (3, (2,)),
    "randint_like": (torch.zeros(2), 3),
    "linspace": (0, 1, 3),
    "tril_indices": (2, 2),
    "empty_strided": ((2,), (1,)),
}


def check_factory(name: str) -> Callable[[], None]:
    def check() -> None:
        arguments = FACTORY_ARGUMENTS.get(name, (torch.zeros(2),) if name.endswith("_like") else (3,))
        for device in ("cuda", "cuda:1", torch.device("cuda", 0), "cpu", None):
            made = getattr(proxy, name)(*arguments, device=device)
            assert made.device.type == "cpu"
        assert getattr(proxy, name)(*arguments, device="meta").device.type == "meta"
        assert getattr(proxy, name)(*arguments).device.type == "cpu"

    return check


def check_load(tmp_path: Any) -> None:
    torch.save(torch.ones(2), tmp_path / "t.pt")
    assert proxy.load(tmp_path / "t.pt", map_location="cuda:0").device.type == "cpu"


def check_compile() -> None:
    assert proxy.compile(check_compile) is check_compile
    assert proxy.compile(dynamic=True)(check_compile) is check_compile


def check_to() -> None:
    tensor = torch.zeros(2)
    for expression in ("t.to('cuda')", "t.to(device='cuda:0')", "t.to(torch.device('cuda', 0))"):
        assert called_by("megatron.core.some", expression, tensor) is tensor
        with pytest.raises(NO_CUDA):
            called_by("unimega.some", expression, tensor)
    assert called_by("megatron.core.some", "t.to('cuda', torch.int32)", tensor).dtype == torch.int32
    assert tensor.to(torch.float64).dtype == torch.float64


def check_tensor_cuda() -> None:
    tensor = torch.zeros(2)
    assert called_by("megatron.core.some", "t.cuda()", tensor) is tensor
    assert called_by("megatron.core.some", "t.cuda(torch.device('cpu'), non_blocking=True)", tensor) is tensor
    with pytest.raises(NO_CUDA):
        called_by("unimega.some", "t.cuda()", tensor)


def check_type() -> None:
    for dtype, name in ((torch.float32, "Float"), (torch.bfloat16, "BFloat16"), (torch.float16, "Half")):
        tensor = torch.zeros(2, dtype=dtype)
        assert called_by("megatron.core.some", "t.type()", tensor) == f"torch.cuda.{name}Tensor"
        assert called_by("unimega.some", "t.type()", tensor) == f"torch.{name}Tensor"
        assert called_by("megatron.core.some", "t.type(torch.int32)", tensor).dtype == torch.int32


def check_module_cuda() -> None:
    module = torch.nn.Linear(2, 2)
    assert called_by("megatron.core.some", "t.cuda(torch.device('cpu'))", module) is module
    with pytest.raises(NO_CUDA):
        called_by("unimega.some", "t.cuda()", module)


def check_everywhere(name: str) -> Callable[[], None]:
    """Whoever imported the name by ``from``, before or after, has ours."""
    row = next(row for row in redirection.CPU_TABLE if row.name == name)

    def check() -> None:
        found = [module for title, module in loaded().items() if name in vars(module) and ".fsdp." not in title]
        assert sys.modules[row.where] in found
        assert all(vars(module)[name] is row.new for module in found)

    return check


def check_fork() -> None:
    """Inside a fork the tracker's stream flows, outside the default one goes on as if nothing had been."""
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 5)
    torch.default_generator.manual_seed(3)
    with tracker.fork():
        first = torch.rand(4)
    outside = torch.rand(4)
    with tracker.fork():
        second = torch.rand(4)
    inner, outer = torch.Generator().manual_seed(5), torch.Generator().manual_seed(3)
    assert torch.equal(first, torch.rand(4, generator=inner))
    assert torch.equal(second, torch.rand(4, generator=inner))
    assert torch.equal(outside, torch.rand(4, generator=outer))
    tracker.reset()


def check_recompute() -> None:
    """A second forward draws the masks of the first, from the default stream and from the tracker's."""
    x = torch.randn(64, 64, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        with megatron_random.get_cuda_rng_tracker().fork():
            x = torch.nn.functional.dropout(x, 0.3)
        return torch.nn.functional.dropout(x.tanh(), 0.5)

    def run(*, recompute: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tracker = megatron_random.get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", 5)
        torch.default_generator.manual_seed(3)
        y = megatron_random.checkpoint(block, False, x) if recompute else block(x)
        x.grad = None
        (y * y).sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad, torch.rand(3)

    for plain, recomputed in zip(run(recompute=False), run(recompute=True), strict=True):
        assert torch.equal(plain, recomputed)
    assert run(recompute=True)[1].count_nonzero() < x.numel()
    megatron_random.get_cuda_rng_tracker().reset()


def check_move_to_host() -> None:
    move = megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu
    tensor = torch.arange(3)
    assert move(tensor) is tensor
    assert move(tensor, as_numpy=True, record_stream=True).tolist() == [0, 1, 2]
    assert move(None, as_numpy=True) is None
    check_everywhere("maybe_move_tensor_to_cpu")()


def check_log(caplog: pytest.LogCaptureFixture) -> None:
    check_recompute()
    logging.getLogger(megatron_random.__name__).warning("CPU RNG state changed within GPU RNG context")
    assert not caplog.records
    logging.getLogger(megatron_random.__name__).warning("another matter")
    assert len(caplog.records) == 1


CHECKS: dict[str, Callable[..., None]] = {
    "torch.cuda.current_device": check_current_device,
    "torch.cuda.is_available": check_value("is_available", False),
    "torch.cuda.device_count": check_value("device_count", 1),
    "torch.cuda.synchronize": check_any_arguments("synchronize"),
    "torch.cuda.empty_cache": check_any_arguments("empty_cache"),
    "torch.cuda.set_device": check_any_arguments("set_device"),
    "torch.cuda.reset_peak_memory_stats": check_any_arguments("reset_peak_memory_stats"),
    "torch.cuda.ipc_collect": check_any_arguments("ipc_collect"),
    "torch.cuda.memory_allocated": check_value("memory_allocated", 0),
    "torch.cuda.max_memory_allocated": check_value("max_memory_allocated", 0),
    "torch.cuda.memory_reserved": check_value("memory_reserved", 0),
    "torch.cuda.max_memory_reserved": check_value("max_memory_reserved", 0),
    "torch.cuda.get_rng_state": check_rng_round_trip,
    "torch.cuda.set_rng_state": check_rng_round_trip,
    "torch.cuda.manual_seed": check_seed("manual_seed"),
    "torch.cuda.manual_seed_all": check_seed("manual_seed_all"),
    "torch.cuda.Stream": check_streams,
    "torch.cuda.Event": check_streams,
    "torch.cuda.current_stream": check_streams,
    "torch.cuda.default_stream": check_streams,
    "torch.cuda.stream": check_streams,
    "torch.cuda.is_current_stream_capturing": check_value("is_current_stream_capturing", False),
    "torch.cuda.nvtx.range_push": check_any_arguments("nvtx.range_push"),
    "torch.cuda.nvtx.range_pop": check_any_arguments("nvtx.range_pop"),
    **{f"torch.{name}": check_factory(name) for name in redirection.FACTORIES if name != "load"},
    "torch.load": check_load,
    "torch.compile": check_compile,
    "torch.Tensor.to": check_to,
    "torch.Tensor.cuda": check_tensor_cuda,
    "torch.Tensor.type": check_type,
    "torch.nn.Module.cuda": check_module_cuda,
    "megatron.core.jit.jit_fuser": check_everywhere("jit_fuser"),
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": check_recompute,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": check_fork,
    "logging.megatron.core.tensor_parallel.random": check_log,
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": check_move_to_host,
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": check_move_to_host,
}


@pytest.mark.parametrize("title", [row.title for row in redirection.CPU_TABLE])
def test_row(title: str, request: pytest.FixtureRequest) -> None:
    check = CHECKS[title]
    check(**{name: request.getfixturevalue(name) for name in inspect.signature(check).parameters})


def test_every_row_is_installed_and_checked() -> None:
    titles = [row.title for row in redirection.CPU_TABLE]
    assert len(set(titles)) == len(titles)
    assert set(titles) == set(CHECKS)
    assert redirection.installed() == tuple(titles)
    assert redirection.install() == tuple(titles)  # a second call changes nothing
    assert torch.Tensor.to.__wrapped__.__qualname__ == "TensorBase.to"  # type: ignore[attr-defined]
    check_everywhere("_get_cuda_rng_state")()
    check_everywhere("_set_cuda_rng_state")()


# Over all ---------------------------------------------------------------------


def test_every_module_holds_the_proxy_and_torch_is_untouched() -> None:
    modules = loaded()
    assert len(modules) > 100
    assert not [name for name, module in modules.items() if any(value is torch for value in vars(module).values())]
    assert sum(vars(module).get("torch") is proxy for module in modules.values()) > 80
    assert proxy is not torch
    assert proxy.mm is torch.mm
    assert proxy.distributed is torch.distributed
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.is_available.__module__ == "torch.cuda"
    assert inspect.isbuiltin(torch.empty)
    assert torch.compile.__module__ == "torch"
    with pytest.raises(NO_CUDA):
        torch.empty(1, device="cuda")


def test_modules_keep_their_own_loader_and_source() -> None:
    module = sys.modules["megatron.core.parallel_state"]
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert "def initialize_model_parallel" in inspect.getsource(module)


LEFT_AS_THEY_ARE = {
    # types and decorators, harmless without a device
    "torch.cuda.amp", "torch.cuda.OutOfMemoryError", "torch.cuda.BFloat16Tensor", "torch.cuda.FloatTensor",
    "torch.cuda.HalfTensor", "torch.cuda.random", "torch.cuda.nvtx",
    # CUDA graphs, nccl's allocator, hardware counters: refused by our settings
    "torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.graph_pool_handle", "torch.cuda.default_generators",
    "torch.cuda.set_stream", "torch.cuda.memory_stats", "torch.cuda.get_device_capability",
    "torch.cuda.get_device_properties", "torch.cuda.MemPool", "torch.cuda.use_mem_pool", "torch.cuda.clock_rate",
    "torch.cuda.power_draw", "torch.cuda.temperature", "torch.cuda.utilization",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def test_no_name_that_megatron_uses_is_missing() -> None:
    """A later 0.16.x that names something else of CUDA in the modules that we load shows here."""
    known = LEFT_AS_THEY_ARE | set(CHECKS)
    missing = set()
    for name, module in loaded().items():
        path = getattr(module, "__file__", None)
        if path is None or ".fsdp." in name or ".inference" in name:
            continue
        with open(path, encoding="utf-8") as file:
            source = file.read()
        if "device" not in source and "cuda" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and any(k.arg == "device" for k in node.keywords):
                called = dotted(node.func)
                if called.startswith("torch.") and not called.startswith("torch.cuda.random."):
                    missing |= {(called, name)} if called not in known else set()
            elif isinstance(node, ast.Attribute) and (used := dotted(node)).startswith("torch.cuda."):
                missing |= set() if any(f"{used}.".startswith(f"{one}.") for one in known) else {(used, name)}
    assert not missing


def test_proxy_answers_like_a_module() -> None:
    assert isinstance(proxy, types.ModuleType)
    assert proxy.__name__ == "torch"
    assert not hasattr(proxy, "no_such_name")
    assert proxy.cuda.FloatTensor is torch.cuda.FloatTensor


def test_only_megatron_sees_the_global_methods() -> None:
    """A module or a subclass of ours keeps torch's dispatch."""

    class Ours(torch.Tensor):
        pass

    assert type(torch.zeros(2).as_subclass(Ours).to(torch.float64)) is Ours
    assert torch.nn.Linear(2, 2).to(torch.float64).weight.dtype == torch.float64
    assert called_by("megatronic", "t.type()", torch.zeros(2)) == "torch.FloatTensor"


# Refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "0.17.0rc1", "1.0", "0.160.0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(BackendError, match=rf"megatron-core='{version}' is installed and unimega needs >=0.16,<0.17"):
        redirection.install()


def test_absent_megatron_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(BackendError, match=r"pip install 'megatron-core>=0.16,<0.17'"):
        redirection.install()


@pytest.mark.parametrize("version", ["0.16.0", "0.16.7"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert redirection.install()


def test_megatron_imported_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirection, "_installed", ())
    with pytest.raises(BackendError, match=r"import of 'megatron.core\S*' came before unimega.parallel"):
        redirection.install()


CUDA_PROGRAM = """
import os, sys, torch
os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
methods = torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda
factories = torch.empty, torch.load, torch.compile
from unimega import backend
assert not any(name.startswith("megatron") for name in sys.modules), "backend imports megatron"
real, torch.cuda.is_available = torch.cuda.is_available, lambda: True
assert backend.current().name == "cuda"
torch.cuda.is_available = real
from unimega.backend import import_hook, redirection
from unimega.parallel import repairs
assert redirection.installed() == () and redirection.install() == ()
assert methods == (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda)
assert factories == (torch.empty, torch.load, torch.compile)
assert {name for name, below, _ in import_hook._FINDER.actions if not below} == {r.module for r in repairs.REPAIRS}
assert not any(below for _, below, _ in import_hook._FINDER.actions)
assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
import megatron.core.optimizer
from megatron.core import parallel_state, jit
from megatron.core.tensor_parallel import random
assert parallel_state.torch is torch and jit.jit_fuser is torch.compile
assert random._get_cuda_rng_state.__module__ == random.__name__
from unimega.kernels.adamw import AdamW
assert megatron.core.optimizer.Adam is AdamW
print("nothing installed")
"""


def test_nothing_is_installed_on_cuda() -> None:
    done = subprocess.run([sys.executable, "-c", CUDA_PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.stdout == "nothing installed\n", done.stderr
    assert "Transformer Engine and Apex are not installed" not in done.stderr
