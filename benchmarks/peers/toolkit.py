"""Where the CUDA toolkit is, for the peers that compile with nvcc."""

from __future__ import annotations

import os
import pathlib
import shutil

from benchmarks.peers.base import Absent


def cuda_home() -> pathlib.Path:
    """The toolkit's folder: CUDA_HOME, the usual place, or where nvcc on the PATH lies.

    Raises:
      Absent: there is no nvcc.
    """
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and os.access(pathlib.Path(home) / "bin" / "nvcc", os.X_OK):
            return pathlib.Path(home)
    if nvcc := shutil.which("nvcc"):
        return pathlib.Path(nvcc).resolve().parent.parent
    raise Absent("nvcc is not installed: install a CUDA toolkit or set CUDA_HOME")
