"""What a peer is."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.operands import GroupedOperands, Operands
from benchmarks.timing import Call
from benchmarks.workloads import GroupedWorkload, Workload


class Absent(Exception):
    """This machine does not have the peer; the message says what is missing."""


class Unsupported(Exception):
    """The peer cannot run a workload; the message says why."""


class Peer(abc.ABC):
    """An implementation of the dense GEMM of a `Workload`, or of the grouped ones of a `GroupedWorkload`.

    A new peer is a subclass and a line in PEERS or GROUPED_PEERS. Its constructor raises Absent.

    Attributes:
      title: its name in tables.
      note: one line on what exactly it computes.
      uses_scales: whether it computes with the block scales of the operands; if not, with their bare values.
    """

    title: str
    note: str
    uses_scales: bool = True

    def prepare(  # noqa: B027
        self, workloads: Sequence[Workload | GroupedWorkload], programs: bool = False
    ) -> None:
        """Compiles what the workloads need, in parallel, so that `bind` is quick.

        Args:
          workloads: what will be bound.
          programs: whether `bind_program` will be called too.

        Raises:
          Absent: it turns out that the peer cannot be built here.
        """

    @abc.abstractmethod
    def bind(self, operands: Operands | GroupedOperands) -> Call:
        """Puts the operands on the device in the peer's own layout; the call then runs nothing but the GEMM.

        Raises:
          Unsupported: this workload is beyond the peer.
        """

    def bind_program(self, operands: Operands | GroupedOperands) -> Call | None:
        """The workload's `program_calls` GEMMs in one jitted program, each on a copy of the operands.

        None for peers outside JAX.
        """
        return None

    @abc.abstractmethod
    def to_host(self, workload: Workload | GroupedWorkload, result: Any, rows: np.ndarray) -> np.ndarray:
        """Some rows of a call's result, its leading axes flattened, as f32 [len(rows), N]."""
