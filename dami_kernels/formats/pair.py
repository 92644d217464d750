"""`pair`: both ends unchanged. Exact at λ=0 and λ=1; twice the bytes of one weight."""

from dami_kernels.formats.base import Matrices, Numbers

FORMAT = Matrices(__doc__, base=Numbers(""), second=Numbers("_target"))
