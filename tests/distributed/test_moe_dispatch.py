"""Layers of routed experts over ep, etp and tp: output, gradients and statistics of one rank that holds all of it."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import moe
from tests.distributed.harness import run_dist
from tests.sync_guard import forbid_syncs
from tests.tolerances import PARITY_FP32, relative_error
from unimega.config.experts import ExpertSpec
from unimega.config.schema import ParallelConfig
from unimega.layers.context import Call
from unimega.moe.layer import MoE
from unimega.moe.rows import of_rank
from unimega.moe.transfer import Travel
from unimega.parallel import groups
from unimega.parallel.experts import ExpertLayout
from unimega.parallel.groups import Groups
from unimega.parallel.linear import Layout

PLAIN = ExpertSpec(number=4, width=12, top_k=2)
FULL = replace(PLAIN, balance=0.3, z_loss=0.05, shared_width=16, shared_gate=True)
CAPACITY = replace(FULL, capacity=(0.6, 1.1), score="sigmoid", scale=1.5)
DOCUMENTS = replace(FULL, score="sigmoid", balance_over="document", groups=2, group_topk=1)
GLOBAL = replace(FULL, balance_over="global_batch", normalize=False)
SETS = replace(FULL, number=8, sets=((0, 1, 2, 3), (2, 3, 4, 5, 6, 7)), balance_counts="first")
NOISE = replace(FULL, number=8, noise=True)

Make = tuple[tuple[int, int], int]
"""Tokens by modality, and pads."""
MIXED: tuple[Make, ...] = (((30, 28), 6), ((0, 17), 47), ((64, 0), 0), ((9, 48), 7))


@dataclass(frozen=True)
class Case:
    """A layer on some ranks; ``batches``: one per dp rank, of equal length."""

    spec: ExpertSpec
    tp: int = 1
    sp: bool = False
    ep: int = 1
    etp: int = 1
    dispatch: Any = "alltoall"
    batches: tuple[Make, ...] = MIXED
    one_sided: bool = False
    """All tokens choose expert 1 first, and none the last."""
    documents: int = 3
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def all_to_all(self) -> bool:
        return self.ep > 1 and self.dispatch == "alltoall"


TWO = {
    "ep 2": Case(FULL, ep=2),
    "ep 2, all-gather": Case(GLOBAL, ep=2, dispatch="allgather"),
    "ep 2, capacity": Case(CAPACITY, ep=2),
    "ep 2, documents, groups": Case(DOCUMENTS, ep=2),
    "ep 2, sets": Case(SETS, ep=2),
    "ep 2, plain torch": Case(
        FULL, ep=2, kernels=dict.fromkeys(("expert_order", "expert_ffn", "permute", "unpermute"), "reference")
    ),
    "ep 2, one expert has all, one none": Case(FULL, ep=2, one_sided=True),
    "ep 2, all-gather, one expert has all, one none": Case(FULL, ep=2, dispatch="allgather", one_sided=True),
    "ep 2, a rank sends nothing": Case(FULL, ep=2, batches=(((0, 0), 8), ((5, 3), 0))),
    "ep 2, a rank receives nothing": Case(replace(SETS, number=4, sets=((0, 1), (0, 1))), ep=2),
    "ep 2, nobody sends": Case(FULL, ep=2, batches=(((0, 0), 3), ((0, 0), 3))),
    "ep 2, one token": Case(FULL, ep=2, batches=(((1, 0), 0), ((0, 1), 0)), documents=1),
    "ep 2, unequal lengths": Case(FULL, ep=2, batches=(((3, 10), 1), ((40, 0), 0))),
    "ep 2 = E": Case(replace(FULL, number=2, top_k=1), ep=2),
    "sp 2": Case(GLOBAL, tp=2, sp=True),
    "sp 2, capacity": Case(CAPACITY, tp=2, sp=True),
    "sp 2, documents": Case(DOCUMENTS, tp=2, sp=True),
    "sp 2, noise": Case(NOISE, tp=2, sp=True),
    "sp 2, ep 2": Case(SETS, tp=2, sp=True, ep=2),
    "sp 2, ep 2, capacity": Case(CAPACITY, tp=2, sp=True, ep=2),
    "sp 2, ep 2, all-gather": Case(FULL, tp=2, sp=True, ep=2, dispatch="allgather"),
    "sp 2, etp 2": Case(FULL, tp=2, sp=True, etp=2),
    "sp 2, ep 2, two tokens": Case(FULL, tp=2, sp=True, ep=2, batches=(((1, 1), 0),)),
    "sp 2, pads on both": Case(FULL, tp=2, sp=True, ep=2, batches=(((3, 5), 48),)),
    "tp 2": Case(FULL, tp=2),
    "tp 2, noise": Case(NOISE, tp=2),
    "tp 2, ep 2": Case(GLOBAL, tp=2, ep=2),
    "tp 2, ep 2, all-gather": Case(CAPACITY, tp=2, ep=2, dispatch="allgather"),
    "tp 2, etp 2": Case(FULL, tp=2, etp=2),
    "tp 2, ep 2, odd length": Case(FULL, tp=2, ep=2, batches=(((3, 4), 0),)),
    "tp 2, ep 2, one token": Case(FULL, tp=2, ep=2, batches=(((1, 0), 0),), documents=1),
}
FOUR = {
    "ep 4 = E": Case(FULL, ep=4),
    "ep 4, all-gather": Case(SETS, ep=4, dispatch="allgather"),
    "ep 2 of dp 4": Case(GLOBAL, ep=2),
    "ep 4, one expert has all": Case(replace(FULL, number=8), ep=4, one_sided=True),
    "ep 4, fewer tokens than ranks": Case(FULL, ep=4, batches=(((1, 0), 0), ((0, 0), 1), ((0, 1), 0), ((0, 0), 1))),
    "sp 2, ep 2, etp 2": Case(FULL, tp=2, sp=True, ep=2, etp=2),
    "sp 2, ep 2, etp 2, all-gather": Case(DOCUMENTS, tp=2, sp=True, ep=2, etp=2, dispatch="allgather"),
    "sp 2, ep 4": Case(CAPACITY, tp=2, sp=True, ep=4),
    "sp 2, ep 2": Case(GLOBAL, tp=2, sp=True, ep=2),
    "tp 2, ep 2, etp 2": Case(FULL, tp=2, ep=2, etp=2),
    "tp 2, ep 4": Case(GLOBAL, tp=2, ep=4),
    "tp 4, ep 2, tiny": Case(FULL, tp=4, ep=2, batches=(((2, 0), 1),)),
    "sp 4, ep 4, all-gather": Case(FULL, tp=4, sp=True, ep=4, dispatch="allgather"),
    "sp 4, etp 4": Case(FULL, tp=4, sp=True, etp=4),
}
CASES = {2: TWO, 4: FOUR}


def shard(name: str, whole: torch.Tensor, mesh: Groups) -> torch.Tensor:
    """This rank's part of a parameter or its gradient."""
    group = mesh.tp
    if name.startswith("experts."):
        whole, group = whole.chunk(mesh.ep.size())[mesh.ep.rank()], mesh.etp
    if name.endswith("gate_up.weight"):
        return torch.cat([half.chunk(group.size(), -2)[group.rank()] for half in whole.chunk(2, -2)], -2)
    return whole.chunk(group.size(), -1)[group.rank()] if name.endswith("down.weight") else whole


