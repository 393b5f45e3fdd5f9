"""Tokens as the columns that a weight gradient contracts: the meaning of groups, in numpy."""

import numpy as np

from jax_fp8gemm import ragged_k_size


def arranged(x, sizes):
    """x [T, N] with the tokens of each group at a multiple of 128, zeros elsewhere: [K, N]."""
    tokens = len(x)
    out = np.zeros((ragged_k_size(tokens, len(sizes)), x.shape[1]), x.dtype)
    token = column = 0
    for size in sizes:
        count = min(max(size, 0), tokens - token)
        out[column : column + count] = x[token : token + count]
        token, column = token + count, column + -(-count // 128) * 128
    return out


def with_zeros_behind(x, sizes):
    """x [T, N] with the rows of no group as zeros."""
    valid = min(sum(max(int(size), 0) for size in sizes), len(x))
    return np.where(np.arange(len(x))[:, None] < valid, x, x.dtype.type(0))
