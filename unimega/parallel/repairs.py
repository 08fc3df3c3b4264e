"""What megatron-core 0.16 lacks on any device without TransformerEngine and Apex, put right as its modules load.

Each repair asks the module itself whether it is needed: with TransformerEngine installed and a GPU none is applied, and
the optimizer is TransformerEngine's FusedAdam, or Apex's where only that is there (megatron-core's own order).
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from unimega import backend
from unimega.backend.import_hook import after_import
from unimega.kernels.adamw import AdamW


@dataclass(frozen=True, slots=True)
class Repair:
    """One fault of megatron-core and the change that ends it."""

    name: str
    module: str
    needed: Callable[[Any], bool]
    apply: Callable[[Any], None]


def _cannot_run(adam: type) -> bool:
    """Whether megatron-core chose TransformerEngine's or Apex's FusedAdam, which is installed here but not for this."""
    return adam is not AdamW and not backend.current().runs_apex


def _plug_adamw(optimizer: Any) -> None:
    optimizer.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False


def _expect_group_steps(distrib_optimizer: Any) -> None:
    # Apex's AdamW keeps its step in the group, so megatron's code for it is the code for ours.
    distrib_optimizer.Adam = AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = False
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _define_te_general_gemm(moe_utils: Any) -> None:
    moe_utils.te_general_gemm = None


def _read_fp8_as_a_flag(random: Any) -> None:
    cls = random.CheckpointWithoutOutput
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, fp8: Any = False) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)  # the original takes ``fp8 is not None``, true for its own default

    cls.__init__ = init


REPAIRS: tuple[Repair, ...] = (
    Repair(
        "optimizer class",
        "megatron.core.optimizer",
        lambda module: module.USING_PYTORCH_OPTIMIZER or _cannot_run(module.Adam),
        _plug_adamw,
    ),
    Repair(
        "optimizer state",
        "megatron.core.optimizer.distrib_optimizer",
        lambda module: not module.HAVE_APEX_OR_TE or _cannot_run(module.Adam),
        _expect_group_steps,
    ),
    Repair(
        "te_general_gemm",
        "megatron.core.transformer.moe.moe_utils",
        lambda module: not hasattr(module, "te_general_gemm"),
        _define_te_general_gemm,
    ),
    Repair(
        "CheckpointWithoutOutput.fp8",
        "megatron.core.tensor_parallel.random",
        lambda module: not module.HAVE_TE,
        _read_fp8_as_a_flag,
    ),
)

NOISE = (
    ("Transformer Engine and Apex are not installed", r"megatron\."),  # the repairs replace what it falls back to
    ("Apex is not installed", r"megatron\."),
    ("full scope is deprecated", r"megatron\."),  # of CUDA graphs, which we do not ask for
    ("The .grad attribute of a Tensor that is not a leaf", r"megatron\."),  # its own optimizer's parameter shards
    ("`load_state_dict` is deprecated", r"megatron\."),
    ("`torch.distributed.", r"torch\.distributed"),  # all_gather_into_tensor got another name in torch 2.13
)
"""Warnings, one per rank and call, that no user can act on: (message, module that is blamed)."""

_applied: list[str] = []


def applied() -> tuple[str, ...]:
    """Names of the repairs that were needed so far, in the order in which their modules were imported."""
    return tuple(_applied)


@functools.cache
def install() -> tuple[str, ...]:
    """Have every repair wait for the import of its module. Returns their names; a second call does nothing."""
    for message, module in NOISE:
        warnings.filterwarnings("ignore", message, module=module)
    for repair in REPAIRS:
        after_import(repair.module, functools.partial(_repair, repair=repair))
    return tuple(repair.name for repair in REPAIRS)


def _repair(module: ModuleType, *, repair: Repair) -> None:
    if repair.needed(module):
        repair.apply(module)
        _applied.append(repair.name)
