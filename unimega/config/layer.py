"""The one idea: a layer is a choice along five axes, and an architecture is a list of such choices."""

from dataclasses import dataclass
from typing import Literal

from unimega.config.experts import ExpertSpec

Sharing = Literal["shared", "split"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One transformer layer. ``split``: one weight per modality; ``shared``: one for all."""

    attention: Sharing = "shared"
    """q, k, v projections, their biases and q/k norms."""
    output_projection: Sharing = "shared"
    scope: Literal["document", "own"] = "document"
    """Whom a token sees: its document, or the tokens of its own modality in it."""
    ffn: tuple[int, ...] = ()
    """FFN width of each modality, in their order; empty: no split FFN. A width may be 0 beside a shared one."""
    shared_ffn: int = 0
    """Width of the FFN that every token passes; 0: none."""
    experts: ExpertSpec | None = None
    """Routed experts in place of the two above; their shared FFN is in their own description."""
    norms: Sharing = "shared"
    """The two norms of the layer."""
    unused_output: bool = False
    """Carry a frozen output projection per further modality that no token passes (the original MoT has one)."""

    def __post_init__(self) -> None:
        if self.experts is not None:
            if self.ffn or self.shared_ffn:
                raise ValueError(f"experts beside another FFN: ffn={self.ffn}, shared_ffn={self.shared_ffn}")
            return
        if not self.shared_ffn and not (self.ffn and all(self.ffn)):
            raise ValueError(f"a modality is without an FFN: ffn={self.ffn}, shared_ffn={self.shared_ffn}")


def dense(num_layers: int, *, ffn: int) -> tuple[LayerSpec, ...]:
    """Everything shared: a plain decoder."""
    return (LayerSpec(shared_ffn=ffn),) * num_layers


def unix(num_layers: int, *, ffn: tuple[int, ...], encode: int, decode: int) -> tuple[LayerSpec, ...]:
    """Uni-X: ``encode`` split layers at the bottom and ``decode`` at the top, shared ones between."""
    end = LayerSpec(attention="split", output_projection="split", scope="own", ffn=ffn, norms="split")
    middle = LayerSpec(shared_ffn=ffn[0])
    return (end,) * encode + (middle,) * (num_layers - encode - decode) + (end,) * decode


def share(
    num_layers: int, *, ffn: tuple[int, ...], middle: tuple[int, ...], shared: int, encode: int, decode: int
) -> tuple[LayerSpec, ...]:
    """Uni-X ends; in the middle each token passes its modality's FFN (``middle``) and one for all (``shared``)."""
    ends = unix(num_layers, ffn=ffn, encode=encode, decode=decode)
    between = LayerSpec(ffn=middle, shared_ffn=shared)
    return ends[:encode] + (between,) * (num_layers - encode - decode) + ends[num_layers - decode :]


def moe_hard(num_layers: int, *, ffn: tuple[int, ...], every: int) -> tuple[LayerSpec, ...]:
    """Every ``every``-th layer has an FFN per modality; the rest is shared."""
    split = LayerSpec(ffn=ffn)
    return tuple(split if (i + 1) % every == 0 else LayerSpec(shared_ffn=ffn[0]) for i in range(num_layers))


def moe(sparse: tuple[bool, ...], *, experts: ExpertSpec, ffn: int) -> tuple[LayerSpec, ...]:
    """Routed experts in the layers that are ``sparse``, one FFN of width ``ffn`` in the others."""
    return tuple(LayerSpec(experts=experts) if one else LayerSpec(shared_ffn=ffn) for one in sparse)


def mot(
    num_layers: int, *, ffn: tuple[int, ...], output_projection: Sharing, unused_output: bool = False
) -> tuple[LayerSpec, ...]:
    """Mixture of transformers: attention weights and FFN per modality, attention over the whole document."""
    layer = LayerSpec(attention="split", output_projection=output_projection, ffn=ffn, unused_output=unused_output)
    return (layer,) * num_layers