def one_rank(case: Case, calls: list[Call]) -> tuple[MoE, list[dict[str, torch.Tensor]]]:
    """The layer on one rank, and output, gradients and statistics for each micro-batch."""
    torch.manual_seed(7)
    made = moe.make(case.spec)
    if case.one_sided:
        with torch.no_grad():
            made.router.weight.mul_(0.1)
            made.router.weight[:, 0] = torch.linspace(1, -50, case.spec.number)
            made.router.weight[1, 0] = 50.0
    found = []
    for rank, call in enumerate(calls):
        torch.manual_seed(100 + rank)
        found.append(moe.gradients(made, inputs(case, call, rank), call))
        seen = made.take_statistics()
        assert seen is not None
        found[-1] |= {"slots": seen.slots, "dropped": seen.dropped, "entropy": seen.entropy}
        found[-1] |= {"balance": seen.balance, "z_loss": seen.z_loss, "tokens": torch.tensor(seen.tokens)}
        if case.one_sided:
            assert seen.slots[:, 1].tolist() == list(seen.tokens) and not seen.slots[:, -1].any()
    return made, found


def inputs(case: Case, call: Call, rank: int) -> torch.Tensor:
    x = moe.tokens(call.order, seed=10 + rank)
    if case.one_sided:
        x.data[:, 0] = 1.0
    return x


