"""Memory of a GPU that is freed and taken again at the same addresses.

CUDA tells addresses and memory apart: a range of addresses is reserved once, and memory is mapped
to it and taken away again (the driver's virtual memory management). So what holds an address, such
as a CUDA graph, outlives the memory, as long as nobody reads it in between.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from types import SimpleNamespace
from weakref import finalize

import torch
from torch import Tensor

ALIGNMENT = 512  # bytes, of each tensor
# Numbers of cuda.h.
OUT_OF_MEMORY = 2
PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED: what stays on the device
DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Properties(ctypes.Structure):
    """CUmemAllocationProp: what kind of memory, and on which device."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc: who may do what with it."""

    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library, which PyTorch has loaded."""
    return ctypes.CDLL("libcuda.so.1")


def check(result: int, what: str) -> None:
    """Raise for a result of the driver that is an error."""
    if result == OUT_OF_MEMORY:
        raise torch.cuda.OutOfMemoryError(f"the GPU has no memory left to {what}")
    if result:
        raise RuntimeError(f"the CUDA driver could not {what}: error {result}")


class VirtualMemory:
    """A range of addresses on one device, and the memory behind it while it is mapped."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Reserve addresses; the memory comes with `map`."""
        index = device.index or 0
        location = Location(DEVICE, index)
        self._properties = Properties(type=PINNED, location=location)
        self._access = Access(location, READ_WRITE)
        granularity = ctypes.c_size_t()
        check(
            driver().cuMemGetAllocationGranularity(
                ctypes.byref(granularity), ctypes.byref(self._properties), ctypes.c_int(0)
            ),
            "tell its granularity",
        )
        self.device = device
        self.num_bytes = math.ceil(num_bytes / granularity.value) * granularity.value
        self._size = ctypes.c_size_t(self.num_bytes)
        self._address = ctypes.c_ulonglong()
        no_wish = ctypes.c_ulonglong(0)
        check(
            driver().cuMemAddressReserve(
                ctypes.byref(self._address), self._size, ctypes.c_size_t(0), no_wish, no_wish
            ),
            f"reserve {self.num_bytes} bytes of addresses",
        )
        self._num_used = 0  # bytes that tensors have been made of
        self._is_mapped = [False]  # a list, as `finalize` must see what becomes of it
        finalize(self, _free, self._address, self._size, self._is_mapped).atexit = False

    def map(self) -> None:
        """Take memory; torch.cuda.OutOfMemoryError if there is none. It holds anything."""
        torch.cuda.empty_cache()  # what PyTorch keeps for later is nobody's
        handle = ctypes.c_ulonglong()
        check(
            driver().cuMemCreate(
                ctypes.byref(handle),
                self._size,
                ctypes.byref(self._properties),
                ctypes.c_ulonglong(0),
            ),
            f"take {self.num_bytes} bytes",
        )
        result = driver().cuMemMap(
            self._address, self._size, ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0)
        )
        # The mapping keeps the memory; without it, this frees it.
        check(driver().cuMemRelease(handle), "release a handle")
        check(result, "map memory")
        self._is_mapped[0] = True
        check(
            driver().cuMemSetAccess(
                self._address, self._size, ctypes.byref(self._access), ctypes.c_size_t(1)
            ),
            "allow access",
        )

    def unmap(self) -> None:
        """Give the memory back. Nothing may be reading it, or read it before the next `map`."""
        torch.cuda.synchronize(self.device)
        check(driver().cuMemUnmap(self._address, self._size), "unmap memory")
        self._is_mapped[0] = False

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a tensor of the next free addresses. It does not own them."""
        num_bytes = math.prod(shape) * dtype.itemsize
        assert self._num_used + num_bytes <= self.num_bytes
        data = (self._address.value + self._num_used, False)  # False: not read-only
        self._num_used += padded(num_bytes)
        memory = {"shape": (num_bytes,), "typestr": "|u1", "data": data, "version": 2}
        interface = SimpleNamespace(__cuda_array_interface__=memory)
        return torch.as_tensor(interface, device=self.device).view(dtype).view(shape)


def padded(num_bytes: int) -> int:
    """Round up, so that the tensor behind one of so many bytes is aligned."""
    return math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT


def _free(address: ctypes.c_ulonglong, size: ctypes.c_size_t, is_mapped: list[bool]) -> None:
    if is_mapped[0]:
        driver().cuMemUnmap(address, size)
    driver().cuMemAddressFree(address, size)
