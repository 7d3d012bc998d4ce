"""Memory for tensors straight from the kernel: pages that cost nothing until written, and large ones. No plans."""

import contextlib
import math
import mmap
import threading

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CHUNK_BYTES = 32 << 20
_LINE_BYTES = 64
# Of Linux; Python's `mmap` module names it from 3.13 on.
_MAP_NORESERVE = 0x4000


def lazy_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that cost no memory until they are written: on a CPU the pages come from the kernel on first touch."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    # Straight from the kernel: the C allocator hands out recycled memory, and writes zeros over it.
    # Not reserved: the kernel refuses a single mapping above all of the memory, even if little of it gets used.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def huge_pages(count: int, dtype: torch.dtype) -> Tensor:
    """Memory of the CPU for `count` numbers that will all be written: in large pages, which are found faster."""
    size = (count * dtype.itemsize // _HUGE_PAGE + 1) * _HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)[:count]


class Arena:
    """Parts of large pages, one behind the other and each at the start of a cache line.

    What is handed out never comes back; the pages go when nothing of a chunk is in use any more. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for `count` numbers, not initialised."""
        size = -(-count * dtype.itemsize // _LINE_BYTES) * _LINE_BYTES
        with self._lock:
            if size > len(self._rest):
                self._rest = huge_pages(max(size, _CHUNK_BYTES), torch.uint8)
            part, self._rest = self._rest[:size], self._rest[size:]
        return part[: count * dtype.itemsize].view(dtype)
