"""Other thinking ends of `benchmarks.ends`, and how they are compared."""

import numpy as np
import pytest
import torch

from benchmarks.ends import at_rank, compared, swapped
from benchmarks.subjects import FIFTHS


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_swapped_difference_has_nothing_in_the_leading_directions_and_all_else(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before, difference = torch.randn(2, 24, 16, dtype=torch.float64, generator=generator)
    u, values, v = torch.linalg.svd(before, full_matrices=False)
    energy = values.square().cumsum(0) / values.square().sum()
    inside = torch.ones(16, dtype=torch.bool)
    inside[1:] = energy[:-1] < share  # up to and with the direction that reaches the share
    seen, kept = u.T @ difference @ v.T, u.T @ swapped(before, difference, share) @ v.T
    both = inside[:, None] & inside
    torch.testing.assert_close(kept, seen.where(~both, 0.0))


def test_a_difference_at_a_rank_is_the_nearest_of_that_rank() -> None:
    difference = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near = at_rank(difference, difference, 3)
    assert torch.linalg.matrix_rank(near) == 3
    left = torch.linalg.svdvals(difference)[3:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(difference - near), left)


def test_worth_won_is_that_of_the_best_lam_over_prices() -> None:
    scores, tokens = np.zeros((40, len(FIFTHS))), np.full((40, len(FIFTHS)), 10.0)
    better = scores.copy()
    better[:, 2] = 0.5
    rows = compared({"as it is": (scores, tokens), "better": (better, tokens)})
    assert {(row["variant"], row["won"], row["won_low"]) for row in rows} == {
        ("as it is", 0.0, 0.0),
        ("better", 0.5, 0.5),
    }
