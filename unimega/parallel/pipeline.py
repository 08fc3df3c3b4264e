"""What megatron-core's schedules need of a stage, and the call of a schedule."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import nn


class PipelineStage(nn.Module):
    """The interface between one (virtual) stage of a model and megatron-core's schedules, DDP and optimizer.

    Args:
        config: megatron-core's, shared by all stages of the rank.
        is_first, is_last: whether it holds the embedding, the head.
        virtual: number of this stage among those of the rank; None without interleaving.
        tied: the head is the embedding's table.
    """

    def __init__(
        self, config: TransformerConfig, *, is_first: bool, is_last: bool, virtual: int | None, tied: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.pre_process, self.post_process, self.vp_stage = is_first, is_last, virtual
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = tied
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, received: Sequence[torch.Tensor | None]) -> None:
        """Called by the schedule: [rows, 1, D] from the stage before, None on the first."""
        self._received = received[0]

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """The tied table on the first and the last stage, None between; megatron-core sums its gradients over both."""
        raise NotImplementedError

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names of patterns, checkpoints and initial values: a tied head is ``embedding.weight``."""
        for name, values in self.named_parameters():
            tied = name == "head.weight" and self.share_embeddings_and_output_weights
            yield ("embedding.weight" if tied else name), values

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a checkpoint holds: the weights, and the buffers that are no constants (biases that balance loads)."""
        yield from self.weights()
        kept = self.state_dict(keep_vars=True).keys()
        yield from ((name, values) for name, values in self.named_buffers() if name in kept)

    def received(self) -> torch.Tensor:
        """The state from the stage before, [rows, D]."""
        assert self._received is not None
        return self._received.squeeze(1)

    def to_send(self, x_tD: torch.Tensor) -> torch.Tensor:
        """The state to send, [rows, 1, D]: no view, as it may be freed; it has a gradient even if all is frozen."""
        return make_viewless_tensor(x_tD.unsqueeze(1), requires_grad=True, keep_graph=True)


def run_schedule(
    stages: Sequence[nn.Module],
    microbatches: Sequence[Any],
    forward: Callable[[Any, Any], tuple[torch.Tensor, dict[str, Any]]],
    *,
    total_rows: int,
    width: int,
    backward: bool,
    whole_gradients: bool = False,
) -> list[dict[str, Any]]:
    """Run every micro-batch through the pipeline: 1F1B, interleaved 1F1B, or no pipeline, as the groups say.

    Args:
        stages: this rank's, DDP-wrapped or not.
        microbatches: the same, in the same order, on every rank of a pipeline.
        forward: (micro-batch, stage) -> (state to send, {}) or, on the last stage, (summed loss, what to report).
        total_rows: T, the same for all micro-batches.
        width: D.
        backward: False: forward only.
        whole_gradients: all-reduce gradients in place of reduce-scatter, so that every dp rank holds them whole.

    Returns:
        The reports of the last stage, one per micro-batch; empty elsewhere. P2P: T*D*itemsize bytes (/ tp under
        sequence parallelism) per border and direction.
    """

    def step(iterator: Iterator[Any], stage: nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        output, report = forward(next(iterator), stage)

        def loss(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            return value, torch.zeros((), dtype=torch.int32, device=value.device), report

        return output, loss

    interleaved = len(stages) > 1
    iterators = [iter(microbatches) for _ in stages]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(stages) if interleaved else stages[0],
        num_microbatches=len(microbatches),
        seq_length=total_rows,
        micro_batch_size=1,
        forward_only=not backward,
        force_all_reduce=whole_gradients,
    )
