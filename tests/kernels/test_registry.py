"""The table of ops: what auto picks, what a name refuses, what doctor prints."""

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests import moe
from unimega.__main__ import main
from unimega.config.experts import ExpertSpec
from unimega.errors import KernelUnavailable
from unimega.kernels import registry
from unimega.kernels.registry import Impl
from unimega.moe.layer import MoE
from unimega.moe.router import Router

CPU = torch.device("cpu")
HERE = "tests.kernels.test_registry"


def fast() -> str:
    return "fast"


def slow() -> str:
    return "slow"


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_table", dict(registry._table))


def declare_copy(reason: str | None = None) -> None:
    registry.declare(
        "copy",
        Impl("cuda", "no.such.module:copy", frozenset({"cuda"})),
        Impl("triton", f"{HERE}:fast", frozenset({"cpu", "cuda"}), lambda device: reason),
        Impl("reference", f"{HERE}:slow", registry.EVERYWHERE),
    )


def test_auto_takes_the_first_that_can_run() -> None:
    declare_copy()
    assert registry.resolve("copy", device=CPU)() == "fast"


def test_auto_passes_over_what_cannot_run() -> None:
    declare_copy("triton is not installed")
    assert registry.resolve("copy", device=CPU)() == "slow"


def test_a_name_is_taken_at_its_word() -> None:
    declare_copy()
    assert registry.resolve("copy", device=CPU, impl="reference")() == "slow"


@pytest.mark.parametrize(
    ("op", "impl", "message"),
    [
        (
            "copy",
            "triton",
            "kernels.copy='triton' cannot run on cpu. cuda: does not run on cpu; triton: triton is not installed; "
            "reference: available.",
        ),
        (
            "copy",
            "tritn",
            "kernels.copy='tritn' is not an implementation. cuda: does not run on cpu; "
            "triton: triton is not installed; reference: available.",
        ),
        ("cpy", "auto", "kernels.cpy is not an op. Choose from: "),
    ],
)
def test_a_name_never_falls_back(op: str, impl: str, message: str) -> None:
    declare_copy("triton is not installed")
    with pytest.raises(KernelUnavailable) as caught:
        registry.resolve(op, device=CPU, impl=impl)
    assert str(caught.value).startswith(message)


def test_limits_are_held_to_the_sizes_of_the_model() -> None:
    """At construction: ``auto`` passes over what is too small, a name is refused with the key of [model]."""
    for op in ("topk_routing", "expert_order", "route"):
        (cuda,) = (impl for impl in registry.implementations(op) if impl.name == "cuda")
        one = Impl("cuda", f"{HERE}:fast", frozenset({"cpu"}), limits=cuda.limits)
        registry._table[op] = (one, Impl("reference", f"{HERE}:slow", registry.EVERYWHERE))
        found = {}
        for experts, top_k in ((512, 16), (513, 16), (512, 17)):
            found[experts, top_k] = registry.resolve(op, device=CPU, sizes={"experts": experts, "top_k": top_k})()
        assert list(found.values()) == ["fast", "slow", "slow"]
    with pytest.raises(KernelUnavailable) as caught:
        Router(replace(moe.build(), kernels={"topk_routing": "cuda"}), ExpertSpec(number=600, width=8, top_k=2))
    assert str(caught.value) == (
        "kernels.topk_routing='cuda' cannot run on cpu. cuda: takes model.experts of at most 512, not 600; "
        "reference: available."
    )
    with pytest.raises(KernelUnavailable, match=r"takes model\.top_k of at most 16, not 17"):
        MoE(replace(moe.build(), kernels={"expert_order": "cuda"}), ExpertSpec(number=32, width=8, top_k=17))


def test_an_op_is_declared_once() -> None:
    declare_copy()
    with pytest.raises(ValueError, match="declared twice"):
        declare_copy()


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("unimega"), "propagate", True)
    registry._announce.cache_clear()
    declare_copy()
    with caplog.at_level(logging.INFO, "unimega"):
        registry.resolve("copy", device=CPU)
        registry.resolve("copy", device=CPU)
    assert caplog.messages == ["kernel copy -> triton on cpu"]


def test_every_op_has_a_reference_everywhere() -> None:
    for op in registry.ops():
        last = registry.implementations(op)[-1]
        assert (last.name, last.devices) == ("reference", registry.EVERYWHERE)
        assert registry.resolve(op, device=CPU, impl="reference") is not None


def test_doctor_prints_every_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    declare_copy("triton is not installed")
    main(["doctor"])
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "copy triton cpu triton is not installed" in lines
    assert "copy reference cpu chosen by auto" in lines
    for op in registry.ops():
        assert any(line.startswith(f"{op} reference") for line in lines)
    for name in ("python", "torch", "megatron-core", "backend"):
        assert any(line.startswith(name) for line in lines)


@pytest.mark.parametrize("argv", [[], ["dokter"]])
def test_doctor_is_the_only_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_importing_ops_imports_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import unimega.kernels; print(*unimega.kernels.registry.ops())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "rms_norm" in done.stdout
