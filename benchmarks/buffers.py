"""A problem's buffers on the device, through PyTorch, laid out as the kernel takes them; and its reference.

Used where a kernel runs without XLA: the sweep over configurations, and sanitizers.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from jax_fp8gemm.jit.problem import SCALE_BLOCK, GemmProblem, ceil_div

_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_OUT = {"bf16": torch.bfloat16, "f32": torch.float32}
_AMAX = 448.0  # of e4m3, and well inside e5m2
TILE = 128  # rows and columns of the tiles whose errors are bounded

# ||out - reference|| / ||reference|| of a tile. Rounding to bf16 takes at most 2^-9 of each element. The
# tensor core cuts products off 13 bits below the largest in a sum of 32: 6e-4 where all terms have one sign,
# 3e-4 on random data.
BOUNDS = {"bf16": 2.0**-9 + 2.0**-10, "f32": 2.0**-10}


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Device arrays of one problem; B is the batch, 1 for an operand that the batch shares.

    Attributes:
      problem: what they belong to.
      lhs: FP8 [B, M, K].
      lhs_scale: f32 [B, ceil(K/128), M]: M fastest.
      rhs: FP8 [B, N, K].
      rhs_scale: f32 [B, ceil(N/128), ceil(K/128)], or [B, ceil(K/128), N] for scales of single rows.
      initial: what `out` holds before each launch: NaN, or the accumulator.
      out: [B, M, N].
    """

    problem: GemmProblem
    lhs: torch.Tensor
    lhs_scale: torch.Tensor
    rhs: torch.Tensor
    rhs_scale: torch.Tensor
    initial: torch.Tensor
    out: torch.Tensor

    @classmethod
    def random(cls, problem: GemmProblem, seed: int = 0, device: str = "cuda") -> Buffers:
        """Values as quantised normal data has them, positive random scales."""
        rng = torch.Generator(device).manual_seed(seed)

        def values(batched: bool, rows: int, dtype: str) -> torch.Tensor:
            shape = (problem.batch if batched else 1, rows, problem.k)
            normal = torch.randn(shape, generator=rng, device=device) * (_AMAX / 2.7)
            return normal.clamp_(-_AMAX, _AMAX).to(_FP8[dtype])

        def scales(batched: bool, *shape: int) -> torch.Tensor:
            uniform = torch.rand((problem.batch if batched else 1, *shape), generator=rng, device=device)
            return uniform * (1.5 / _AMAX) + 0.5 / _AMAX

        m, n, k_blocks = problem.m, problem.n, problem.num_k_blocks
        out_shape = (problem.batch, m, n)
        initial = (
            torch.randn(out_shape, generator=rng, device=device)
            if problem.accumulate
            else torch.full(out_shape, math.nan, dtype=_OUT[problem.out_dtype], device=device)
        )
        return cls(
            problem,
            lhs=values(problem.lhs_batched, m, problem.lhs_dtype),
            lhs_scale=scales(problem.lhs_batched, k_blocks, m),
            rhs=values(problem.rhs_batched, n, problem.rhs_dtype),
            rhs_scale=(
                scales(problem.rhs_batched, k_blocks, n)
                if problem.rhs_scale_rows == 1
                else scales(problem.rhs_batched, ceil_div(n, SCALE_BLOCK), k_blocks)
            ),
            initial=initial,
            out=initial.clone(),
        )

    def addresses(self) -> list[int]:
        """Device addresses in the order of the custom call; the accumulator is the output itself."""
        operands = [self.lhs, self.lhs_scale, self.rhs, self.rhs_scale]
        results = [self.out, self.out] if self.problem.accumulate else [self.out]
        return [tensor.data_ptr() for tensor in (*operands, *results)]

    def poison(self) -> None:
        """Puts what stood in the output before back there: an element that nothing writes stays NaN."""
        self.out.copy_(self.initial)

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """f64 [B, M, N]: the product of the dequantised operands, plus the accumulator."""
        per_row = lambda scale: scale.transpose(1, 2)
        rhs_scale = (
            per_row(self.rhs_scale)
            if self.problem.rhs_scale_rows == 1
            else self.rhs_scale.repeat_interleave(SCALE_BLOCK, 1)[:, : self.problem.n]
        )
        lhs = _dequantize(self.lhs, per_row(self.lhs_scale))
        rhs = _dequantize(self.rhs, rhs_scale)
        product = torch.matmul(lhs, rhs.transpose(1, 2))
        return product + self.initial.double() if self.problem.accumulate else product

    def worst_tile(self) -> float:
        """The largest relative error (2-norm) of the output's 128x128 tiles; infinite for a NaN."""
        error, norm = _tile_norms(self.out.double() - self.reference), _tile_norms(self.reference)
        worst = (error / norm).amax().item()
        return math.inf if math.isnan(worst) else worst


def _dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """f64 [B, rows, K] of FP8 values [B, rows, K] and their scales [B, rows, ceil(K/128)]."""
    return values.double() * scale.double().repeat_interleave(SCALE_BLOCK, 2)[..., : values.shape[2]]


def _tile_norms(x: torch.Tensor) -> torch.Tensor:
    """The 2-norm of every tile of x [B, M, N]."""
    pad = (0, -x.shape[2] % TILE, 0, -x.shape[1] % TILE)
    padded = torch.nn.functional.pad(x, pad)
    tiles = padded.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
    return tiles.square().sum(dim=(2, 4)).sqrt()
