"""What a peer is."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.operands import Operands
from benchmarks.timing import Call
from benchmarks.workloads import Workload


class Absent(Exception):
    """This machine does not have the peer; the message says what is missing."""


class Unsupported(Exception):
    """The peer cannot run a workload; the message says why."""


class Peer(abc.ABC):
    """An implementation of out[M, N] = lhs[M, K] @ rhs[N, K].T with a bf16 result.

    A new peer is a subclass in a module of its own and a line in PEERS. Its constructor raises Absent.

    Attributes:
      title: its name in tables.
      note: one line on what exactly it computes.
      uses_scales: whether it computes with the block scales of the operands; if not, with their bare values.
    """

    title: str
    note: str
    uses_scales: bool = True

    def prepare(self, workloads: Sequence[Workload], calls: Sequence[int] = (1,)) -> None:  # noqa: B027
        """Compiles what the workloads need, in parallel, so that `bind` is quick.

        Args:
          workloads: what will be bound.
          calls: GEMMs in a program: 1 for `bind`, others for `bind_program`.

        Raises:
          Absent: it turns out that the peer cannot be built here.
        """

    @abc.abstractmethod
    def bind(self, operands: Operands) -> Call:
        """Puts the operands on the device in the peer's own layout; the call then runs nothing but the GEMM.

        Raises:
          Unsupported: this workload is beyond the peer.
        """

    def bind_program(self, operands: Operands, calls: int) -> Call | None:
        """`calls` GEMMs on copies of the operands in one jitted program; None for peers outside JAX."""
        return None

    @abc.abstractmethod
    def to_host(self, result: Any, rows: np.ndarray) -> np.ndarray:
        """Some rows of a call's result as f32 [len(rows), N]."""
