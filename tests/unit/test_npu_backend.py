"""The backend of NPUs without one: a module that records stands in for ``torch.npu``, the meta device for an NPU."""

import contextlib
import types
from typing import Any

import numpy as np
import pytest
import torch

from unimega.backend import choice, npu, npu_redirection, redirection
from unimega.backend.redirected import Row
from unimega.errors import BackendError, UnimegaError


class Recorder(types.ModuleType):
    """Answers every call with a number or what was set, and remembers the call."""

    def __init__(self) -> None:
        super().__init__("torch_npu.npu")
        self.calls: list[tuple[Any, ...]] = []
        self.config = types.SimpleNamespace()
        self.answers: dict[str, Any] = {"device_count": 2, "get_device_name": "Ascend910B3", "memory_allocated": 7}
        self.answers |= {"get_rng_state": torch.zeros(4, dtype=torch.uint8), "stream": contextlib.nullcontext()}
        self.answers |= {"device": contextlib.nullcontext()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, *kwargs.items()))
            return self.answers.get(name, f"a {name}")

        return call


@pytest.fixture
def module() -> Recorder:
    return Recorder()


@pytest.fixture
def here(module: Recorder, monkeypatch: pytest.MonkeyPatch) -> npu.NpuBackend:
    device = lambda kind, index: torch.device({"npu": "meta"}[kind], index)
    types_of = types.SimpleNamespace(device=device, bfloat16=torch.bfloat16, float16=torch.float16)
    monkeypatch.setattr(npu, "torch", types_of)
    monkeypatch.setattr(npu, "optional", lambda name, extra: types.SimpleNamespace(npu=module))
    monkeypatch.setenv("LOCAL_RANK", "1")
    return npu.NpuBackend()


DEVICE = torch.device("meta", 1)


def test_absent_torch_npu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", None)
    with pytest.raises(UnimegaError, match=r"^package 'torch_npu' is needed here .* pip install 'unimega\[npu\]'"):
        choice.use("npu")
    assert choice.use("cpu").name == "cpu"  # a failed choice leaves it open


def test_what_it_is(here: npu.NpuBackend) -> None:
    assert (here.name, here.collective, here.device) == ("npu", "hccl", DEVICE)
    assert here.note == "never run on hardware"
    assert not choice.BACKENDS["cpu"]().note


def test_calls(here: npu.NpuBackend, module: Recorder) -> None:
    state = torch.ones(3, dtype=torch.uint8)
    here.select()
    assert module.config.allow_internal_format is False
    assert here.get_rng_state() is module.answers["get_rng_state"]
    here.set_rng_state(state)
    here.seed(5)
    here.synchronize()
    assert here.current_stream() == "a current_stream"
    assert here.new_stream() == "a Stream"
    assert here.event() == "a Event"
    with here.stream("side"):
        pass
    assert here.memory_allocated() == 7
    assert here.memory_peak() == "a max_memory_allocated"
    here.reset_memory_peak()
    wanted = [
        ("device_count",),
        ("set_device", DEVICE),
        ("set_compile_mode", ("jit_compile", False)),
        ("get_rng_state", DEVICE),
        ("set_rng_state", state, DEVICE),
        ("device", DEVICE),
        ("manual_seed", 5),
        ("synchronize", DEVICE),
        ("current_stream", DEVICE),
        ("Stream", DEVICE),
        ("Event", ("enable_timing", True)),
        ("stream", "side"),
        ("memory_allocated", DEVICE),
        ("max_memory_allocated", DEVICE),
        ("reset_peak_memory_stats", DEVICE),
    ]
    assert module.calls == wanted


def test_a_rank_without_an_npu(here: npu.NpuBackend, module: Recorder) -> None:
    module.answers["device_count"] = 1
    with pytest.raises(
        BackendError, match=r"^LOCAL_RANK=1 has no NPU: this host shows 1\. .*ASCEND_RT_VISIBLE_DEVICES"
    ):
        here.select()


