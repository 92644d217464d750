"""A zoo of small pairs that no rule for λ was chosen on: python -m benchmarks.zoo"""
