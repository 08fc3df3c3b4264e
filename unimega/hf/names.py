"""Which tensor of a Hugging Face folder is which key of a checkpoint, as data that is read in both directions.

A ``Row`` is one checkpoint key and the tensors it is made of: one, copied as it is; q, k and v, whose rows a
checkpoint groups per KV head (``[q.., k, v] x head_width``); or one of each expert, stacked. The same table takes
weights in and weights or gradients out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.model import ModelSpec
from unimega.errors import CheckpointError
from unimega.hf.expert_names import SPELLINGS
from unimega.hf.layout import Layout
from unimega.hf.read_unimoe import OUTSIDE

Shape = tuple[int, ...]

_TWO_MODALITIES = 2
_HEAD, _FREQUENCIES = "lm_head.weight", ".rotary_emb.inv_freq"
_SPLITS: dict[str, list[set[str]]] = {
    "qwen": [set()],
    "mixtral": [set()],
    "unimoe": [set()],
    "x": [set(), {"ffn"}, {"attention", "output_projection", "norms", "ffn"}],
    "moe": [set(), {"ffn"}],
    "mot": [{"attention", "ffn"}, {"attention", "output_projection", "ffn"}],
}
"""What a layer may be split in, by family: copies of anything else have no names there."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint key and the tensors that it is made of."""

    key: str
    names: tuple[str, ...]
    """One tensor, q, k and v, or one per expert."""
    shapes: tuple[Shape, ...]
    kv_heads: int = 0
    """Above 0: the number of groups ``[q.., k, v]`` that q, k and v are cut into, row-wise."""
    stacked: bool = False
    """One tensor per expert; the checkpoint has them all in one."""
    statistic: bool = False
    """Moved between steps by what was counted: fp32, without a gradient."""
    used: bool = True
    """False: the original carries the tensor and never uses it, so it has no gradient."""

    @property
    def key_shape(self) -> Shape:
        """Shape of the tensor in the checkpoint."""
        if self.stacked:
            return (len(self.shapes), *self.shapes[0])
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The tensors of the folder, in the order of ``names``, as the one of the checkpoint."""
        if self.stacked:
            return torch.stack(tensors)
        if not self.kv_heads:
            return tensors[0]
        grouped = [tensor.reshape(self.kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Inverse of ``join``."""
        if self.stacked:
            return list(tensor.unbind())
        if not self.kv_heads:
            return [tensor]
        sizes = [shape[0] // self.kv_heads for shape in self.shapes]
        grouped = tensor.reshape(self.kv_heads, -1, *tensor.shape[1:])
        return [part.flatten(0, 1).contiguous() for part in torch.split(grouped, sizes, dim=1)]


@dataclass(frozen=True)
class Table:
    """Every tensor of a folder and every key of a checkpoint of one model."""

    rows: tuple[Row, ...]
    tied: bool
    outside: tuple[str, ...] = ()
    """How names of tensors begin that are no part of this model."""

    def check_folder(self, tensors: Mapping[str, torch.Tensor], *, shapes: Mapping[str, Shape]) -> None:
        """Compare a folder with the table.

        Args:
            tensors: by name in the folder; read are at most a head and the embedding that it is tied to.
            shapes: of all of them.

        Raises:
            CheckpointError: a tensor is missing, of another shape, not of this model, or a head at odds with the tie.
        """
        self.check(shapes)
        for name in self.dropped(shapes):
            if name == _HEAD and not torch.equal(tensors[name], tensors["model.embed_tokens.weight"]):
                raise CheckpointError(
                    f"tensor {name!r} differs from 'model.embed_tokens.weight', but config.json has "
                    "tie_word_embeddings=true. One of the two is wrong: set tie_word_embeddings to false to keep both, "
                    "or delete the tensor."
                )

    def to_hf(self, tensors: Mapping[str, torch.Tensor], *, gradients: bool = False) -> dict[str, torch.Tensor]:
        """Checkpoint keys as tensors under the names of the folder.

        Args:
            tensors: whole tensors by checkpoint key.
            gradients: they are gradients: what the original never uses has none, here neither.

        Raises:
            CheckpointError: a key is missing, of another shape, or not of this model.
        """
        rows = [row for row in self.rows if not gradients or (row.used and not row.statistic)]
        _check_keys(rows, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        out: dict[str, torch.Tensor] = {}
        for row in rows:
            out.update(zip(row.names, row.split(tensors[row.key]), strict=True))
        return out

    def check_keys(self, shapes: Mapping[str, Shape]) -> None:
        """Compare the keys and shapes of a checkpoint with the table; ``to_hf`` on metadata alone.

        Raises:
            CheckpointError: the first key that is missing, not of this model, or of another shape.
        """
        _check_keys(self.rows, shapes)

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Compare the names and shapes of a folder with the table; ``check_folder`` on headers alone.

        Raises:
            CheckpointError: the first tensor that is missing, not used, or of another shape.
        """
        want = {name: shape for row in self.rows for name, shape in zip(row.names, row.shapes, strict=True)}
        missing = [name for name in want if name not in shapes]
        if missing:
            raise CheckpointError(
                f"tensor {missing[0]!r}{_more(missing)} is missing. config.json describes a model that has it: "
                "the folder is incomplete or its config.json is of another model."
            )
        unused = sorted(set(shapes) - set(want) - set(self.dropped(shapes)))
        if unused:
            raise CheckpointError(
                f"tensor {unused[0]!r}{_more(unused)} would not be used. config.json describes a model without it: "
                "check 'architectures' and the sizes there."
            )
        for name, shape in want.items():
            if tuple(shapes[name]) != shape:
                raise CheckpointError(
                    f"tensor {name!r} has shape {list(shapes[name])}, but config.json makes it {list(shape)}. "
                    "Correct the sizes in config.json or take the weights that belong to it."
                )

    def dropped(self, names: Mapping[str, Any]) -> tuple[str, ...]:
        """Tensors of the folder that the checkpoint does not need: see ``why_dropped``."""
        return tuple(name for name in names if self.why_dropped(name))

    def why_dropped(self, name: str) -> str:
        """Why a tensor of the folder is not needed; empty: it is."""
        if name == _HEAD and self.tied:
            return "the head is the embedding"
        if name.endswith(_FREQUENCIES):
            return "worked out from rope_theta"
        return "no part of the language model" if name.startswith(self.outside or "\0") else ""


def table(spec: ModelSpec, layout: Layout) -> Table:
    """The names of a model in a layout.

    Raises:
        CheckpointError: the layout has no spelling for one of the model's layers.
    """
    if layout.family in ("x", "moe", "mot") and len(spec.modalities) > _TWO_MODALITIES:
        raise CheckpointError(
            f"layout {layout.family!r} has names for {_TWO_MODALITIES} modalities, the model has "
            f"{len(spec.modalities)}: {', '.join(spec.modalities)}."
        )
    rows = [_copy("embedding.weight", "model.embed_tokens.weight", (spec.vocabulary.rows, spec.width))]
    twins = _twins(spec, layout)
    for index, layer in enumerate(spec.layers):
        rows += _layer_rows(spec, _Names(layout, index, spec.modalities, twins.get(index, "")), layer)
    rows.append(_copy("final_norm.weight", "model.norm.weight", (spec.width,)))
    if not spec.tied:
        rows.append(_copy("head.weight", "lm_head.weight", (spec.vocabulary.rows, spec.width)))
    return Table(tuple(rows), spec.tied, OUTSIDE if layout.family == "unimoe" else ())


@dataclass(frozen=True)
class _Names:
    """The spelling of one layer's tensors."""

    layout: Layout
    index: int
    modalities: tuple[str, ...]
    twin: str
    """The layer that holds all copies, such as ``vision_encode_layers.0``; empty: copies differ by a prefix."""

    def copies(self, split: bool) -> Iterator[tuple[str, int]]:
        """(suffix of the checkpoint key, modality) of each copy of a weight."""
        return iter([(f"_{name}", number) for number, name in enumerate(self.modalities)] if split else [("", 0)])

    def name(self, part: str, leaf: str, modality: int = 0, *, prefix: str = "") -> str:
        """``model.layers.3.mlp.vis_gate_proj`` is part ``mlp``, leaf ``gate_proj``, modality 1 in layout ``moe``."""
        base = f"model.layers.{self.index}"
        if modality and self.twin:
            base = f"model.{self.twin}"
        elif modality:
            prefix = "vision_" if part == "mlp" and self.layout.family != "moe" else "vis_"
        return f"{base}.{part}.{prefix}{leaf}" if part else f"{base}.{leaf}"


def _twins(spec: ModelSpec, layout: Layout) -> dict[int, str]:
    """The twin of each wholly split layer: the first ``encode`` layers and the last ones, none between."""
    if len(spec.modalities) == 1:
        return {}
    split = [index for index, layer in enumerate(spec.layers) if layer.norms == "split"]
    encode, layers = layout.encode, len(spec.layers)
    decode = len(split) - encode
    if split != [*range(encode), *range(layers - decode, layers)]:
        raise CheckpointError(
            f"layers {split} of {layers} are split as a whole. Layout {layout.family!r} with encode={encode} "
            "has names only for such layers at the bottom and at the top."
        )
    names = [f"vision_encode_layers.{i}" for i in range(encode)] + [f"vision_decode_layers.{i}" for i in range(decode)]
    return dict(zip(split, names, strict=True))


def _layer_rows(spec: ModelSpec, names: _Names, layer: LayerSpec) -> list[Row]:
    """All rows of one layer."""
    _check_spelling(names, layer)
    key, width = f"layers.{names.index}", spec.width
    rows = []
    for suffix, m in names.copies(layer.norms == "split"):
        for part, leaf in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            rows.append(_copy(f"{key}.{part}.weight{suffix}", names.name("", f"{leaf}.weight", m), (width,)))
    for suffix, m in names.copies(layer.attention == "split"):
        rows += _qkv_rows(spec, names, f"{key}.attention", suffix, m)
    for suffix, m in names.copies(layer.output_projection == "split"):
        rows += _output_rows(spec, names, f"{key}.attention", suffix, m)
    if layer.unused_output:
        for suffix, m in list(names.copies(True))[1:]:
            rows += _output_rows(spec, names, f"{key}.attention", suffix, m, used=False)
    if layer.experts is not None:
        return rows + _expert_rows(spec, names, f"{key}.ffn", layer.experts)
    for (suffix, m), ffn in zip(names.copies(True), layer.ffn, strict=False):
        rows += _ffn_rows(names, f"{key}.ffn", suffix, m, shape=(ffn, width))
    if layer.ffn:
        rows += _ffn_rows(names, f"{key}.ffn.shared", "", 0, shape=(layer.shared_ffn, width), prefix="share_")
    else:
        rows += _ffn_rows(names, f"{key}.ffn", "", 0, shape=(layer.shared_ffn, width))
    return rows


def _check_spelling(names: _Names, layer: LayerSpec) -> None:
    """Refuse a layer whose copies the layout cannot tell apart."""
    family = names.layout.family
    parts: dict[str, str] = {
        "attention": layer.attention,
        "output_projection": layer.output_projection,
        "norms": layer.norms,
    }
    split = {part for part, sharing in parts.items() if sharing == "split"} | ({"ffn"} if layer.ffn else set())
    if len(names.modalities) == 1:
        split = set()  # one copy of each, whose name is the shared one's
    possible = _SPLITS[family]
    if layer.experts is not None:
        spelling = SPELLINGS.get(family)
        missing = spelling.missing(layer.experts) if spelling else "routed experts"
        if missing:
            raise CheckpointError(
                f"layers.{names.index} has no names in layout {family!r}: it has {missing}. "
                "Another layout may have them."
            )
    shared_beside = layer.shared_ffn and layer.ffn
    if split not in possible or (shared_beside and (family != "x" or names.twin)):
        raise CheckpointError(
            f"layers.{names.index} has no names in layout {family!r}: it is split in "
            f"{', '.join(sorted(split)) or 'nothing'}{' beside a shared FFN' if shared_beside else ''}. "
            "Another layout may have them."
        )


def _qkv_rows(spec: ModelSpec, names: _Names, key: str, suffix: str, modality: int) -> list[Row]:
    heads = (spec.heads, spec.kv_heads, spec.kv_heads)
    rows = []
    for what in ("weight", "bias") if spec.qkv_bias else ("weight",):
        shapes = tuple((n * spec.head_width, spec.width) if what == "weight" else (n * spec.head_width,) for n in heads)
        leaves = tuple(names.name("self_attn", f"{leaf}_proj.{what}", modality) for leaf in "qkv")
        rows.append(Row(key=f"{key}.qkv.{what}{suffix}", names=leaves, shapes=shapes, kv_heads=spec.kv_heads))
    for leaf in "qk" if spec.qk_norm else "":
        name = names.name("self_attn", f"{leaf}_norm.weight", modality)
        rows.append(_copy(f"{key}.{leaf}_layernorm.weight{suffix}", name, (spec.head_width,)))
    return rows


def _output_rows(
    spec: ModelSpec, names: _Names, key: str, suffix: str, modality: int, *, used: bool = True
) -> list[Row]:
    shape = (spec.width, spec.heads * spec.head_width)
    name = names.name("self_attn", "o_proj", modality)
    rows = [_copy(f"{key}.output.weight{suffix}", f"{name}.weight", shape, used=used)]
    if spec.output_bias:
        rows.append(_copy(f"{key}.output.bias{suffix}", f"{name}.bias", (spec.width,), used=used))
    return rows


def _ffn_rows(
    names: _Names, key: str, suffix: str, modality: int, *, shape: tuple[int, int], prefix: str = ""
) -> list[Row]:
    """gate, up and down; none of them exists at width 0."""
    if not shape[0]:
        return []
    return [
        _copy(f"{key}.{leaf}.weight{suffix}", names.name("mlp", f"{leaf}_proj.weight", modality, prefix=prefix), of)
        for leaf, of in _ffn_shapes(*shape).items()
    ]


def _ffn_shapes(ffn: int, width: int) -> dict[str, Shape]:
    return {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}


def _expert_rows(spec: ModelSpec, names: _Names, key: str, experts: ExpertSpec) -> list[Row]:
    """Router, experts, and what stands beside them."""
    spelling, number, width = SPELLINGS[names.layout.family], experts.number, experts.width
    base = f"model.layers.{names.index}."
    rows = [_copy(f"{key}.router.weight", base + spelling.router, (number, spec.width))]
    if experts.bias_rate:
        rows.append(Row(key=f"{key}.router.bias", names=(base + spelling.bias,), shapes=((number,),), statistic=True))
    for leaf, shape in _ffn_shapes(width, spec.width).items():
        each = tuple(base + getattr(spelling, leaf).format(one) for one in range(number))
        rows.append(Row(key=f"{key}.experts.{leaf}.weight", names=each, shapes=(shape,) * number, stacked=True))
    if experts.shared_width:
        for leaf, shape in _ffn_shapes(experts.shared_width, spec.width).items():
            rows.append(_copy(f"{key}.shared.{leaf}.weight", f"{base}{spelling.shared}{leaf}_proj.weight", shape))
    if experts.shared_gate:
        rows.append(_copy(f"{key}.shared_gate.weight", base + spelling.shared_gate, (1, spec.width)))
    return rows


def _copy(key: str, name: str, shape: Shape, *, used: bool = True) -> Row:
    return Row(key=key, names=(name,), shapes=(shape,), used=used)


def _check_keys(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> None:
    missing = [row.key for row in rows if row.key not in shapes]
    if missing:
        raise CheckpointError(f"key {missing[0]!r}{_more(missing)} is missing. The checkpoint is of another model.")
    unused = sorted(set(shapes) - {row.key for row in rows})
    if unused:
        raise CheckpointError(
            f"key {unused[0]!r}{_more(unused)} has no name in this layout. The checkpoint is of another model."
        )
    for row in rows:
        if shapes[row.key] != row.key_shape:
            raise CheckpointError(
                f"key {row.key!r} has shape {list(shapes[row.key])}, the model wants {list(row.key_shape)}."
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
