"""Python's standard library as bytes: what a step trains on depends on its position and the seed alone."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig

import numpy as np

# Between files; no source has it.
_SEPARATOR = b"\0"
_NOT_THE_LIBRARY = {"site-packages", "dist-packages"}
_FILES_PER_VALIDATION_FILE = 20


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The bytes [length] uint8 of the files to train on, and of those that are kept for validation."""

    train: np.ndarray
    validation: np.ndarray

    def digest(self) -> str:
        """Names the content: equal for equal bytes."""
        return hashlib.sha256(self.train.tobytes() + b"|" + self.validation.tobytes()).hexdigest()[:16]


def read_corpus(folder: pathlib.Path | None = None) -> Corpus:
    """The Python files below `folder`, by default the standard library of this Python, each content once.

    Files are sorted by the hash of their content, which also says which one in twenty is for validation: the
    same files give the same corpus wherever they lie.

    Raises:
      ValueError: no file is for training, or none for validation.
    """
    folder = pathlib.Path(folder or sysconfig.get_path("stdlib"))
    contents = {}
    for path in folder.rglob("*.py"):
        if not _NOT_THE_LIBRARY & set(path.relative_to(folder).parts):
            content = path.read_bytes()
            contents[hashlib.sha256(content).digest()] = content
    parts = {True: [], False: []}
    for digest, content in sorted(contents.items()):
        # Other bytes than those that the files are sorted by first.
        parts[int.from_bytes(digest[-4:], "big") % _FILES_PER_VALIDATION_FILE == 0].append(content)
    for is_validation, files in parts.items():
        if not files:
            raise ValueError(f"read_corpus: folder: expected Python files, enough to keep one in "
                             f"{_FILES_PER_VALIDATION_FILE} for validation, got {len(contents)} in {folder}, "
                             f"none of them for {'validation' if is_validation else 'training'}")
    return Corpus(*(np.frombuffer(_SEPARATOR.join(parts[kind]), np.uint8) for kind in (False, True)))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Sequences of a text in an order that the seed gives: no state, so that a run resumes anywhere.

    An epoch cuts the text into sequences from an offset of its own, and has each once.

    Attributes:
      text: [length] uint8.
      length: tokens of a sequence, without the one that is only predicted.
      seed: of the offsets and of the order.
    """

    text: np.ndarray
    length: int
    seed: int

    def __post_init__(self):
        if self.per_epoch < 1:
            raise ValueError(f"Sampler: text: expected more than {2 * self.length} bytes for sequences of "
                             f"{self.length}, got {len(self.text)}")

    @property
    def per_epoch(self) -> int:
        return (len(self.text) - 1) // self.length - 1  # one less, for any offset

    def batch(self, position: int, size: int) -> np.ndarray:
        """Sequences position to position + size of the run, [size, length + 1] int32."""
        return np.stack([self._sequence(position + idx) for idx in range(size)]).astype(np.int32)

    def _sequence(self, position):
        epoch, idx = divmod(position, self.per_epoch)
        offset, order = _epoch_order(self.seed, epoch, self.length, self.per_epoch)
        start = offset + order[idx] * self.length
        return self.text[start : start + self.length + 1]


@functools.lru_cache(maxsize=4)
def _epoch_order(seed, epoch, length, per_epoch):
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(rng.integers(length)), rng.permutation(per_epoch)
