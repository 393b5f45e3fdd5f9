"""FP8 GEMMs with block scales for JAX, on hand-written Hopper kernels."""

from jax_fp8gemm.autodiff import dot, feed_forward, ragged_dot, ragged_feed_forward
from jax_fp8gemm.autodiff_rules import GEMM_NAME, RESIDUAL_NAME
from jax_fp8gemm.dot_general import Fp8FallbackWarning, dot_general
from jax_fp8gemm.gemm import (
    fp8_gemm,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
    group_sizes_from_ids,
)
from jax_fp8gemm.hosts import check_hosts
from jax_fp8gemm.interop import from_qarray, to_qarray
from jax_fp8gemm.jit.settings import limit_sms
from jax_fp8gemm.moe import permute, unpermute
from jax_fp8gemm.prepared import PreparedWeight, prepare
from jax_fp8gemm.primitives import export_checks, save_dense_gemms, save_gemms
from jax_fp8gemm.quantize import dequantize, quantize, quantize_swiglu, quantize_transposed
from jax_fp8gemm.quantize_training import quantize_both, quantize_swiglu_backward, quantize_weights
from jax_fp8gemm.scaling import ScaledArray, ragged_k_size, register_flax_serialization

__version__ = "0.1.0"

__all__ = [
    "GEMM_NAME",
    "RESIDUAL_NAME",
    "Fp8FallbackWarning",
    "PreparedWeight",
    "ScaledArray",
    "check_hosts",
    "dequantize",
    "dot",
    "dot_general",
    "export_checks",
    "feed_forward",
    "fp8_gemm",
    "fp8_gemm_masked",
    "fp8_gemm_ragged_k",
    "fp8_gemm_ragged_m",
    "from_qarray",
    "group_sizes_from_ids",
    "limit_sms",
    "permute",
    "prepare",
    "quantize",
    "quantize_both",
    "quantize_swiglu",
    "quantize_swiglu_backward",
    "quantize_transposed",
    "quantize_weights",
    "ragged_dot",
    "ragged_feed_forward",
    "ragged_k_size",
    "register_flax_serialization",
    "save_dense_gemms",
    "save_gemms",
    "to_qarray",
    "unpermute",
]
