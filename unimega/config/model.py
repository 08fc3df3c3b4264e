"""The complete description of a model that builders, converters and checkpoints work from."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from unimega.config.experts import ExpertSpec
from unimega.config.layer import LayerSpec
from unimega.config.schema import Lora
from unimega.config.vocabulary import Vocabulary
from unimega.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A stack of ``LayerSpec`` with its sizes; knows nothing of presets, files or ranks."""

    vocabulary: Vocabulary
    layers: tuple[LayerSpec, ...]
    width: int
    heads: int
    kv_heads: int
    head_width: int
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    norm_eps: float
    rope_theta: float
    tied: bool
    skip: tuple[int, int] | None = None
    """(i, j): the state of all but text after layer i is added before layer j."""
    cross_document: bool = False
    init_embedding: float = 0.02
    init_linear: float = 0.02
    init_head: float = 0.02
    init_vision: Literal["random", "text"] = "random"
    """``text``: split weights of the other modalities start equal to text's."""
    lora: Lora | None = None
    """Factors beside weights; None: there are none."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities; the first is text."""
        return self.vocabulary.names

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` gives an equal spec back."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelSpec":
        """Inverse of ``to_dict``, also after a trip through JSON (lists for tuples).

        Raises:
            CheckpointError: a field is missing, unknown or impossible.
        """
        try:
            vocabulary = {key: _frozen(value) for key, value in values["vocabulary"].items()}
            layers = tuple(_layer(layer) for layer in values["layers"])
            lora = values.get("lora")
            made: dict[str, Any] = {
                "vocabulary": Vocabulary(**vocabulary),
                "layers": layers,
                "lora": None if lora is None else Lora(**{key: _frozen(value) for key, value in lora.items()}),
            }
            return ModelSpec(**made, **{key: _frozen(value) for key, value in values.items() if key not in made})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the description of the model in a checkpoint is not complete ({error}). "
                "It is damaged or of another version of unimega."
            ) from error


def _layer(values: dict[str, Any]) -> LayerSpec:
    fields = {key: _frozen(value) for key, value in values.items()}
    if fields.get("experts") is not None:
        fields["experts"] = ExpertSpec(**{key: _frozen(value) for key, value in values["experts"].items()})
    return LayerSpec(**fields)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
