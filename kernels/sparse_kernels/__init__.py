"""The sparse vector of neural tuning (Eq. 1-3) as one operation, with a plain PyTorch reference."""

from sparse_kernels.sparse_vector import sparse_vector

__all__ = ["sparse_vector"]
