"""FP8 GEMMs with block scales for JAX, on hand-written Hopper kernels."""

from jax_fp8gemm.gemm import (
    fp8_gemm,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    group_sizes_from_ids,
)
from jax_fp8gemm.jit.settings import limit_sms
from jax_fp8gemm.moe import permute, unpermute
from jax_fp8gemm.primitives import export_checks, save_gemms
from jax_fp8gemm.quantize import dequantize, quantize, quantize_swiglu, quantize_transposed
from jax_fp8gemm.scaling import ScaledArray, ragged_k_size, register_flax_serialization

__version__ = "0.1.0"

__all__ = [
    "ScaledArray",
    "dequantize",
    "export_checks",
    "fp8_gemm",
    "fp8_gemm_masked",
    "fp8_gemm_ragged_k",
    "fp8_gemm_ragged_m",
    "group_sizes_from_ids",
    "limit_sms",
    "permute",
    "quantize",
    "quantize_swiglu",
    "quantize_transposed",
    "ragged_k_size",
    "register_flax_serialization",
    "save_gemms",
    "unpermute",
]
