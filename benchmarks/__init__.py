"""Benchmarks of jax_fp8gemm; README.md here says what is measured and how."""
