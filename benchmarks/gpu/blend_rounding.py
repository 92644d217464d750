"""Why the uniform tile blends in float32: what packed bfloat16 arithmetic would cost in accuracy.

    python benchmarks/gpu/blend_rounding.py

Emulates `sub.rn.bf16x2` and `fma.rn.bf16x2` (every operation rounded once, from float64) and compares y = x W(λ)ᵀ with
float64, in units of the error of the weight merged in float32 and rounded once. Writes results/blend_rounding.csv.
Runs on the CPU in seconds; nothing in it depends on the machine.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

RESULT = Path(__file__).parents[1] / "results" / "blend_rounding.csv"
LAMBDAS = (0.1, 0.3, 0.5, 0.7371, 0.97)
DISTANCES = (0.01, 0.03, 0.1, 0.3, 1.0, float("inf"))  # spread of target − base relative to base; inf: unrelated ends


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def packed(base: Tensor, target: Tensor, lam: float) -> Tensor:
    """Computes fma(λ, target − base, base) with λ rounded too."""
    return bf16(base + bf16(torch.tensor(lam)) * bf16(target - base))


def packed_from_the_nearer_end(base: Tensor, target: Tensor, lam: float) -> Tensor:
    return packed(base, target, lam) if lam < 0.5 else packed(target, base, 1 - lam)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    x = bf16(normal(64, 2048))
    base = bf16(0.02 * normal(512, 2048))
    rows = []
    for distance in DISTANCES:
        noise = 0.02 * normal(512, 2048)
        target = bf16(noise if distance == float("inf") else base + distance * noise)
        for lam in LAMBDAS:
            exact = base + lam * (target - base)

            def error(weight: Tensor, exact: Tensor = exact) -> float:
                return (x @ (weight - exact).T).square().mean().sqrt().item()

            plain = error(bf16(exact))
            row = {"distance": distance, "lam": lam}
            row["packed"] = round(error(packed(base, target, lam)) / plain, 3)
            row["packed_from_the_nearer_end"] = round(error(packed_from_the_nearer_end(base, target, lam)) / plain, 3)
            rows.append(row)
            print(*row.values(), sep="\t")
    with RESULT.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
