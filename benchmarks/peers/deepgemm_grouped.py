"""DeepGEMM's grouped GEMMs.

python -m benchmarks.peers.deepgemm_grouped masked-8x16-7168x2048   # compiles one kernel into its cache

Its contiguous layout wants every group to begin at a multiple of 128 rows. `GroupedDeepGemm` is given rows
that are padded already; `PaddingDeepGemm` copies them there in each call, as its user has to.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.operands import SCALE_BLOCK, GroupedOperands, padded_rows
from benchmarks.peers import deepgemm
from benchmarks.peers.base import Unsupported
from benchmarks.peers.torch_peer import TorchPeer, torch, wait
from benchmarks.timing import Call
from benchmarks.workloads import GroupedWorkload, select_grouped


def flat_groups(values: torch.Tensor, group_sizes: Sequence[int]) -> torch.Tensor:
    """[R, K] of ragged K as DeepGEMM takes it: [R, K of the group] of one group after the other, flat."""
    blocks = [-(-size // SCALE_BLOCK) * SCALE_BLOCK for size in group_sizes]
    return torch.cat([part.flatten() for part in values.split(blocks, dim=1)])


def _rows_fastest(scale: torch.Tensor) -> torch.Tensor:
    """f32 scales [*, R, Kb], laid out in DeepGEMM's own way, outside of the timing."""
    return deepgemm.import_deep_gemm().get_mn_major_tma_aligned_tensor(scale)


def _e4m3(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float8_e4m3fn)


Arrays = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"]


def bind(workload: GroupedWorkload, arrays: Arrays, *, copies_rows: bool = False) -> Call:
    """DeepGEMM on the device tensors of a workload.

    Args:
      workload: its kind, sizes and group sizes.
      arrays: lhs, lhs_scale, rhs, rhs_scale, group_sizes, as in GroupedOperands.
      copies_rows: whether a call of ragged_m copies its rows into the padded layout.

    Raises:
      Absent: DeepGEMM or nvcc is not installed.
      Unsupported: DeepGEMM refuses the workload.
    """
    make = {"ragged_m": functools.partial(_ragged_m, copies_rows=copies_rows), "masked": _masked,
            "ragged_k": _ragged_k}[workload.kind]
    try:
        run = make(workload, *arrays)
        out = run()
        wait(out)
    except RuntimeError as error:
        raise Unsupported(str(error).splitlines()[0]) from None
    if workload.kind == "ragged_k":
        out.zero_()  # it adds to what it finds there
    return Call(run, wait)


def _ragged_m(
    workload: GroupedWorkload,
    lhs: Any,
    lhs_scale: Any,
    rhs: Any,
    rhs_scale: Any,
    _: Any,
    *,
    copies_rows: bool,
) -> Callable[[], torch.Tensor]:
    deep_gemm = deepgemm.import_deep_gemm()
    rows, groups = (torch.from_numpy(x).cuda() for x in padded_rows(workload.group_sizes))
    if copies_rows and len(rows) == len(groups):
        raise Unsupported("no group needs padding")
    lhs_padded = torch.empty((len(groups), workload.k), dtype=torch.uint8, device="cuda")
    scale_padded = torch.empty((lhs_scale.shape[1], len(groups)), device="cuda")
    scale = lhs_scale.T.contiguous()  # M fastest, as DeepGEMM wants it
    source = torch.zeros(len(groups), dtype=torch.int64, device="cuda")  # padding may hold any row
    source[rows] = torch.arange(len(rows), device="cuda")
    weights = _e4m3(rhs), rhs_scale
    out = torch.empty((len(groups), workload.n), dtype=torch.bfloat16, device="cuda")

    def pad() -> None:
        # Eight bytes at a time: PyTorch copies elements.
        torch.index_select(lhs.view(torch.int64), 0, source, out=lhs_padded.view(torch.int64))
        torch.index_select(scale, 1, source, out=scale_padded)

    def run() -> torch.Tensor:
        if copies_rows:
            pad()
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (_e4m3(lhs_padded), scale_padded.T), weights, out, groups, disable_ue8m0_cast=True
        )
        return out

    pad()
    return run


