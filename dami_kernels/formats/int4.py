"""`int4`: the base as it is and the difference in 4 bits. Exact at λ=0; 2.56 bytes for each bfloat16 weight."""

from dami_kernels.formats.base import Codes, Matrices, Numbers

FORMAT = Matrices(__doc__, base=Numbers(""), second=Codes("_delta", bits=4))
