"""A contiguous part of the stack, with the embedding if it is the first and the loss if it is the last."""

from functools import partial
from typing import Any

import torch
from torch import nn

from unimega.batch import Microbatch
from unimega.layers.block import Block
from unimega.layers.context import Build, Call
from unimega.layers.norm import Norm
from unimega.parallel.parameter import mark_tied
from unimega.parallel.pipeline import PipelineStage
from unimega.parallel.recompute import recompute
from unimega.parallel.vocabulary import Embedding, Head, Table


class Stage(PipelineStage):
    """What one (virtual) pipeline stage computes on a micro-batch. Parameter names carry global layer numbers.

    Args:
        blocks: its layers, in order; may be empty.
        recompute_blocks: keep only the state between blocks and run each again in backward.
    """

    def __init__(
        self,
        build: Build,
        config: Any,
        *,
        blocks: list[Block],
        is_first: bool,
        is_last: bool,
        virtual: int | None,
        recompute_blocks: bool,
    ) -> None:
        spec, layout = build.spec, build.layout
        super().__init__(config, is_first=is_first, is_last=is_last, virtual=virtual, tied=spec.tied)
        self.spec, self.recompute_blocks = spec, recompute_blocks
        rows = spec.vocabulary.rows
        if is_first:
            self.embedding = Embedding(rows, spec.width, layout=layout)
        self.layers = nn.ModuleDict({str(block.index): block for block in blocks})
        if is_last:
            self.final_norm = Norm(build, split=False)
            if not (is_first and spec.tied):
                self.head = Table(rows, spec.width, layout=layout)
            self.loss = Head(layout=layout, rows=rows, device=build.device, kernels=build.kernels)
        if spec.tied:
            self._mark_tied(is_first, is_last)
        half = torch.arange(0, spec.head_width, 2, dtype=torch.float32) / spec.head_width
        self.inverse_frequency = (1.0 / spec.rope_theta**half).to(build.device)

    def _mark_tied(self, is_first: bool, is_last: bool) -> None:
        """On the first stage and on the last: unmarked, the two copies of the table drift apart in silence."""
        if is_first:
            mark_tied(self.embedding.weight, duplicate=False)
        elif is_last:
            mark_tied(self.head.weight, duplicate=True)

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """The tied table: the embedding's on the first stage, the head's copy on the last."""
        if self.pre_process:
            return self.embedding.weight
        return self.head.weight if self.post_process else None

    def hidden(self, batch: Microbatch) -> torch.Tensor:
        """[t, D]: the state after this stage's last layer."""
        x_tD = self.embedding(batch.tokens) if self.pre_process else self.received()
        angle = batch.order.positions.float().unsqueeze(1) * self.inverse_frequency
        call = Call(order=batch.order, cos=angle.cos(), sin=angle.sin(), step_tokens=batch.step_tokens)
        saved: torch.Tensor | None = None
        for block in self.layers.values():
            if self.spec.skip and block.index == self.spec.skip[1]:
                assert saved is not None
                first = batch.order.local_counts[0]
                x_tD = torch.cat([x_tD[:first], x_tD[first:] + saved[first:]])
            x_tD = recompute(partial(block, call=call), x_tD) if self.recompute_blocks else block(x_tD, call)
            if self.spec.skip and block.index == self.spec.skip[0]:
                saved = x_tD
        return x_tD

    def forward(self, batch: Microbatch, *, logits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a micro-batch.

        Returns:
            On the last stage (weighted sum of cross-entropies, cross-entropy of each of ``batch.loss_rows``), or with
            ``logits`` (the sum, fp32 logits [T, rows of the file]); elsewhere (state to send, None).
        """
        x_tD = self.hidden(batch)
        if not self.post_process:
            return self.to_send(x_tD), None
        x_tD = self.final_norm(x_tD, batch.order.local_counts)
        weight = self.head() if hasattr(self, "head") else self.embedding.weight
        loss, cross_entropy = self.loss(x_tD, weight, batch)
        if logits:
            with torch.no_grad():
                return loss, self.loss.logits(x_tD, weight)
        return loss, cross_entropy
