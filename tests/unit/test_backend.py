"""What a backend answers, on the CPU here and on a GPU where there is one."""

import dataclasses
import datetime
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from unimega import backend
from unimega.backend import choice, cpu, cuda, import_hook
from unimega.backend.base import Backend
from unimega.batch import make_microbatch
from unimega.errors import BackendError

HERE = "cuda" if torch.cuda.is_available() else "cpu"
MINUTE = datetime.timedelta(seconds=60)


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def any_backend(request: pytest.FixtureRequest) -> Backend:
    return choice.BACKENDS[request.param]()


def microbatch() -> Any:
    document = np.array([1, 1, 1, 1, 2, 2, 2, 0])
    modality = np.array([0, 1, 1, 0, 0, 0, 1, 0])
    weights = np.array([1, 1, 1, 0, 1, 1, 0, 0], dtype=np.float32)
    return make_microbatch(
        np.arange(8), modality=modality, document=document, labels=np.arange(1, 9), loss_weights=weights, modalities=2,
        step_tokens=7,
    )  # fmt: skip


# Choice ---------------------------------------------------------------------


def test_current_is_what_torch_sees(nothing_chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIMEGA_BACKEND", "npu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert backend.current().name == HERE
    assert backend.current() is backend.current()


def test_cuda_where_torch_sees_it(nothing_chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    found = backend.current()
    assert (found.name, found.collective, found.device) == ("cuda", "nccl", torch.device("cuda", 3))
    assert os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


def test_the_user_s_connections_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    cuda.CudaBackend()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_use_comes_first_and_stays(nothing_chosen: None) -> None:
    assert backend.use("cpu") is backend.current()
    assert backend.use("cpu") is backend.current()
    with pytest.raises(BackendError, match=r"^backend='cuda' comes too late: this process runs on 'cpu'\. Call"):
        backend.use("cuda")


def test_unknown_backend(nothing_chosen: None) -> None:
    with pytest.raises(BackendError, match=r"^backend='tpu' is not known\. There are cpu, cuda, npu\.$"):
        backend.use("tpu")


@pytest.mark.parametrize("rank", [2, 7])
def test_a_rank_without_a_gpu(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("was tried"))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(
        BackendError, match=rf"^LOCAL_RANK={rank} has no GPU: this host shows 2\. Start at most 2 ranks"
    ):
        cuda.CudaBackend().init_process_group(timeout=MINUTE)


def test_the_last_rank_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[torch.device] = []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    cuda.CudaBackend().select()
    assert selected == [torch.device("cuda", 1)]


# Answers --------------------------------------------------------------------


def test_names(any_backend: Backend) -> None:
    assert (any_backend.name, any_backend.collective) in (("cpu", "gloo"), ("cuda", "nccl"))
    assert any_backend.device.type == any_backend.name


def test_random_numbers(any_backend: Backend) -> None:
    any_backend.seed(11)
    state = any_backend.get_rng_state()
    assert state.dtype == torch.uint8
    assert state.device.type == "cpu"
    first = torch.rand(5, device=any_backend.device)
    second = torch.rand(5, device=any_backend.device)
    any_backend.set_rng_state(state)
    assert torch.equal(torch.rand(5, device=any_backend.device), first)
    any_backend.seed(11)
    torch.rand(5, device=any_backend.device)
    assert torch.equal(torch.rand(5, device=any_backend.device), second)


def test_streams(any_backend: Backend) -> None:
    any_backend.select()
    side = any_backend.new_stream()
    with any_backend.stream(side):
        x = torch.ones(4, device=any_backend.device) * 2
    any_backend.current_stream().wait_stream(side)
    any_backend.synchronize()
    assert x.tolist() == [2.0] * 4


def test_memory(any_backend: Backend) -> None:
    any_backend.select()
    size = 64 << 20
    any_backend.reset_memory_peak()
    before = any_backend.memory_allocated()
    x = torch.ones(size, dtype=torch.uint8, device=any_backend.device)
    assert any_backend.memory_allocated() >= before + size // 2
    del x
    assert any_backend.memory_peak() >= before + size // 2
    assert any_backend.memory_peak() < 1 << 40


@pytest.mark.skipif(not cpu._CLEAR.exists(), reason="this system cannot reset the peak")
def test_cpu_peak_is_reset() -> None:
    here = cpu.CpuBackend()
    x = np.ones(128 << 20, dtype=np.uint8)
    high = here.memory_peak()
    del x
    here.reset_memory_peak()
    assert here.memory_peak() < high - (64 << 20)


def test_gemm_rate_is_measured_once(any_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimega.backend.base.GEMM_SECONDS", 0.01)
    rate = any_backend.measured_gemm_flops(torch.float32)
    assert 1e8 < rate < 1e16
    assert any_backend.measured_gemm_flops(torch.float32) == rate


def test_no_data_sheet_for_a_cpu() -> None:
    assert cpu.CpuBackend().peak_flops(torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_data_sheets(name: str, rate: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = cuda.CudaBackend()
    assert device.peak_flops(torch.bfloat16) == device.peak_flops(torch.float16) == rate
    assert device.peak_flops(torch.float32) is None


# Microbatches ---------------------------------------------------------------


def assert_moved(host: Any, moved: Any, device: torch.device) -> None:
    assert type(moved) is type(host)
    for field in dataclasses.fields(host):
        a, b = getattr(host, field.name), getattr(moved, field.name)
        if dataclasses.is_dataclass(a):
            assert_moved(a, b, device)
        elif isinstance(a, np.ndarray):
            assert isinstance(b, torch.Tensor)
            assert b.device == device
            assert b.cpu().numpy().dtype == a.dtype
            assert np.array_equal(b.cpu().numpy(), a)
        else:
            assert b is a


def test_microbatch_to_device(any_backend: Backend) -> None:
    host = microbatch()
    moved = any_backend.to_device(host)
    assert_moved(host, moved, any_backend.device)
    assert moved.order.documents.cu_seqlens.dtype == torch.int32
    assert moved.order.counts == (5, 3)


def test_to_device_of_the_current_backend() -> None:
    host = microbatch()
    assert_moved(host, backend.to_device(host), backend.current().device)


def test_read_only_arrays_are_copied(any_backend: Backend, recwarn: pytest.WarningsRecorder) -> None:
    array = np.arange(6, dtype=np.int32)
    array.flags.writeable = False
    any_backend.to_tensor(array).add_(1)
    assert array.tolist() == [0, 1, 2, 3, 4, 5]
    assert not recwarn.list


# The world ------------------------------------------------------------------


def test_a_process_alone_is_a_world_of_one(any_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if dist.is_initialized():
        pytest.skip("another test keeps a world in this process")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    any_backend.init_process_group(timeout=MINUTE)
    try:
        any_backend.init_process_group(timeout=MINUTE)  # has joined
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        assert dist.get_backend() == any_backend.collective
        x = torch.ones(2, device=any_backend.device)
        dist.all_reduce(x)
        assert x.tolist() == [1.0, 1.0]
    finally:
        dist.destroy_process_group()


def test_rank_and_world_from_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    here, store = cpu.CpuBackend(), dist.FileStore(str(tmp_path / "store"), 2)
    here.init_process_group(timeout=MINUTE)
    here.init_process_group(timeout=MINUTE, store=store)
    assert calls[0] == (("gloo",), {"timeout": MINUTE})  # torch reads the environment, MASTER_ADDR as well
    assert calls[1] == (("gloo",), {"timeout": MINUTE, "store": store, "rank": 1, "world_size": 2})


# The import hook ------------------------------------------------------------


def test_import_hook(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "hooked_package"
    package.mkdir()
    (package / "__init__.py").write_text("from hooked_package.inner import value\n")
    (package / "inner.py").write_text("value = 1\n")
    (tmp_path / "hooked_package_other.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(import_hook._FINDER, "actions", list(import_hook._FINDER.actions))
    seen: list[str] = []
    import_hook.after_import("hooked_package", lambda module: seen.append(module.__name__), below=True)
    import_hook.after_import("hooked_package.inner", lambda module: setattr(module, "value", 2))
    import hooked_package  # type: ignore[import-not-found]
    import hooked_package_other  # type: ignore[import-not-found]

    assert hooked_package.value == 2  # before the importer took a copy
    assert hooked_package_other.value == 1
    assert seen == ["hooked_package.inner", "hooked_package"]
    import_hook.after_import("hooked_package", lambda module: seen.append("late"))
    assert seen[-1] == "late"
