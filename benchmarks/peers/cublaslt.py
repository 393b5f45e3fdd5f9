"""cuBLASLt through PyTorch: with block scales, and with one scale per tensor."""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, scaled_mm

from benchmarks.operands import Operands
from benchmarks.peers.base import Unsupported
from benchmarks.peers.torch_peer import TorchPeer, on_device, wait
from benchmarks.timing import Call

_PITCH = 4  # cuBLASLt wants the K-blocks of the rhs scales padded to whole 16 bytes


def _checked(call: Call) -> Call:
    """The call, once it has run: cuBLASLt says only then what it does not support."""
    try:
        call.wait(call.run())
    except (RuntimeError, ValueError) as error:
        raise Unsupported(str(error).splitlines()[0]) from None
    return call


class CublasLtBlock(TorchPeer):
    title = "cuBLASLt block-scaled"
    note = "torch.nn.functional.scaled_mm, BlockWise1x128 lhs and BlockWise128x128 rhs"

    def bind(self, operands: Operands) -> Call:
        lhs, rhs = on_device(operands.lhs), on_device(operands.rhs)
        lhs_scale = on_device(operands.lhs_scale).T.contiguous().T  # M fastest
        rhs_scale = on_device(operands.rhs_scale)
        padded = torch.nn.functional.pad(rhs_scale, (0, -rhs_scale.shape[1] % _PITCH)).T  # K fastest

        def run() -> torch.Tensor:
            return scaled_mm(
                lhs,
                rhs.T,
                lhs_scale,
                ScalingType.BlockWise1x128,
                padded,
                ScalingType.BlockWise128x128,
                output_dtype=torch.bfloat16,
            )

        return _checked(Call(run, wait))


class CublasLtFast(TorchPeer):
    title = "cuBLASLt tensor-wise, fast"
    note = "one scale per tensor and no promotion: not the same work, but what the tensor cores can do"
    uses_scales = False

    def bind(self, operands: Operands) -> Call:
        lhs, rhs = on_device(operands.lhs), on_device(operands.rhs)
        one = torch.ones((), device="cuda")

        def run() -> torch.Tensor:
            return scaled_mm(
                lhs,
                rhs.T,
                one,
                ScalingType.TensorWise,
                one,
                ScalingType.TensorWise,
                output_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        return _checked(Call(run, wait))
