"""Routed experts as the FFN of a layer: how many, how a token finds its own, and what keeps their loads even."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """The routed FFN of one layer."""

    number: int
    """Experts, E."""
    width: int
    """FFN width of each, F."""
    top_k: int
    """Experts of each token, K."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of logits: over all experts together, or of each alone (DeepSeek-V3)."""
    normalize: bool = True
    """Divide the weights of a token's experts by their sum."""
    scale: float = 1.0
    """Then multiply them with this."""
    groups: int = 1
    """Runs of experts; a token's come from its ``group_topk`` best ones."""
    group_topk: int = 1
    sets: tuple[tuple[int, ...], ...] = ()
    """Experts that each modality may use, in the order of modalities; empty: all of them for all."""
    capacity: tuple[float, ...] = ()
    """Per modality, the slots an expert takes of it, in multiples of its fair share; the lightest are dropped.

    Empty: nothing is dropped.
    """
    noise: bool = False
    """In training choose the second of two experts by Gumbel noise, as Uni-MoE does; weights stay without it."""
    bias_rate: float = 0.0
    """Step of the bias that balances loads without a loss, added to scores for the choice alone; 0: no bias."""
    balance: float = 0.0
    """Weight of the balance loss."""
    balance_over: Literal["micro_batch", "document", "global_batch"] = "micro_batch"
    """Whose load is to be even: a micro-batch's, each document's, that of a micro-batch of all dp ranks together."""
    balance_counts: Literal["all", "first"] = "all"
    """Which choices make the load: all of a token, or its first alone (Uni-MoE)."""
    z_loss: float = 0.0
    """Weight of the mean of logsumexp(logits)^2."""
    shared_width: int = 0
    """Width of the FFN that every token passes beside its experts; 0: none."""
    shared_gate: bool = False
    """Multiply what the shared FFN gives with the sigmoid of a learned projection of the token."""

    def __post_init__(self) -> None:
        number = self.number
        if number % self.groups or not 1 <= self.group_topk <= self.groups:
            raise ValueError(f"groups={self.groups}, group_topk={self.group_topk} do not fit {number} experts")
        if not 1 <= self.top_k <= number // self.groups * self.group_topk:
            raise ValueError(f"top_k={self.top_k} experts cannot be chosen of {number} in the open groups")
        for experts in self.sets:
            if len(set(experts)) != len(experts) or not all(0 <= e < number for e in experts):
                raise ValueError(f"sets has {experts}, not different numbers from 0 to {number - 1}")
            if len(experts) < self.top_k:
                raise ValueError(f"sets has {experts}, fewer than top_k={self.top_k} experts")
        if self.sets and self.groups > 1:
            raise ValueError("sets and groups both limit the choice: a token might find fewer than top_k experts")
        if not all(factor > 0 for factor in self.capacity):
            raise ValueError(f"capacity={self.capacity} is not positive")
        if self.noise and (self.top_k, self.score, self.normalize, self.scale, self.groups, self.bias_rate) != (
            (2, "softmax", True, 1.0, 1, 0.0)
        ):
            raise ValueError("noise is for two experts, softmax, normalised weights, no scale, groups or bias")
        if self.shared_gate and not self.shared_width:
            raise ValueError("shared_gate needs a shared_width")

    @property
    def sizes(self) -> dict[str, int]:
        """What implementations of ops may have limits on, by key of ``[model]``."""
        return {"experts": self.number, "top_k": self.top_k}

    def of_inference(self) -> "ExpertSpec":
        """What is left where nothing is trained: no losses, no noise, no room that runs out; a bias stays a bias."""
        return replace(
            self,
            capacity=(),
            noise=False,
            bias_rate=float(self.bias_rate > 0),
            balance=0.0,
            balance_over="micro_batch",
            balance_counts="all",
            z_loss=0.0,
        )

    def open_to(self, modality: int) -> int:
        """How many experts a modality, by number, may use."""
        return len(self.sets[modality]) if self.sets else self.number
