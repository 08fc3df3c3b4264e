"""Embedding and head cut over tp by rows of the vocabulary.

megatron-core's own assign through boolean masks, which nothing here may do, and read a global group. Rows that make the
vocabulary divisible by tp exist in memory only: zero in the embedding, -inf in the head, never in a checkpoint.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn

from unimega.batch import Microbatch
from unimega.kernels.registry import resolve
from unimega.parallel.linear import Layout
from unimega.parallel.parameter import vocabulary_parameter


def rows_in_memory(rows: int, tp: int) -> int:
    """Rows of the vocabulary with those added to divide by tp."""
    return -(-rows // tp) * tp


class _Rows(nn.Module):
    """This rank's rows of the vocabulary, a direct parameter of the module that is called (see ``linear.Weights``)."""

    def __init__(self, rows: int, width: int, *, layout: Layout) -> None:
        super().__init__()
        padded = rows_in_memory(rows, layout.size)
        self.weight = vocabulary_parameter(rows, width, rows_in_memory=padded, tp=layout.size)
        self.layout, self.rows = layout, rows
        self.local_rows = padded // layout.size
        self.start = layout.tp.rank() * self.local_rows


class Table(_Rows):
    """The table of a head: handed out whole, as ``Head`` multiplies with it or with the embedding's."""

    def forward(self) -> torch.Tensor:
        """The weight, [rows_in_memory / tp, D]."""
        return self.weight


class Embedding(_Rows):
    """``x_TD = weight[tokens]``, written in modality order: the rows of a modality are one slice."""

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Look tokens up.

        Returns:
            [T / tp, D] under sequence parallelism, else [T, D]. With tp > 1 one reduce-scatter or all-reduce of
            T*D*itemsize bytes in forward; under sequence parallelism one all-gather in backward.
        """
        if self.layout.size == 1:
            return F.embedding(tokens_T, self.weight)
        local = tokens_T - self.start
        here = (local >= 0) & (local < self.local_rows)
        x = F.embedding(local.clamp(0, self.local_rows - 1), self.weight) * here.unsqueeze(1).to(self.weight.dtype)
        if self.layout.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.layout.tp)
        return reduce_from_tensor_model_parallel_region(x, group=self.layout.tp)


class Head(nn.Module):
    """Loss or logits from the final state and a table that is the head's own or the embedding's."""

    def __init__(self, *, layout: Layout, rows: int, device: torch.device, kernels: dict[str, str]) -> None:
        super().__init__()
        self.layout, self.rows = layout, rows
        self.start = layout.tp.rank() * (rows_in_memory(rows, layout.size) // layout.size)
        self.cross_entropy = resolve(
            "linear_cross_entropy", device=device, impl=kernels.get("linear_cross_entropy", "auto")
        )

    def forward(
        self, x_tD: torch.Tensor, weight_vD: torch.Tensor, batch: Microbatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of weighted cross-entropies, and the cross-entropy of each of ``batch.loss_rows`` (fp32, detached).

        Only rows that carry loss are multiplied with the vocabulary. Collectives over tp: an all-gather of x under
        sequence parallelism, the op's statistics (12 bytes a row), in backward one reduce-scatter or all-reduce of dx.
        """
        x_TD = self._whole(x_tD)
        rows = batch.loss_rows
        if len(rows) < len(batch.tokens):
            x_TD = x_TD.index_select(0, rows)
        return self.cross_entropy(
            x_TD,
            weight_vD,
            batch.labels.index_select(0, rows),
            batch.loss_weights.index_select(0, rows),
            group=self.layout.tp if self.layout.size > 1 else None,
            vocab_start=self.start,
            vocab_rows=self.rows,
        )

    def logits(self, x_tD: torch.Tensor, weight_vD: torch.Tensor) -> torch.Tensor:
        """fp32 logits [T, rows of the file], gathered over tp: T*V*4 bytes. For tools, not for training."""
        local = F.linear(self._whole(x_tD), weight_vD).float()
        if self.layout.size > 1:
            rows, columns = local.shape
            whole = local.new_empty(self.layout.size * rows, columns)
            torch.distributed.all_gather_into_tensor(whole, local.contiguous(), group=self.layout.tp)
            local = whole.view(-1, rows, columns).transpose(0, 1).reshape(rows, -1)
        return local[:, : self.rows]

    def _whole(self, x_tD: torch.Tensor) -> torch.Tensor:
        if self.layout.size == 1:
            return x_tD
        if self.layout.sequence_parallel:
            return gather_from_sequence_parallel_region(x_tD, group=self.layout.tp)
        return copy_to_tensor_model_parallel_region(x_tD, group=self.layout.tp)
