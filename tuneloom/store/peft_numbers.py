"""Whether the numbers of a safetensors file are finite: looked at as bits, without loading them as tensors."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Infinities and NaN have all bits of the exponent set.
_EXPONENTS = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
_PIECE_BYTES = 4 << 20


class Span(NamedTuple):
    """Where a tensor is in the file, in bytes from its start."""

    name: str
    dtype: str
    begin: int
    end: int


def find_not_finite(path: Path, spans: Iterable[Span]) -> str | None:
    """The name of the first tensor that holds an infinity or NaN."""
    with path.open("rb") as file:
        for name, dtype, begin, end in spans:
            kind, exponent = _EXPONENTS[dtype]
            file.seek(begin)
            for at in range(begin, end, _PIECE_BYTES):
                bits = np.frombuffer(file.read(min(_PIECE_BYTES, end - at)), kind)
                if ((bits & exponent) == exponent).any():
                    return name
    return None
