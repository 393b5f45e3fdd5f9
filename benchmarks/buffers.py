"""A problem's buffers on the device, through PyTorch, laid out as the kernel takes them; and its reference.

Used where a kernel runs without XLA: the sweep over configurations, and sanitizers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from jax_fp8gemm.jit.problem import MASKED, RAGGED_K, RAGGED_M, SCALE_BLOCK, GemmProblem, ceil_div

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
    """Device arrays of one problem, in the shapes that it has; Kb = ceil(K/128).

    Attributes:
      problem: what they belong to.
      lhs: FP8 [*, M, K].
      lhs_scale: f32 [*, Kb, M]: M fastest.
      rhs: FP8 [*, N, K].
      rhs_scale: f32 [*, ceil(N/128), Kb], or [*, Kb, N] for scales of single rows.
      group_sizes: int32 [B, G], None for a dense problem.
      initial: what `out` holds before each launch: NaN, or the accumulator.
      out: the result.
    """

    problem: GemmProblem
    lhs: torch.Tensor
    lhs_scale: torch.Tensor
    rhs: torch.Tensor
    rhs_scale: torch.Tensor
    group_sizes: torch.Tensor | None
    initial: torch.Tensor
    out: torch.Tensor

    @classmethod
    def random(
        cls,
        problem: GemmProblem,
        group_sizes: Sequence[int] = (),
        seed: int = 0,
        device: str = "cuda",
    ) -> Buffers:
        """Values as quantised normal data has them, positive random scales, equal groups in every batch."""
        rng = torch.Generator(device).manual_seed(seed)

        def values(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            out = torch.empty(shape, dtype=_FP8[dtype], device=device)
            for matrix in out.view(-1, *shape[-2:]):  # one by one: f32 takes four times the memory
                normal = torch.randn(matrix.shape, generator=rng, device=device) * (_AMAX / 2.7)
                matrix.copy_(normal.clamp_(-_AMAX, _AMAX))
            return out

        def scales(shape: tuple[int, ...], rows_fastest: bool) -> torch.Tensor:
            *leading, rows, columns = shape
            shape = (*leading, columns, rows) if rows_fastest else shape
            return torch.rand(shape, generator=rng, device=device) * (1.5 / _AMAX) + 0.5 / _AMAX

        initial = (
            torch.randn(problem.out_shape, generator=rng, device=device)
            if problem.accumulate
            else torch.full(problem.out_shape, math.nan, dtype=_OUT[problem.out_dtype], device=device)
        )
        sizes = torch.tensor([group_sizes] * problem.batch, dtype=torch.int32, device=device)
        return cls(
            problem,
            lhs=values(problem.lhs_shape, problem.lhs_dtype),
            lhs_scale=scales(problem.lhs_scale_shape, True),
            rhs=values(problem.rhs_shape, problem.rhs_dtype),
            rhs_scale=scales(problem.rhs_scale_shape, problem.rhs_scale_rows == 1),
            group_sizes=sizes if problem.is_grouped else None,
            initial=initial,
            out=initial.clone(),
        )

    def addresses(self) -> list[int]:
        """Device addresses in the order of the custom call; the accumulator is the output itself."""
        operands = [self.lhs, self.lhs_scale, self.rhs, self.rhs_scale]
        groups = [self.group_sizes] if self.problem.is_grouped else []
        results = [self.out, self.out] if self.problem.accumulate else [self.out]
        return [tensor.data_ptr() for tensor in (*operands, *groups, *results)]

    def poison(self) -> None:
        """Puts what stood in the output before back there: an element that nothing writes stays NaN."""
        self.out.copy_(self.initial)

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """f64, as `out`: the product of the dequantised operands, plus the accumulator.

        NaN where a masked problem leaves rows alone.
        """
        rest = math.nan if self.problem.kind == MASKED else 0.0
        out = torch.full(self.problem.out_shape, rest, dtype=torch.float64, device=self.lhs.device)
        for at, lhs, lhs_scale, rhs, rhs_scale in self._dense_parts():
            rhs_scale = rhs_scale.T if self.problem.rhs_scale_rows == 1 else rhs_scale
            per_row = rhs_scale.repeat_interleave(self.problem.rhs_scale_rows, 0)[: self.problem.n]
            out[at] = _dequantize(lhs, lhs_scale.T) @ _dequantize(rhs, per_row).T
        return out + self.initial.double() if self.problem.accumulate else out

    def _dense_parts(self) -> Iterator[tuple]:
        """For every batch and group: where its product is in `out`, and the operands of that dense GEMM."""
        problem = self.problem
        for batch in range(problem.batch):
            lhs, lhs_scale = (x[batch if problem.lhs_batched else 0] for x in (self.lhs, self.lhs_scale))
            rhs, rhs_scale = (x[batch if problem.rhs_batched else 0] for x in (self.rhs, self.rhs_scale))
            if not problem.is_grouped:
                yield batch, lhs, lhs_scale, rhs, rhs_scale
                continue
            for g, part in enumerate(_slices(problem, self.group_sizes[batch].tolist())):
                if problem.kind == RAGGED_M:
                    yield (batch, part), lhs[part], lhs_scale[:, part], rhs[g], rhs_scale[g]
                elif problem.kind == MASKED:
                    yield (batch, g, part), lhs[g, part], lhs_scale[g, :, part], rhs[g], rhs_scale[g]
                else:
                    k = slice(part.start * SCALE_BLOCK, part.stop * SCALE_BLOCK)
                    yield (batch, g), lhs[:, k], lhs_scale[part], rhs[:, k], rhs_scale[part]

    def worst_tile(self) -> float:
        """The largest relative error (2-norm) of the output's 128x128 tiles; infinite for a NaN.

        Rows that are to be left alone count as errors where something stands in them.
        """
        out, reference = (x.view(-1, *x.shape[-2:]) for x in (self.out, self.reference))
        worst = 0.0
        for got, expected in zip(out, reference, strict=True):  # one by one: f64 takes much memory
            difference = torch.where(got.isnan() & expected.isnan(), 0.0, got.double() - expected)
            error, norm = _tile_norms(difference), _tile_norms(expected.nan_to_num(0.0))
            relative = torch.where(error == 0, 0.0, error / norm).amax().item()
            worst = max(worst, math.inf if math.isnan(relative) else relative)
        return worst


def _slices(problem: GemmProblem, group_sizes: Sequence[int]) -> list[slice]:
    """Where each group lies: rows, or blocks of K for ragged K."""
    if problem.kind == MASKED:
        return [slice(0, size) for size in group_sizes]
    sizes = [ceil_div(size, SCALE_BLOCK) for size in group_sizes] if problem.kind == RAGGED_K else group_sizes
    return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def _dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """f64 [rows, K] of FP8 values [rows, K] and their scales [rows, ceil(K/128)]."""
    return values.double() * scale.double().repeat_interleave(SCALE_BLOCK, 1)[:, : values.shape[1]]


def _tile_norms(x: torch.Tensor) -> torch.Tensor:
    """The 2-norm of every tile of x [M, N]."""
    pad = (0, -x.shape[1] % TILE, 0, -x.shape[0] % TILE)
    tiles = torch.nn.functional.pad(x, pad).unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    return tiles.square().sum(dim=(1, 3)).sqrt()
