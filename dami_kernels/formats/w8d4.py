"""`w8d4`: the base in 8 bits, the difference in 4. Two models in 1.63 bytes a weight, less than one in bfloat16 takes.

The difference is taken from the base as it is stored, not from the one that came, so its codes make up for the base's
rounding too. Where the ends are close, the error is therefore least at λ=1.
"""

from dami_kernels.formats.base import Codes, Matrices

FORMAT = Matrices(__doc__, base=Codes("_base", bits=8), second=Codes("_delta", bits=4))
