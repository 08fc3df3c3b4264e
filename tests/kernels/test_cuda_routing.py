"""csrc/routing.cu: built for every generation where nvcc is, and its kernels run by a CPU that plays a GPU."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.cases import CASES, DEFINITIONS, Case
from tests.kernels.moe_cases import expert_order
from tests.kernels.test_kernels import DEVICE, run
from tests.tolerances import assert_as_good_as
from unimega.errors import KernelUnavailable
from unimega.kernels.cuda import library, routing

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "routing.cu"
ARCHITECTURES = ("80", "90", "100")
FUNCTIONS = {
    *("unimega_route", "unimega_topk_routing", "unimega_expert_order"),
    *("unimega_routing_workspace", "unimega_error"),
}


# Built by nvcc ------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, from CMake as a user builds and installs it; from nvcc alone where there is no CMake."""
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("there is no nvcc: install CUDA's toolkit")
    place = tmp_path_factory.mktemp("cuda")
    if (cmake := shutil.which("cmake")) is None:
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        output = place / library.NAME
        command = [nvcc, "-std=c++17", "-shared", "-Xcompiler=-fPIC", *codes, "-o", str(output), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return output
    environment = {**os.environ, "UNIMEGA_BUILD": "cuda"}
    build = place / "build"
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(ARCHITECTURES)}"],
        [cmake, "--build", str(build)],
        [cmake, "--install", str(build), "--prefix", str(place)],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return place / "unimega" / library.NAME


def test_the_library_holds_code_for_every_generation(built: Path) -> None:
    loaded = ctypes.CDLL(str(built))
    for name in FUNCTIONS:
        assert getattr(loaded, name)
    image = built.read_bytes()
    for architecture in ARCHITECTURES:
        assert f"-arch sm_{architecture} ".encode() in image


