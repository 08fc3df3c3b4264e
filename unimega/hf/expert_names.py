"""How families of folders spell routed experts: a tensor per expert there, one for all of them in a checkpoint."""

from dataclasses import dataclass

from unimega.config.experts import ExpertSpec


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """Names below ``model.layers.3.``; ``{}`` is the number of an expert."""

    router: str
    gate: str
    up: str
    down: str
    bias: str = ""
    shared: str = ""
    """What comes before ``gate_proj.weight`` of the shared FFN; empty: the family has none."""
    shared_gate: str = ""

    def missing(self, experts: ExpertSpec) -> str:
        """What of the experts has no name; empty: all have one."""
        if experts.shared_width and not self.shared:
            return "a shared expert"
        return "a bias of the router" if experts.bias_rate and not self.bias else ""


QWEN = Spelling(
    router="mlp.gate.weight",
    gate="mlp.experts.{}.gate_proj.weight",
    up="mlp.experts.{}.up_proj.weight",
    down="mlp.experts.{}.down_proj.weight",
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_expert.",
    shared_gate="mlp.shared_expert_gate.weight",
)
"""Qwen3-MoE; shared experts as in Qwen2-MoE, the bias as in DeepSeek-V3."""
_UNIMOE = "mlp.deepspeed_moe.experts.deepspeed_experts.{}."
SPELLINGS = {
    "qwen": QWEN,
    "mixtral": Spelling(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{}.w1.weight",
        up="block_sparse_moe.experts.{}.w3.weight",
        down="block_sparse_moe.experts.{}.w2.weight",
    ),
    "unimoe": Spelling(
        router="mlp.deepspeed_moe.gate.wg.weight",
        gate=f"{_UNIMOE}gate_proj.weight",
        up=f"{_UNIMOE}up_proj.weight",
        down=f"{_UNIMOE}down_proj.weight",
    ),
}
"""By family of ``Layout``."""
FUSED_GATE_UP, FUSED_DOWN, FUSED_ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
"""As transformers 5 holds them, and writes them with ``save_original_format=False``."""