@pytest.mark.parametrize(
    ("name", "rate"),
    [("Ascend910B3", 313e12), ("Ascend910B4-1", 280e12), ("Ascend910_9382", 376e12), ("Ascend310P3", None)],
)
def test_data_sheets(here: npu.NpuBackend, module: Recorder, name: str, rate: float | None) -> None:
    module.answers["get_device_name"] = name
    assert here.peak_flops(torch.bfloat16) == here.peak_flops(torch.float16) == rate
    assert here.peak_flops(torch.float32) is None


def test_arrays_are_pinned_and_copied(here: npu.NpuBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    moved = here.to_tensor(np.arange(3, dtype=np.int32))
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.int32, (3,))
    assert len(pinned) == 1


# The redirection ---------------------------------------------------------------


def table(module: Recorder) -> dict[str, Row]:
    return {row.title: row for row in npu_redirection.npu_table(module, DEVICE)}


def test_the_names_are_those_of_the_cpu(module: Recorder) -> None:
    rows = npu_redirection.npu_table(module, DEVICE)
    assert len({row.title for row in rows}) == len(rows)
    of_cpu = {row.title for row in redirection.CPU_TABLE}
    assert of_cpu - set(table(module)) == {"logging.megatron.core.tensor_parallel.random"}  # there are two generators
    assert not set(table(module)) - of_cpu


def test_cuda_s_names_lead_to_torch_npu(module: Recorder) -> None:
    rows = table(module)
    assert rows["torch.cuda.current_device"].new() == DEVICE
    for name in npu_redirection.SAME:
        rows[f"torch.cuda.{name}"].new("x", y=1)
        assert module.calls[-1] == (name, "x", ("y", 1))
    assert rows["torch.cuda.nvtx.range_push"].new("x") is None


@pytest.mark.parametrize(
    "where", ["torch.cuda.{}_rng_state", "megatron.core.tensor_parallel.random._{}_cuda_rng_state"]
)
def test_random_states_are_the_device_s(module: Recorder, where: str) -> None:
    rows, state = table(module), torch.ones(2, dtype=torch.uint8)
    assert torch.equal(rows[where.format("get")].new("cuda"), module.answers["get_rng_state"])
    rows[where.format("set")].new(state, "cuda")
    assert module.calls == [("get_rng_state", DEVICE), ("set_rng_state", state, DEVICE)]


def test_tensors_made_for_cuda_are_made_on_the_device(module: Recorder) -> None:
    rows = table(module)
    for device in ("cuda", "cuda:0", torch.device("cuda", 3)):
        assert rows["torch.empty"].new(2, device=device).device.type == "meta"
    assert rows["torch.empty"].new(2, device="cpu").device.type == "cpu"
    assert rows["torch.empty"].new(2).device.type == "cpu"
    tensor, to = torch.ones(2), torch.Tensor.to
    assert rows["torch.Tensor.to"].new(to, tensor, "cuda").device.type == "meta"
    assert rows["torch.Tensor.to"].new(to, tensor, device=torch.device("cuda")).device.type == "meta"
    assert rows["torch.Tensor.to"].new(to, tensor, torch.int32).dtype == torch.int32
    assert rows["torch.Tensor.cuda"].new(None, tensor).device.type == "meta"
    linear = torch.nn.Linear(2, 2)
    assert rows["torch.nn.Module.cuda"].new(None, linear, 0) is linear
    assert linear.weight.device.type == "meta"


def test_types_are_called_cuda_s(module: Recorder) -> None:
    as_type = table(module)["torch.Tensor.type"].new
    assert as_type(lambda tensor: "torch.npu.BFloat16Tensor", torch.ones(1)) == "torch.cuda.BFloat16Tensor"
    assert as_type(torch.Tensor.type, torch.ones(1), torch.int32).dtype == torch.int32


def test_tensors_move_to_the_host(module: Recorder) -> None:
    move = table(module)["megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu"].new
    assert move(None, as_numpy=True) is None
    assert move(torch.arange(3), as_numpy=True, record_stream=True).tolist() == [0, 1, 2]
    assert not module.calls
