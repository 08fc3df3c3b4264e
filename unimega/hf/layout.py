"""How a family of Hugging Face folders spells its tensors. No torch, so that mistakes are answered at once."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a family of folders spells the copies of a weight that belong to vision."""

    family: Literal["qwen", "mixtral", "unimoe", "x", "moe", "mot"]
    """``qwen``, ``mixtral``, ``unimoe``: no copies; each spells experts in its own way. Original Uni-X: ``x`` twin
    layers, ``moe`` FFN copies, ``mot`` attention copies too."""
    encode: int = 0
    """``x``: layers below this have twins in ``vision_encode_layers``, later ones in ``vision_decode_layers``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the checkpoint."""
        return asdict(self)
