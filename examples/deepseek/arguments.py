"""Arguments that the programs share."""

from __future__ import annotations

import argparse
import json
from typing import Any

from examples.deepseek.mesh import AXES, ONE_DEVICE, Layout, make_mesh


def named_value(text: str) -> tuple[str, Any]:
    """"NAME=VALUE" -> the name and the value, JSON or, where it is none, a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=SIZE", type=named_value,
                        help="sizes of the mesh axes data, expert and tensor, from far to near: devices of a "
                             "host differ in the last one; one device by default")


def layout_of(pairs: list[tuple[str, Any]]) -> Layout:
    """The layout of an argument --mesh.

    Raises:
      ValueError: an axis that does not exist or comes twice, a size that is none, or too few devices.
    """
    if not pairs:
        return ONE_DEVICE
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or not set(names) <= set(AXES):
        raise ValueError(f"--mesh: expected each of {', '.join(AXES)} once at most, got {', '.join(names)}")
    for name, size in pairs:
        if type(size) is not int:
            raise ValueError(f"--mesh: {name}: expected a whole number, got {size!r}")
    others = [axis for axis in AXES if axis not in names]
    return Layout(make_mesh(**dict(pairs), order=(*others, *names)))
