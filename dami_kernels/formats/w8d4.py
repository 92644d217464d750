"""`w8d4`: the base in 8 bits, the difference in 4. Two models in 1.63 bytes a weight, less than one in bfloat16 takes.

The difference is computed from the base as stored, not from the original, so its codes also compensate for the base's
rounding. If the ends are close, the error is therefore smallest at λ=1.
"""

from dami_kernels.formats.base import Codes, Matrices

FORMAT = Matrices(__doc__, base=Codes("_base", bits=8), second=Codes("_delta", bits=4))