def test_nothing_spills(built: Path) -> None:
    reader = (
        shutil.which("cuobjdump") or pytest.importorskip("tests.kernels.compile_all").CUOBJDUMP
    )  # Triton brings one
    usage = subprocess.run([reader, "-res-usage", str(built)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) >= 3 * len(ARCHITECTURES)
    assert {(stack, local) for _, stack, local in found} == {("0", "0")}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU: tests/gpu runs the kernels")
def test_without_a_driver_a_call_is_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PLACES", (built,))
    library.library.cache_clear()
    try:
        assert library.why_not(torch.device("cuda")) is None
        with pytest.raises(
            KernelUnavailable, match=r"^unimega_route of libunimega_routing\.so failed: .+ \(CUDA error \d+\)\.$"
        ):
            routing.route(torch.randn(3, 4), k=2)
    finally:
        library.library.cache_clear()


def test_no_torch_headers() -> None:
    assert re.findall(r"#include <(.+)>", SOURCE.read_text()) == ["cuda_runtime.h", "cfloat", "cstdint"]


def test_what_is_not_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PLACES", (tmp_path / "absent.so", tmp_path / "broken.so"))
    library.library.cache_clear()
    reason = library.why_not(torch.device("cuda"))
    assert reason is not None and reason.startswith("libunimega_routing.so is not built. Run: cmake -S . -B build")
    (tmp_path / "broken.so").write_text("no library")
    reason = library.why_not(torch.device("cuda"))
    assert reason is not None and "broken.so cannot be loaded" in reason
    library.library.cache_clear()


# Played on a CPU ------------------------------------------------------------------


@pytest.fixture(scope="module", params=["800", "700"])
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernels as C++, threads as fibers; 700: without the reductions of Ampere."""
    if sys.platform != "linux" or (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++ here to compile the kernels for a CPU")
    place = tmp_path_factory.mktemp("emulated")
    text = SOURCE.read_text()
    text = re.sub(r"(\w+)<<<(.+?)>>>\(", r"emulator::launch(\1, \2)(", text)
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"auto *\2 = reinterpret_cast<\1 *>(emulator::dynamic.data());", text
    )
    (place / "routing.cpp").write_text(text)
    output = place / "routing.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-D__CUDA_ARCH__={request.param}"]
    flags += ["-I", str(Path(__file__).parent / "cuda_emulator")]
    subprocess.run([compiler, *flags, "-o", str(output), str(place / "routing.cpp")], check=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(library, "PLACES", (output,))
    library.library.cache_clear()
    yield
    patch.undo()
    library.library.cache_clear()


ROWS = {"route": routing.route, "topk_routing": routing.topk_routing, "expert_order": routing.expert_order}
EVERY = {f"{op}-{case.name}": (op, case) for op in ROWS for case in CASES[op]}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU: tests/gpu runs the kernels")
@pytest.mark.parametrize(("op", "case"), EVERY.values(), ids=EVERY)
def test_matches_definition(emulated: None, op: str, case: Case) -> None:
    got = run(ROWS[op], case, torch.float32)
    low, exact = run(DEFINITIONS[op], case, torch.float32), run(DEFINITIONS[op], case, torch.float32, exact=True)
    for i, trio in enumerate(zip(got, low, exact, strict=True)):
        assert_as_good_as(*trio, what=f"{op}, result {i}")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU: tests/gpu runs the kernels")
class TestLimits:
    """Beyond the cases that every implementation is tried on."""

    @pytest.mark.parametrize(("tokens", "k", "experts"), [(65, 16, 512), (64, 16, 16), (129, 1, 1), (3, 5, 257)])
    def test_sizes(self, emulated: None, tokens: int, k: int, experts: int) -> None:
        logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(k))
        weights, chosen, order = routing.route(logits, k=k)
        best = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        assert torch.equal(chosen.long(), best.indices[:, :k])
        torch.testing.assert_close(weights, best.values[:, :k] / best.values[:, :k].sum(1, keepdim=True))
        wanted = expert_order(chosen, experts)
        for mine, want in zip((order.offsets, order.place, order.source), wanted_parts(wanted), strict=True):
            assert torch.equal(mine, want)

    def test_ties_go_to_the_lowest_expert(self, emulated: None) -> None:
        """Also among those of one lane, which are 32 apart."""
        logits = torch.zeros(3, 100).index_fill_(1, torch.tensor([40, 72, 99]), 1.0)
        _, chosen, _ = routing.route(logits, k=6)
        assert chosen.tolist() == [[40, 72, 99, 0, 1, 2]] * 3

    def test_not_a_number_chooses_different_experts(self, emulated: None) -> None:
        """A slot that no row belongs to would send later kernels astray."""
        bits = torch.tensor([-1, -1, 0x7FC00000, 0x3F800000], dtype=torch.int32)
        logits = bits[torch.randint(4, (40, 9), generator=torch.Generator().manual_seed(1))].view(torch.float32)
        logits[:9] = bits[:1].view(torch.float32)
        _, chosen, order = routing.route(logits, k=4)
        assert bool((chosen.sort(dim=1).values.diff(dim=1) > 0).all())
        assert int(chosen.min()) >= 0 and int(chosen.max()) < 9
        assert torch.equal(order.source.sort().values, torch.arange(160, dtype=torch.int32))

    def test_too_many(self, emulated: None) -> None:
        for experts, k in ((513, 2), (32, 17)):
            with pytest.raises(KernelUnavailable, match=rf"^experts={experts}, k={k} do not fit the CUDA kernels"):
                routing.route(torch.zeros(2, experts), k=k)
            with pytest.raises(KernelUnavailable, match=rf"^experts={experts}, k={k} do not fit the CUDA kernels"):
                routing.topk_routing(torch.zeros(2, experts), k=k)
            with pytest.raises(KernelUnavailable, match=rf"^experts={experts}, k={k} do not fit the CUDA kernels"):
                routing.expert_order(torch.zeros(2, k, dtype=torch.int32), experts)


def wanted_parts(order: Any) -> tuple[torch.Tensor, ...]:
    return order.offsets, order.place, order.source
