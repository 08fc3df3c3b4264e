"""What the routers of a model said of every token, brought to rank 0, and transformers' balance loss of it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from unimega.batch import Microbatch
from unimega.hf.inputs import Inputs
from unimega.moe.layer import MoE
from unimega.moe.router import Router, Routing
from unimega.moe.transfer import gathered
from unimega.training.engine import Engine


@dataclass(frozen=True)
class Record:
    """Logits of the sparse layers of this rank: those of every micro-batch, in their order."""

    layers: dict[int, MoE]
    logits: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    """By number of the layer: [T, E] fp32 each, in modality order."""


@contextmanager
def recorded(engine: Engine) -> Iterator[Record]:
    """Write down what routers say of the micro-batches that run inside. All tp ranks must run them."""
    blocks = [block for stage in engine.stages for block in stage.layers.values()]
    record = Record({int(block.index): block.ffn for block in blocks if isinstance(block.ffn, MoE)})  # type: ignore[arg-type]

    def listen(index: int, layer: MoE) -> Any:
        def note(router: Router, inputs: tuple[Any, ...], routing: Routing) -> None:
            rows = routing.logits.detach()
            record.logits[index].append(rows if layer.tp is None else gathered(rows, layer.tp))

        return layer.router.register_forward_hook(note)

    hooks = [listen(index, layer) for index, layer in record.layers.items()]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def gather(engine: Engine, record: Record, batches: Sequence[Microbatch], inputs: Inputs) -> np.ndarray | None:
    """[sparse layers, B T, E] in input order on rank 0, 0 on pads; None elsewhere. Collective over the world.

    Every row of the batch travels alone, layer by layer: T E 4 bytes each.
    """
    groups, rank = engine.groups, dist.get_rank()
    number, length = inputs.ids.shape
    places: list[Any] = [None] * dist.get_world_size()
    mine = sorted(record.layers) if groups.tp.rank() == 0 else []
    dist.all_gather_object(places, (groups.dp.rank(), mine))
    owners = {(dp_rank, layer): owner for owner, (dp_rank, layers) in enumerate(places) for layer in layers}
    sparse = [(i, layer.experts.number) for i, layer in enumerate(engine.spec.layers) if layer.experts is not None]
    out = np.zeros((len(sparse), number, length, sparse[0][1]), np.float32) if rank == 0 else None
    for row in range(number):
        at, dp_rank = divmod(row, groups.dp.size())
        for place, (layer, experts) in enumerate(sparse):
            owner = owners[dp_rank, layer]
            if rank == owner:
                logits = record.logits[layer][at][batches[at].order.inverse.long()][:length].contiguous()
                if owner != 0:
                    dist.send(logits, 0)
            elif rank == 0:
                logits = torch.empty(length, experts, device=engine.backend.device)
                dist.recv(logits, owner)
            if out is not None:
                out[place, row] = logits.cpu().numpy()
    if out is None:
        return None
    out[:, inputs.documents == 0] = 0.0
    return out.reshape(len(sparse), number * length, -1)


def balance_loss(logits: np.ndarray, is_token: np.ndarray, *, top_k: int) -> np.ndarray:
    """The balance loss of transformers: over the tokens of all layers together, top_k when loads are even. fp32 [].

    Args:
        logits: [sparse layers, n, E] fp32.
        is_token: bool [n]; false: a pad.
        top_k: experts of a token.
    """
    scores = torch.from_numpy(logits[:, is_token]).flatten(0, 1).softmax(dim=1)
    experts = scores.shape[1]
    chosen = scores.topk(top_k, dim=1).indices.flatten().bincount(minlength=experts).float()
    loss = experts * (chosen / len(scores) * scores.mean(dim=0)).sum()
    return loss.numpy()
