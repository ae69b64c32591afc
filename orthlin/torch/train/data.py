"""Text to tokens, and batches that are a pure function of the seed and the step."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orthlin.errors import OptionError

TOKENS = ("auto", "chars", "bytes")
VALIDATION = 0.1
"""The last part of the text, which is not trained on."""
LIBRARY_BYTES = 4_000_000
"""How much of the standard library's text is used where no file is named."""
MAX_CHARS = 256
EVALUATION_SEED = 2509_11983

Array = npt.NDArray[Any]


class Text(NamedTuple):
    """A text as tokens; the vocabulary is its characters in order, or "bytes"."""

    name: str
    sha256: str
    vocabulary: str
    train: Array
    validation: Array

    @property
    def vocabulary_size(self) -> int:
        """Return the number of different tokens."""
        return 256 if self.vocabulary == "bytes" else len(self.vocabulary)


def standard_library() -> bytes:
    """Return the start of the concatenated ``.py`` files of Python's standard library, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    text = bytearray()
    for name in names:
        if len(text) < LIBRARY_BYTES and not {"site-packages", "dist-packages"} & set(name.parts):
            text += (root / name).read_bytes()
    return bytes(text[:LIBRARY_BYTES])


def read_text(path: Path | None, tokens: str, context: int) -> Text:
    """Read a file, or the standard library for None, and split it 90 to 10 into training and validation."""
    name = str(path or "the Python standard library")
    try:
        raw = path.read_bytes() if path else standard_library()
    except OSError as problem:
        raise OptionError(f"text {name}: {problem.strerror}") from problem
    vocabulary, ids = _encode(raw, tokens, name)
    cut = int(len(ids) * (1 - VALIDATION))
    text = Text(name, hashlib.sha256(raw).hexdigest(), vocabulary, ids[:cut], ids[cut:])
    for part, given in (("training", text.train), ("validation", text.validation)):
        if len(given) <= context:
            raise OptionError(
                f"text {name}: {len(ids)} tokens leave {len(given)} for {part}; "
                f"--context {context} needs at least {context + 1}"
            )
    return text


def _encode(raw: bytes, tokens: str, name: str) -> tuple[str, Array]:
    """Return the vocabulary and the ids; "auto" is characters where the text has at most 256 of them."""
    if tokens != "bytes":
        try:
            # As Python reads a text file: every end of line is one character.
            text = raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as problem:
            if tokens == "chars":
                raise OptionError(f"text {name}: not UTF-8 at byte {problem.start}; --tokens bytes reads it") from None
        else:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            found, ids = np.unique(codes, return_inverse=True)
            if tokens == "chars" or len(found) <= MAX_CHARS:
                return "".join(map(chr, found)), ids.astype(np.int32)
    return "bytes", np.frombuffer(raw, dtype=np.uint8)


def windows(ids: Array, context: int, batch: int, seed: list[int]) -> Array:
    """Draw `batch` windows of ``context + 1`` tokens, shape (batch, context + 1); equal seeds draw equal windows."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - context, size=(batch, 1))
    drawn: Array = ids[starts + np.arange(context + 1)].astype(np.int64)
    return drawn


def training_batch(text: Text, context: int, batch: int, seed: int, step: int) -> Array:
    """Return the windows of one step, the same for every optimizer."""
    return windows(text.train, context, batch, [seed, step])


def evaluation_batches(text: Text, context: int, batch: int, count: int) -> Iterator[Array]:
    """Yield the fixed validation windows, the same for every run on this text."""
    for index in range(count):
        yield windows(text.validation, context, batch, [EVALUATION_SEED, index])
