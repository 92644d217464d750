"""Presets: λ by the names of reasoning efforts known from APIs, chosen from a measured frontier."""

from __future__ import annotations

from dami.evaluation.frontier import Frontier

SHARES = {"low": 0.5, "medium": 0.8, "high": 0.95}


def presets_of(frontier: Frontier) -> dict[str, float]:
    """Returns the cheapest measured λ that reach given shares of the accuracy that thinking adds.

    The added accuracy is the difference between the λ with the fewest tokens and the most accurate λ.
    """
    accuracy, tokens = frontier.scores.mean(0), frontier.tokens.mean(0)
    least = accuracy[tokens.argmin()]
    presets = {}
    for name, share in SHARES.items():
        reaching = [i for i, a in enumerate(accuracy) if a >= least + share * (accuracy.max() - least) - 1e-12]
        presets[name] = float(frontier.intensities[min(reaching, key=lambda i: tokens[i])])
    return presets
