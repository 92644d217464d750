"""Measures of a path between two models: similarity of representations along it, and height of its barrier.

Similarity of representations is linear CKA (Kornblith et al., arXiv 1905.00414) and the mean cosine. CKA is debiased
with the unbiased estimator of HSIC (Song et al., JMLR 2012), because plain CKA of unrelated states tends to 1 if there
are no more states than features. A barrier is how far a loss rises above the straight line between its values at the
ends (Entezari et al., arXiv 2110.06296), or above their mean (Frankle et al., arXiv 1912.05671). All intervals are 95 %
intervals. Those of similarities come from a jackknife that leaves out a twentieth of the questions at a time, because
drawing a state twice would make all representations look alike. All others come from a bootstrap over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from dami.evaluation.statistics import Z95, Array, Interval, Places, bootstrap

FOLDS = 20


def cka(x: ArrayLike, y: ArrayLike) -> float:
    """Computes debiased linear CKA of N states in two representations: 1 if they differ only by rotation and scale.

    ⟨U(xxᵀ), U(yyᵀ)⟩ / (‖U(xxᵀ)‖ ‖U(yyᵀ)‖), where U removes row means, column means and the diagonal. The value is
    about 0, and may be negative, if the representations are independent.

    Args:
        x, y: [N, D] and [N, E], N at least 4.

    Raises:
        ValueError: the shapes do not fit, or N is below 4.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 4:
        raise ValueError(f"x and y must be [N, D] and [N, E] with N at least 4, got {x.shape} and {y.shape}")
    a, b = _directions([_gram(x), _gram(y)], np.arange(len(x)))
    return float(a @ b)


def _gram(x: Array) -> Array:
    x = x - x.mean(0)
    return x @ x.T


def _directions(grams: Sequence[Array], rows: Places) -> Array:
    """Returns the U-centred, normalised Gram matrices of some of the states as vectors, [len(grams), n²]."""
    n = len(rows)
    flat = []
    for gram in grams:
        k = gram[np.ix_(rows, rows)]
        np.fill_diagonal(k, 0.0)
        mean = k.sum(0) / (n - 2)
        k = k - mean - mean[:, None] + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0.0)
        length = np.linalg.norm(k)
        flat.append(k.ravel() / (length if length > 0 else 1.0))
    return np.stack(flat)


@dataclass(frozen=True)
class Similarity:
    """Similarity of a layer's states at two λ.

    Attributes:
        layer: 0 is the embeddings; the last is the head's input.
        intensity, other: the two λ.
        cka, cosine: measured over states; 1 if the states are identical.
    """

    layer: int
    intensity: float
    other: float
    cka: Interval
    cosine: Interval


def compared(intensities: Sequence[float]) -> list[tuple[int, int]]:
    """Returns the index pairs of the λ to compare: neighbours, and each λ with both ends."""
    pairs = [(i, i + 1) for i in range(len(intensities) - 1)]
    for end in (0.0, 1.0):
        at = list(intensities).index(end)
        pairs += [(i, at) for i in range(len(intensities)) if i != at]
    return list(dict.fromkeys(pairs))


def similarities(layer: int, states: Array, questions: Places, intensities: Sequence[float]) -> list[Similarity]:
    """Computes the similarity of a layer's states between the λ given by `compared`.

    Args:
        layer: its number.
        states: [L, N, D], the same N states at every λ.
        questions: [N], the question that each state belongs to.
        intensities: L increasing λ, including 0 and 1.
    """
    pairs = compared(intensities)
    first, second = (np.array(places) for places in zip(*pairs, strict=True))
    lengths = np.linalg.norm(states, axis=2)
    unit = states / np.where(lengths > 0, lengths, 1.0)[:, :, None]
    cosines = np.stack([(unit[i] * unit[j]).sum(1) for i, j in pairs])
    grams = [_gram(x) for x in states]

    def measure(rows: Places) -> Array:
        directions = _directions(grams, rows)
        return np.stack([(directions @ directions.T)[first, second], cosines[:, rows].mean(1)])

    value = measure(np.arange(len(questions)))
    folds = np.unique(questions, return_inverse=True)[1] % FOLDS
    left = np.stack([measure(np.flatnonzero(folds != fold)) for fold in np.unique(folds)])
    half = Z95 * np.sqrt((len(left) - 1) / len(left) * ((left - left.mean(0)) ** 2).sum(0))
    low, high = value - half, np.minimum(value + half, 1.0)
    return [
        Similarity(
            layer, float(intensities[i]), float(intensities[j]),
            *(Interval(float(value[m, p]), float(low[m, p]), float(high[m, p])) for m in (0, 1)),
        )
        for p, (i, j) in enumerate(pairs)
    ]  # fmt: skip


def between_neighbours(found: Sequence[Similarity], intensities: Sequence[float]) -> list[Similarity]:
    """Returns the similarities of neighbours in [0, 1]."""
    steps = set(pairwise(lam for lam in intensities if 0 <= lam <= 1))
    return [each for each in found if (each.intensity, each.other) in steps]


@dataclass(frozen=True)
class Barrier:
    """The barrier between λ = 0 and 1 of a value for which lower is better.

    Attributes:
        height: the largest distance of the value above the straight line between the ends, at least 0. Noise raises it,
            because it is a maximum.
        at: the λ of that maximum.
        above_mean: the largest distance above the mean of the ends.
        sag: the largest distance below the straight line, at least 0.
    """

    height: Interval
    at: float
    above_mean: Interval
    sag: Interval


def above_chord(intensities: Sequence[float], values: ArrayLike) -> Array:
    """Returns how far values [..., L] lie above the straight line through those at λ = 0 and λ = 1.

    Raises:
        ValueError: 0 or 1 is not among the λ.
    """
    lams, values = np.asarray(intensities, np.float64), np.asarray(values, np.float64)
    if not {0.0, 1.0} <= set(lams.tolist()):
        raise ValueError(f"intensities must hold 0 and 1, got {lams.tolist()}")
    at0, at1 = (values[..., lams.tolist().index(end), None] for end in (0.0, 1.0))
    return values - (1 - lams) * at0 - lams * at1


def barrier(intensities: Sequence[float], means: Callable[[Places], Array], questions: int) -> Barrier:
    """Computes the barrier of a value, given its means over resampled questions.

    Args:
        intensities: L λ, including 0 and 1. Those outside [0, 1] are ignored.
        means: maps indices of questions to the value at every λ, [L].
        questions: number of questions.
    """
    lams = np.asarray(intensities, np.float64)
    inside = (lams >= 0) & (lams <= 1)
    ends = [lams.tolist().index(end) for end in (0.0, 1.0)]

    def three(rows: Places) -> Array:
        values = means(rows)
        above = above_chord(intensities, values)[inside]
        return np.array([above.max(), values[inside].max() - values[ends].mean(), (-above).max()])

    above = above_chord(intensities, means(np.arange(questions)))
    height, above_mean, sag = bootstrap(three, questions)
    return Barrier(height, float(lams[inside][above[inside].argmax()]), above_mean, sag)
