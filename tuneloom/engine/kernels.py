"""The loops of `kernels.c`, for CPUs that have AVX512-BF16: built once on this machine, called on torch tensors.

Everything here has a plain form in torch that serves where there is no such CPU, no compiler, or no permission to use
them (`EngineConfig.kernels`). Tensors are bf16 on the CPU with a contiguous last dimension.

Shapes: T tokens · K inputs · N outputs · H heads · D head width
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tuneloom.engine.pages import Arena

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = (
    *("-O3", "-std=c11", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)
# As in the source.
_BLOCK = 48
_BUILD_TIMEOUT_S = 60.0

_P, _I, _F, _C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "attend": (_C, [*[_P, _I, _I] * 3, _P, _P, _I, _I, _I, _P, _P, *[_I] * 5, _F, _P, _C]),
    "add_lora": (_C, [_P, _I, _P, _I, _I, _I, *[_P] * 5, _I, _I, _C]),
    "linear": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _C]),
    "rotate": (None, [_P, _I, _P, _P, _I, _I, _I, _C]),
    "rms_norm": (None, [_P, _I, _P, _P, _I, _I, _F, _F, _C, _C]),
    "silu_mul": (None, [_P, _I, _P, _I, _I, _C]),
}


class Kernels:
    """The functions of one built library. They use as many threads as torch does in the calling thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        self._arena = Arena()

    def attend(
        self,
        query_THD: Tensor,
        key_TCD: Tensor,
        value_TCD: Tensor,
        key_BCLD: Tensor,
        value_BCLD: Tensor,
        slots_T: Tensor,
        positions_T: Tensor,
        *,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """Write the tokens' keys and values, and return (T, H, D): each token sees its slot up to its position.

        Key and value caches have the same strides, and D is a multiple of 32.
        """
        count, heads, width = query_THD.shape
        out = query_THD.new_empty(count, heads, width)
        failed = self._library.attend(
            *(query_THD.data_ptr(), query_THD.stride(0), query_THD.stride(1)),
            *(key_TCD.data_ptr(), key_TCD.stride(0), key_TCD.stride(1)),
            *(value_TCD.data_ptr(), value_TCD.stride(0), value_TCD.stride(1)),
            *(key_BCLD.data_ptr(), value_BCLD.data_ptr(), *key_BCLD.stride()[:3]),
            *(slots_T.data_ptr(), positions_T.data_ptr()),
            *(count, heads, key_BCLD.shape[1], width, window or 0, scaling),
            *(out.data_ptr(), torch.get_num_threads()),
        )
        if failed:
            raise MemoryError("no memory for the scores of attention")
        return out

    def pack_linear(self, weight_NK: Tensor) -> Tensor:
        """A weight as `linear` reads it; K is even."""
        outputs, inputs = weight_NK.shape
        blocks = -(-outputs // _BLOCK)
        packed = self._arena.take(blocks * _BLOCK * inputs, torch.bfloat16).view(blocks, inputs // 2, _BLOCK, 2)
        whole = outputs // _BLOCK
        packed[:whole] = weight_NK[: whole * _BLOCK].view(whole, _BLOCK, inputs // 2, 2).transpose(1, 2)
        if whole < blocks:
            packed[whole].zero_()
            packed[whole, :, : outputs - whole * _BLOCK] = (
                weight_NK[whole * _BLOCK :].view(-1, inputs // 2, 2).transpose(0, 1)
            )
        return packed

    def linear(self, x_TK: Tensor, packed: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
        """(T, N): `x W^T + b` with a packed weight."""
        count, inputs = x_TK.shape
        y_TN = x_TK.new_empty(count, num_outputs)
        self._library.linear(
            *(x_TK.data_ptr(), x_TK.stride(0), packed.data_ptr(), None if bias_N is None else bias_N.data_ptr()),
            *(y_TN.data_ptr(), count, inputs, num_outputs, torch.get_num_threads()),
        )
        return y_TN

    def add_lora(
        self, x_TK: Tensor, y_TN: Tensor, columns: Tensor, factors: Tensor, runs: "SlotRuns", max_rank: int
    ) -> None:
        """Add each token's update to `y_TN`; `factors` (slots, parts, 3) as `stacks.NativeStacks` has them."""
        failed = self._library.add_lora(
            *(x_TK.data_ptr(), x_TK.stride(0), y_TN.data_ptr(), y_TN.stride(0)),
            *(x_TK.shape[1], len(columns) - 1, columns.data_ptr(), factors.data_ptr()),
            *(runs.rows.data_ptr(), runs.starts.data_ptr(), runs.slots.data_ptr(), len(runs.slots)),
            *(max_rank, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError("no memory for the hidden rows of adapters")

    def rotate(self, x_TN: Tensor, cos_TD: Tensor, sin_TD: Tensor, heads: int) -> None:
        """Rotary positions for the first `heads` heads of each row, in place; D is a multiple of 32."""
        self._library.rotate(
            *(x_TN.data_ptr(), x_TN.stride(0), cos_TD.data_ptr(), sin_TD.data_ptr()),
            *(x_TN.shape[0], heads, cos_TD.shape[1], torch.get_num_threads()),
        )

    def rms_norm(self, x: Tensor, weight_K: Tensor, *, eps: float, offset: float, rounds: bool) -> Tensor:
        """`x / rms(x) * (offset + weight)` over the last dimension; `rounds`: the quotient becomes bf16 first."""
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        self._library.rms_norm(
            *(rows.data_ptr(), rows.stride(0), weight_K.data_ptr(), out.data_ptr(), *rows.shape),
            *(eps, offset, rounds, torch.get_num_threads()),
        )
        return out.view(x.shape)

    def silu_mul(self, x_TN: Tensor) -> Tensor:
        """(T, N / 2): silu of the first half of each row times the second half."""
        count, width = x_TN.shape[0], x_TN.shape[1] // 2
        out = x_TN.new_empty(count, width)
        self._library.silu_mul(x_TN.data_ptr(), x_TN.stride(0), out.data_ptr(), count, width, torch.get_num_threads())
        return out


class SlotRuns:
    """Tokens by the slot of their adapter: run g is rows[starts[g]] .. rows[starts[g + 1]], all of slots[g]."""

    def __init__(self, rows_by_slot: dict[int, list[int]]) -> None:
        starts = [0]
        for rows in rows_by_slot.values():
            starts.append(starts[-1] + len(rows))
        self.rows = torch.tensor([row for rows in rows_by_slot.values() for row in rows], dtype=torch.long)
        self.starts = torch.tensor(starts, dtype=torch.long)
        self.slots = torch.tensor(list(rows_by_slot), dtype=torch.long)


def is_supported() -> bool:
    """Whether this CPU has what the kernels are written for."""
    return torch.cpu._is_avx512_bf16_supported()


@functools.cache
def load() -> Kernels | None:
    """The kernels, built if this is the first time on this machine; None where they cannot be had."""
    if not is_supported():
        return None
    try:
        return Kernels(ctypes.CDLL(str(_build())))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("no kernels, torch's own operators serve: %s", detail)
        return None


def _build() -> Path:
    """The library for this source and compiler, in the user's cache folder."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    version = _run(compiler, "--version")
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(b"\0".join([source, version.encode(), " ".join(_FLAGS).encode()])).hexdigest()[:16]
    target = _cache_folder() / f"kernels-{digest}.so"
    if not target.exists():
        descriptor, draft = tempfile.mkstemp(dir=target.parent, suffix=".so")
        os.close(descriptor)
        try:
            _run(compiler, *_FLAGS, str(_SOURCE), "-o", draft, "-lm")
            # Renamed when whole: several replicas may build at once.
            os.replace(draft, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
    return target


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_BUILD_TIMEOUT_S).stdout


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "tuneloom"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
