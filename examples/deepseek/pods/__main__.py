"""Compiles DeepSeek-V3 for pods of devices that are not there, checks what travels, and predicts a step.

    python -m examples.deepseek.pods                # writes docs/pods.json, and what docs/pods.md shows of it
    python -m examples.deepseek.pods --page-only    # the latter alone

Each mesh is compiled in a process of its own, with as many CPU devices: a minute and 2 GB of memory each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import jax
from tqdm import tqdm

from examples.deepseek.pods import compiled, page

MESHES = ((1, 64), (2, 32), (2, 64), (4, 64), (8, 64))  # data, expert
_DOCS = pathlib.Path(__file__).parents[3] / "docs"


def compile_alone(data: int, expert: int) -> dict[str, Any]:
    """`compiled.facts` of a mesh, from a process of its own."""
    done = subprocess.run([sys.executable, "-m", "examples.deepseek.pods", "--mesh", str(data), str(expert)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.deepseek.pods",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=_DOCS, metavar="DIR", help="where pods.md is")
    parser.add_argument("--page-only", action="store_true", help="compile nothing")
    parser.add_argument("--mesh", type=int, nargs=2, metavar=("DATA", "EXPERT"),
                        help="compile this one in this process, and print its numbers")
    args = parser.parse_args(arguments)
    if args.mesh:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", math.prod(args.mesh))
        print(json.dumps(compiled.facts(page.pod_config(*args.mesh), *args.mesh)))
        return 0
    path = args.out / "pods.json"
    if not args.page_only:
        meshes = [{"data": data, "expert": expert, **compile_alone(data, expert)}
                  for data, expert in tqdm(MESHES, unit="mesh")]
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        report = {"jax": jax.__version__, "date": today, "meshes": meshes}
        path.write_text(json.dumps(report, indent=1) + "\n")
    page.write(args.out, json.loads(path.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
