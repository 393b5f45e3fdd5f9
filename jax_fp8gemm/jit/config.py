"""How a kernel is tiled."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """One tiling of the GEMM kernel.

    Attributes:
      block_m, block_n: the output tile of a CTA.
      num_stages: depth of the shared-memory ring; a stage holds one 128-block of K of both operands.
      num_consumers: warpgroups that multiply (one more warpgroup loads).
      swap_ab: put rhs on wgmma's M side (64 rows an instruction) and lhs, the tokens, on its N side (8).
      cluster_m, cluster_n: CTAs of a cluster along M (they share the rhs tile) and N (the lhs tile) by
        multicast.
      split_k: CTAs of a cluster that share one output tile, each with a part of K, summed through distributed
        shared memory in a fixed order.
      raster_group: cluster tiles along M in a band; a band is walked M first: its operands stay in L2.
      out_buffers: chunks of output that a consumer may have on the way to global memory.
      partials: products of 64 rows with one block of K that a consumer has in flight, each in registers of
        its own.
    """

    block_m: int
    block_n: int
    num_stages: int
    num_consumers: int = 2
    swap_ab: bool = False
    cluster_m: int = 1
    cluster_n: int = 1
    split_k: int = 1
    raster_group: int = 8
    out_buffers: int = 2
    partials: int = 1

    def __str__(self) -> str:
        parts = [f"{self.block_m}x{self.block_n}", f"stages {self.num_stages}",
                 f"consumers {self.num_consumers}"]
        if self.swap_ab:
            parts.append("swap-AB")
        if self.partials > 1:
            parts.append(f"partials {self.partials}")
        if self.cluster_m * self.cluster_n > 1:
            parts.append(f"cluster {self.cluster_m}x{self.cluster_n}")
        if self.split_k > 1:
            parts.append(f"split-K {self.split_k}")
        else:
            parts.append(f"raster {self.raster_group}, out buffers {self.out_buffers}")
        return ", ".join(parts)

    @property
    def cluster_size(self) -> int:
        return self.cluster_m * self.cluster_n * self.split_k
