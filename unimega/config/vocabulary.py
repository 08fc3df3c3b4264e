"""Which id belongs to which modality (DESIGN section 5)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Rows of the embedding: the ids of each modality are one range, and some ids below it may belong to it as well."""

    names: tuple[str, ...]
    """Modalities in order; the first is text."""
    starts: tuple[int, ...]
    """First id of each modality's range; a range ends where the next one starts, the last one at ``rows``."""
    codes: tuple[int, ...]
    """Ids of each range that may be sampled (all text rows; codes of the codebook); the rest only fills the softmax."""
    rows: int
    """Rows in a file. Rows added in memory to divide by tp are not counted."""
    ids: tuple[tuple[int, ...], ...]
    """Ids outside its own range that belong to each modality (begin of image, separators)."""

    def modality_of(self, ids: np.ndarray) -> np.ndarray:
        """uint8 modality of each id, same shape."""
        modality = (np.searchsorted(np.asarray(self.starts), ids, side="right") - 1).astype(np.uint8)
        for number, special in enumerate(self.ids):
            if special:
                modality[np.isin(ids, special)] = number
        return modality