def global_balance_of(case: Case, calls: list[Call]) -> list[dict[str, torch.Tensor]]:
    """One rank's results where the load is that of all micro-batches: told what the others chose."""
    made, found = one_rank(case, calls)
    slots = sum(values["slots"].sum(dim=0) for values in found)

    def summed(own: torch.Tensor, group: Any = None) -> None:
        own.copy_(slots)

    made.dp, original = object(), dist.all_reduce  # type: ignore[assignment]
    dist.all_reduce = summed  # type: ignore[assignment]
    try:
        again = []
        for rank, call in enumerate(calls):
            again.append(found[rank] | moe.gradients(made, inputs(case, call, rank), call))
            seen = made.take_statistics()
            assert seen is not None
            again[-1]["balance"] = seen.balance
    finally:
        dist.all_reduce = original
    return again


def compare(case: Case) -> tuple[dict[str, float], list[str]]:
    """Relative errors of what this rank computes, and which host reads there were."""
    parallel = ParallelConfig(tp=case.tp, sequence_parallel=case.sp, ep=case.ep, etp=case.etp)
    mesh = groups.initialize(parallel)
    tp, dp = mesh.tp, mesh.dp
    batches = case.batches[: dp.size()]
    tokens = sum(sum(counts) for counts, _ in batches)
    sp = (tp.rank(), tp.size()) if case.sp else None
    whole = [moe.call(*c, pads=p, documents=case.documents, step_tokens=tokens) for c, p in batches]
    call = moe.call(*batches[dp.rank()][0], pads=batches[dp.rank()][1], documents=case.documents, sp=sp,
                    step_tokens=tokens)  # fmt: skip
    reference, found = one_rank(case, whole)
    if case.spec.balance_over == "global_batch":
        found = global_balance_of(case, whole)
    build = moe.build(
        layout=Layout(tp, case.sp),
        experts=ExpertLayout(mesh.ep, mesh.etp, case.dispatch),
        kernels=case.kernels,
    )
    made = MoE(build, case.spec, dp=dp)
    with torch.no_grad():
        for (name, values), other in zip(made.named_parameters(), reference.parameters(), strict=True):
            values.copy_(shard(name, other, mesh))
    rows = of_rank(call.order, *sp) if sp else of_rank(call.order)
    mine = slice(rows.first, rows.first + rows.total)
    want = found[dp.rank()]
    x = inputs(case, whole[dp.rank()], dp.rank()).detach()[mine].requires_grad_()
    dy = torch.randn(want["output"].shape, generator=torch.Generator().manual_seed(2))[mine]
    torch.manual_seed(100 + dp.rank())
    with forbid_syncs() as reads:
        y = made(x, call)
        y.backward(dy)
    errors = {"output": relative_error(y, want["output"][mine]), "x": relative_error(x.grad, want["x"][mine])}
    seen = made.take_statistics()
    for name in ("slots", "dropped", "entropy", "balance", "z_loss"):
        value = getattr(seen, name).double().clone()
        if case.sp:
            dist.all_reduce(value, group=tp)
        errors[name] = relative_error(value, want[name])
    assert case.sp or torch.equal(torch.tensor(seen.tokens), want["tokens"])
    for name, values in made.named_parameters():
        gradient = values.grad.clone()
        if name.startswith("experts."):
            dist.all_reduce(gradient, group=mesh.expert_dp)
        else:
            dist.all_reduce(gradient, group=dp)
            if case.sp and not name.startswith("shared."):
                dist.all_reduce(gradient, group=tp)
        errors[name] = relative_error(gradient, shard(name, sum(values[name] for values in found), mesh))
    groups.destroy()
    return errors, reads


def compare_all(world: int) -> dict[str, tuple[dict[str, float], list[str]]]:
    torch.set_num_threads(1)
    return {name: compare(case) for name, case in CASES[world].items()}


