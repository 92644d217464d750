"""Presets: λ under the names that people know from APIs, from a measured frontier."""

from __future__ import annotations

from dami.evaluation.frontier import Frontier

SHARES = {"low": 0.5, "medium": 0.8, "high": 0.95}


def presets_of(frontier: Frontier) -> dict[str, float]:
    """The cheapest measured λ with at least these shares of all the accuracy that thinking adds.

    What it adds is counted from the λ with the fewest tokens to the most accurate one.
    """
    accuracy, tokens = frontier.scores.mean(0), frontier.tokens.mean(0)
    least = accuracy[tokens.argmin()]
    presets = {}
    for name, share in SHARES.items():
        reaching = [i for i, a in enumerate(accuracy) if a >= least + share * (accuracy.max() - least) - 1e-12]
        presets[name] = float(frontier.intensities[min(reaching, key=lambda i: tokens[i])])
    return presets
