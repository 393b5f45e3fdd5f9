"""What the peers that PyTorch feeds have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers.base import Absent, Peer

try:
    import torch
except ImportError as error:
    raise Absent(f"PyTorch is not installed: {error}") from None


def wait(_: Any) -> None:
    torch.cuda.synchronize()


def on_device(host: np.ndarray) -> torch.Tensor:
    """A host array on the GPU; e4m3 bits (uint8) become e4m3."""
    tensor = torch.from_numpy(host).cuda()
    return tensor.view(torch.float8_e4m3fn) if host.dtype == np.uint8 else tensor


class TorchPeer(Peer):
    """A peer whose results are torch tensors."""

    def __init__(self):
        if not torch.cuda.is_available():
            raise Absent("PyTorch has no CUDA device")
        if torch.cuda.get_device_capability() != (9, 0):
            raise Absent(f"it needs a Hopper GPU, this is a {torch.cuda.get_device_name()}")

    def to_host(self, workload: Any, result: torch.Tensor, rows: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(rows).to(result.device)
        return result.flatten(end_dim=-2)[rows].float().cpu().numpy()
