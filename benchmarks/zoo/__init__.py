"""A zoo of small pairs that rules for λ are chosen and reported on: python -m benchmarks.zoo"""

from pathlib import Path

ZOO = Path(__file__).resolve().parents[2] / "build" / "zoo"
