"""Memory-map ranges of a local file; each is unmapped separately once unused.

Processes that map the same file share its pages. Python's mmap would keep one file descriptor
open per mapping, and a model has hundreds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any


def map_range(descriptor: int, start: int, size: int) -> Any:
    """`size` bytes of an open file, starting at byte `start`, as a writable buffer.

    Writes are private and never reach the file. OSError if it cannot be mapped.
    """
    if size == 0:
        return bytearray()
    before = start % mmap.ALLOCATIONGRANULARITY
    length = before + size
    address = _mmap(
        None,
        length,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE,
        descriptor,
        start - before,
    )
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    buffer = (ctypes.c_char * size).from_address(address + before)
    finalizer = weakref.finalize(buffer, _munmap, address, length)
    finalizer.atexit = False  # tensors may still be in use, and the OS cleans up
    return buffer


_LIBC = ctypes.CDLL(None, use_errno=True)
_FAILED = ctypes.c_void_p(-1).value

_mmap = _LIBC.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,  # off_t, on 64-bit systems
]
_munmap = _LIBC.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
