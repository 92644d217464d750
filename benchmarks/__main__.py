"""The benchmarks: python -m benchmarks [PART] [--isa ISA] …; without a PART, the suite.

parts:
  linear     lerp_linear in every format against plain PyTorch
  operators  the embedding, the norms and the experts as a share of the memory's bandwidth
  step       one decoder step of a whole model
  host       what a call costs beside its kernel (CPU)
  generate   decoding by transformers, a patched pair against one plain model
  peers      a pair in dami's server and in vLLM, against other servers with merged copies (CPU)
  predict    what the machine code and the limits of GPUs say of the kernels' times, without a GPU
  scale      what packing, loading and serving of published pairs takes, computed from rates measured here
  decode     where the time of a token goes, step by step and compiled
  tune       measure the launch parameters of this GPU and write its table; also: --tune
  suite      linear, operators and step, a few minutes (on a GPU: its tests last, at most 8 minutes)

python -m benchmarks PART --help tells what a part can be asked.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

PARTS = ("suite", "linear", "operators", "step", "host", "generate", "peers", "predict", "decode", "scale", "tune")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", usage=__doc__, add_help=False)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--isa")
    options, rest = parser.parse_known_args(argv)
    part = "tune" if options.tune else rest.pop(0) if rest and not rest[0].startswith("-") else "suite"
    if part not in PARTS:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {part!r}")
    if part == "suite" and {"-h", "--help"} & {*rest}:
        print(__doc__)
        return 0
    if options.isa:
        os.environ["DAMI_CPU_ISA"] = options.isa
    if options.isa == "avx2":  # read when torch is loaded, which is why nothing is imported before
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    return importlib.import_module(f"benchmarks.{part}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
