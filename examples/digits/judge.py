"""How good drawings and captions are: a judge that has seen real scans only, copies, distances, intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from corpus import DIGITS, Codebook, Numbers, Scans, Split
from sklearn.svm import SVC

NO_DIGIT = -1  # a caption that names no digit, or two
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Sampled:
    """What was asked of an export and what it answered."""

    labels: Numbers
    """[N] digits that were to be drawn."""
    codes: Numbers
    """[N, 16] drawings."""
    said: list[str]
    """Captions of the held-out scans, in the split's order."""


@dataclass(frozen=True)
class Verdict:
    """Figures for the report, and what its pictures show."""

    figures: dict[str, Any]
    drawings: Scans
    """[N, 8, 8]."""
    seen_as: Numbers
    """[N] what the judge takes each drawing for."""
    nearest: Numbers
    """[N] the training scan nearest to each drawing, as a row of ``Split.scans``."""
    distance: Scans
    """[N] how far it is."""
    named: Numbers
    """[H] the digit that each held-out scan's caption names."""


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a share of ``right`` among ``count`` draws (Wilson's score)."""
    if not count:
        return [0.0, 1.0]
    share, z2 = right / count, NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return [round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)]


def digit_of(caption: str) -> int:
    """The digit that a caption names; -1 unless it names exactly one."""
    named = [word for word in caption.split() if word in DIGITS]
    return DIGITS.index(named[0]) if len(named) == 1 else NO_DIGIT


def confusion(true: Numbers, found: Numbers) -> list[list[int]]:
    """[10][10] counts, a row for each true digit; answers without a digit are in none."""
    matrix = np.zeros((10, 10), dtype=np.int64)
    known = found != NO_DIGIT
    np.add.at(matrix, (true[known], found[known]), 1)
    return [[int(count) for count in row] for row in matrix]


def nearest(scans: Scans, among: Scans) -> tuple[Numbers, Scans]:
    """For each of ``scans`` [N, 8, 8] the place of the nearest of ``among`` [M, 8, 8], and its Euclidean distance."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (scans, among))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    places = squares.argmin(1)
    exact = np.sqrt(np.square(a - b[places]).sum(1))
    return places, exact.astype(np.float32)


def train_judge(data: Split) -> SVC:
    """A support vector machine on the pixels of the real training scans; it never sees codes."""
    return SVC(gamma=0.256, C=10).fit(_flat(data.scans[data.train]), data.labels[data.train])


def judge(data: Split, book: Codebook, sampled: Sampled, svm: SVC) -> Verdict:
    """All figures of one sampling. Shares are fractions of 1 and come with their interval under ``intervals``."""
    true = data.labels[data.held_out]
    training_codes = book.encode(data.scans[data.train])
    held_out_codes = book.encode(data.scans[data.held_out])
    drawings, rebuilt = book.decode(sampled.codes), book.decode(held_out_codes)
    seen_as = svm.predict(_flat(drawings))
    named = np.array([digit_of(caption) for caption in sampled.said], dtype=np.int64)
    known = _keys(training_codes)
    shares = {
        "t2i_accuracy": seen_as == sampled.labels,
        "i2t_accuracy": named == true,
        "judge_accuracy": svm.predict(_flat(data.scans[data.held_out])) == true,
        "judge_accuracy_on_reconstructions": svm.predict(_flat(rebuilt)) == true,
        "exact_copy_share": np.isin(_keys(sampled.codes), known),
        "exact_copy_share_held_out": np.isin(_keys(held_out_codes), known),
    }
    # Drawings only exist as codes, so real scans are compared as their codes show them too.
    places, distance = nearest(drawings, book.decode(training_codes))
    _, held_out_distance = nearest(rebuilt, book.decode(training_codes))
    error = float(np.square(rebuilt - data.scans[data.held_out]).mean())
    figures: dict[str, Any] = {name: round(float(hits.mean()), 6) for name, hits in shares.items()}
    figures["intervals"] = {name: wilson(int(hits.sum()), len(hits)) for name, hits in shares.items()}
    figures |= {
        "counts": {"drawn": len(drawings), "held_out": len(true), "training": len(data.train)},
        "unique_share": round(len(set(_keys(sampled.codes))) / len(sampled.codes), 6),
        "unique_share_training": round(len(set(known)) / len(known), 6),
        "median_nearest_distance": round(float(np.median(distance)), 4),
        "median_nearest_distance_held_out": round(float(np.median(held_out_distance)), 4),
        "psnr_db": round(10 * math.log10(1 / error), 3),
        "captions_without_a_digit": int((named == NO_DIGIT).sum()),
        "confusion_i2t": confusion(true, named),
        "confusion_t2i": confusion(sampled.labels, seen_as),
    }
    return Verdict(figures, drawings, seen_as, data.train[places], distance, named)


def accuracies(data: Split, book: Codebook, sampled: Sampled, svm: SVC) -> dict[str, float]:
    """The two that the curve over the steps shows."""
    said = [digit_of(caption) for caption in sampled.said]
    return {
        "t2i": round(float((svm.predict(_flat(book.decode(sampled.codes))) == sampled.labels).mean()), 6),
        "i2t": round(float((np.array(said) == data.labels[data.held_out]).mean()), 6),
    }


def _flat(scans: Scans) -> Scans:
    return scans.reshape(len(scans), -1)


def _keys(codes: Numbers) -> Sequence[str]:
    """A hashable name of each row of codes."""
    return [" ".join(map(str, row)) for row in codes.tolist()]
