"""Folders whose experts lie in one tensor, as transformers 5 holds them in memory: seen as one tensor per expert."""

from collections.abc import Iterator, Mapping

import torch

from unimega.hf.expert_names import FUSED_DOWN, FUSED_GATE_UP, FUSED_ROUTER, SPELLINGS
from unimega.hf.weights import Place, Weights

Places = dict[str, Place]


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a folder under the names of its family; what is fused is read expert by expert."""

    def __init__(self, weights: Weights, family: str) -> None:
        """Work out the names.

        Args:
            weights: the folder's files.
            family: of the ``Layout``; one without experts leaves all names as they are.
        """
        self._weights = weights
        self._places: Places = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        is_fused = any(name.endswith(FUSED_GATE_UP) for name in weights)
        for name in weights:
            for new, place, shape in _views(name, weights.shapes[name], family) if is_fused else ():
                self._add(new, place, shape)
            if not is_fused or not name.endswith((FUSED_GATE_UP, FUSED_DOWN, FUSED_ROUTER)):
                spelled = _without_peft(name) if family == "unimoe" else name
                self._add(spelled, Place(name), weights.shapes[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self._weights.read(self._places[name])

    def __iter__(self) -> Iterator[str]:
        """Names, file by file."""
        return iter(self._places)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._places)

    def note(self, name: str) -> str:
        """Where a tensor of another name in the folder comes from."""
        return "" if self._places[name].expert is None else "of the fused tensor"

    def _add(self, name: str, place: Place, shape: tuple[int, ...]) -> None:
        self._places[name], self.shapes[name] = place, shape
        self.dtypes[name] = self._weights.dtypes[place.name]


def _without_peft(name: str) -> str:
    """As the tensor is called where PEFT has not wrapped the model; factors are ``lora_A.weight``."""
    for part, plain in (("base_model.model.", ""), (".base_layer.", "."), (".default.weight", ".weight")):
        name = name.replace(part, plain)
    return name


def _views(name: str, shape: tuple[int, ...], family: str) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
    """(name in the family, where it lies, shape) of each part of a fused tensor; of none, if it is not fused."""
    spelling = SPELLINGS.get(family, SPELLINGS["qwen"])
    experts = range(shape[0])
    if name.endswith(FUSED_ROUTER):
        yield name.replace(FUSED_ROUTER, spelling.router), Place(name), shape
    elif name.endswith(FUSED_DOWN) and len(shape) == 3:
        for one in experts:
            yield name.replace(FUSED_DOWN, spelling.down.format(one)), Place(name, expert=one), shape[1:]
    elif name.endswith(FUSED_GATE_UP) and len(shape) == 3:
        half = shape[1] // 2
        for one in experts:
            for spelled, first in ((spelling.gate, 0), (spelling.up, half)):
                place = Place(name, expert=one, rows=(first, first + half))
                yield name.replace(FUSED_GATE_UP, spelled.format(one)), place, (half, shape[2])