def _masked(
    workload: GroupedWorkload, lhs: Any, lhs_scale: Any, rhs: Any, rhs_scale: Any, group_sizes: Any
) -> Callable[[], torch.Tensor]:
    deep_gemm = deepgemm.import_deep_gemm()
    tokens, weights = (_e4m3(lhs), _rows_fastest(lhs_scale)), (_e4m3(rhs), rhs_scale)
    out = torch.empty((*lhs.shape[:2], workload.n), dtype=torch.bfloat16, device="cuda")

    def run() -> torch.Tensor:
        deep_gemm.m_grouped_fp8_gemm_nt_masked(
            tokens, weights, out, group_sizes, workload.expected_group_size, disable_ue8m0_cast=True
        )
        return out

    return run


def _ragged_k(
    workload: GroupedWorkload, lhs: Any, lhs_scale: Any, rhs: Any, rhs_scale: Any, _: Any
) -> Callable[[], torch.Tensor]:
    deep_gemm = deepgemm.import_deep_gemm()
    sizes = [-(-size // SCALE_BLOCK) * SCALE_BLOCK for size in workload.group_sizes]
    on_device = torch.tensor(sizes, dtype=torch.int32, device="cuda")
    a = _e4m3(flat_groups(lhs, workload.group_sizes)), _rows_fastest(lhs_scale)
    b = _e4m3(flat_groups(rhs, workload.group_sizes)), _rows_fastest(rhs_scale)
    out = torch.zeros((workload.groups, workload.m, workload.n), device="cuda")

    def run() -> torch.Tensor:
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, out, sizes, on_device, out)
        return out

    return run


def _arrays(operands: GroupedOperands) -> Arrays:
    found = (operands.lhs, operands.lhs_scale, operands.rhs, operands.rhs_scale, operands.group_sizes)
    return tuple(map(torch.from_dlpack, found))


def _blank(workload: GroupedWorkload) -> Arrays:
    bits = lambda shape: torch.zeros(shape, dtype=torch.uint8, device="cuda")
    ones = lambda shape: torch.ones(shape, device="cuda")
    sizes = torch.tensor(workload.group_sizes, dtype=torch.int32, device="cuda")
    return (bits(workload.lhs_shape), ones(workload.lhs_scale_shape), bits(workload.rhs_shape),
            ones(workload.rhs_scale_shape), sizes)


class GroupedDeepGemm(TorchPeer):
    title = "DeepGEMM"
    note = (
        "m_grouped_fp8_gemm_nt_contiguous on rows padded to 128 beforehand, m_grouped_fp8_gemm_nt_masked, "
        "k_grouped_fp8_gemm_nt_contiguous, which always accumulates; scales in its own layout beforehand"
    )
    copies_rows = False

    def __init__(self):
        super().__init__()
        deepgemm.import_deep_gemm()

    def prepare(self, workloads: Sequence[GroupedWorkload], programs: bool = False) -> None:
        deepgemm.prepare((workload.name for workload in workloads), __name__)

    def bind(self, operands: GroupedOperands) -> Call:
        return bind(operands.workload, _arrays(operands), copies_rows=self.copies_rows)

    def to_host(self, workload: GroupedWorkload, result: torch.Tensor, rows: np.ndarray) -> np.ndarray:
        if workload.kind == "ragged_m":
            rows = padded_rows(workload.group_sizes)[0][rows]
        return super().to_host(workload, result, rows)


class PaddingDeepGemm(GroupedDeepGemm):
    title = "DeepGEMM with padding"
    note = "m_grouped_fp8_gemm_nt_contiguous and the copy of values and scales to the rows that it needs"
    copies_rows = True

    def prepare(self, workloads: Sequence[GroupedWorkload], programs: bool = False) -> None:
        """GroupedDeepGemm's kernels are the same."""

    def bind(self, operands: GroupedOperands) -> Call:
        if operands.workload.kind != "ragged_m":
            raise Unsupported("only its contiguous layout needs padding")
        return super().bind(operands)


if __name__ == "__main__":
    (_workload,) = select_grouped(sys.argv[1])
    bind(_workload, _blank(_workload))
