"""How fast the operators are. `python -m benchmarks --help`, or docs/benchmarks.md."""
