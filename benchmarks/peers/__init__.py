"""Who is compared: a peer computes the same product on the same data, or is absent for a stated reason."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping

from benchmarks.peers.base import Absent, Peer, Unsupported

__all__ = ["GROUPED_PEERS", "PEERS", "Absent", "Peer", "Unsupported", "load"]

# Name in the JSON files -> module, class. In the order of the tables.
PEERS = {
    "fp8_gemm": ("jax_peers", "Fp8Gemm"),
    "jnp_bf16": ("jax_peers", "JnpBf16"),
    "xla_fp8": ("jax_peers", "XlaFp8"),
    "deepgemm": ("deepgemm", "DeepGemm"),
    "cublaslt_block": ("cublaslt", "CublasLtBlock"),
    "cublaslt_fast": ("cublaslt", "CublasLtFast"),
    "cutlass_block": ("cutlass", "CutlassBlock"),
}


GROUPED_PEERS = {
    "fp8_gemm": ("jax_grouped", "GroupedFp8Gemm"),
    "ragged_dot_bf16": ("jax_grouped", "RaggedDot"),
    "tokamax_bf16": ("jax_grouped", "Tokamax"),
    "deepgemm": ("deepgemm_grouped", "GroupedDeepGemm"),
    "deepgemm_padding": ("deepgemm_grouped", "PaddingDeepGemm"),
}


def load(
    names: Iterable[str] = tuple(PEERS), table: Mapping[str, tuple[str, str]] = PEERS
) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that this machine has, by name, and why the others are absent, by name.

    Raises:
      ValueError: a name that `table` does not have.
    """
    present: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    for name in names:
        if name not in table:
            raise ValueError(f"peers: expected names among {list(table)}, got {name!r}")
        module, cls = table[name]
        try:
            present[name] = getattr(importlib.import_module(f"benchmarks.peers.{module}"), cls)()
        except (Absent, ImportError) as error:
            absent[name] = f"{error}"
    return present, absent