@pytest.mark.parametrize("world", CASES)
def test_any_ranks_equal_one(world: int) -> None:
    """Also: the all-to-all reads one small copy per forward, nothing else reads anything."""
    for rank, results in enumerate(run_dist(compare_all, world=world, args=(world,))):
        for name, (errors, reads) in results.items():
            wrong = {what: error for what, error in errors.items() if not error < PARITY_FP32}
            assert not wrong, (name, rank, wrong)
            assert reads == ["unimega.backend.base.HostCopy.read"] * CASES[world][name].all_to_all, (name, rank)


def make(mesh: Groups, spec: ExpertSpec, dispatch: Any = "alltoall") -> MoE:
    """Over ep, with this rank's part of the weights that ``moe.make`` draws."""
    build = moe.build(layout=Layout(mesh.tp, False), experts=ExpertLayout(mesh.ep, mesh.etp, dispatch))
    made = MoE(build, spec)
    with torch.no_grad():
        for (name, values), other in zip(made.named_parameters(), moe.make(spec).parameters(), strict=True):
            values.copy_(shard(name, other, mesh))
    return made


def order_of_events() -> list[str]:
    """What happens in forward and backward of a layer with a shared FFN over ep."""
    torch.set_num_threads(1)
    mesh = groups.initialize(ParallelConfig(ep=2))
    made = make(mesh, FULL)
    events: list[str] = []
    start, wait = Travel.start, Travel.wait

    def started(self: Travel, *args: Any) -> Any:
        events.append("start")
        return start(self, *args)

    def waited(self: Travel) -> None:
        events.append("wait")
        wait(self)

    Travel.start, Travel.wait = started, waited  # type: ignore[method-assign]
    assert made.shared is not None
    made.shared.register_forward_hook(lambda *_: events.append("shared"))
    made.experts.register_forward_hook(lambda *_: events.append("experts"))
    made.experts.down.weight.register_hook(lambda _: events.append("experts"))
    made.shared.gate_up.weight.register_hook(lambda _: events.append("shared"))
    call = moe.call(20, 20)
    y = made(moe.tokens(call.order), call)
    events.append("backward")
    y.sum().backward()
    groups.destroy()
    return events


def test_the_shared_ffn_runs_while_rows_travel() -> None:
    forward = ["start", "shared", "wait", "experts", "start", "wait"]
    for events in run_dist(order_of_events, world=2):
        assert events == [*forward, "backward", "start", "wait", "experts", "start", "shared", "wait"]


def corners() -> dict[str, float]:
    """Errors of what is left: frozen parts, no gradients at all, 16 bits, a second run."""
    torch.set_num_threads(1)
    mesh = groups.initialize(ParallelConfig(ep=2))
    errors: dict[str, float] = {}
    call = moe.call(20, 20, pads=3)
    for dispatch in ("alltoall", "allgather"):
        one, made = moe.make(FULL), make(mesh, FULL, dispatch)
        x = moe.tokens(call.order)
        got = moe.gradients(made, x, call)
        again = moe.gradients(made, moe.tokens(call.order), call)
        for name, values in got.items():
            assert torch.equal(values, again[name]), name
        with torch.no_grad():
            assert torch.equal(made(x, call), got["output"])
        for layer in (one, made):
            layer.router.requires_grad_(False)
            layer.shared_gate.requires_grad_(False)
        with torch.no_grad():
            frozen = moe.tokens(call.order).detach()
        for layer in (one, made):
            layer.zero_grad()
            layer(frozen, call).square().sum().backward()
        for name in ("experts.gate_up.weight", "experts.down.weight"):
            whole = shard(name, one.get_parameter(name).grad, mesh) * 2  # both ranks have the same rows
            errors[f"{dispatch}, frozen, {name}"] = relative_error(made.get_parameter(name).grad, whole)
        one, made = moe.make(FULL).bfloat16(), make(mesh, FULL, dispatch).bfloat16()
        half = moe.tokens(call.order).detach().bfloat16()
        want, values = (
            moe.gradients(one, half.requires_grad_(), call),
            moe.gradients(made, half.clone().detach().requires_grad_(), call),
        )
        errors |= {
            f"{dispatch}, bf16, {name}": relative_error(values[name], want[name]) / 1e3 for name in ("output", "x")
        }
    groups.destroy()
    return errors


def test_frozen_parts_no_gradients_16_bits_and_a_second_run() -> None:
    for errors in run_dist(corners, world=2):
        assert len(errors) == 8 and max(errors.values()) < PARITY_FP32, errors
