"""Words in the host's memory that all GPUs and CPUs of a host read and write."""

import ctypes
import struct
from multiprocessing.shared_memory import SharedMemory

import torch


class HostWords:
    """int32 words that the ranks' GPUs wait for.

    A CPU can end such a wait by writing the word. It could not by a launch, were the word in the GPU's memory: a rank
    may have launched so much that the driver makes it wait, and every other thread of its process with it.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory.buf))  # of the GPU, too
        self._check(torch.cuda.cudart().cudaHostRegister(self.address, memory.size, 0))

    def write(self, index: int, *values: int) -> None:
        struct.pack_into(f"{len(values)}I", self.memory.buf, 4 * index, *values)

    def close(self) -> None:
        self._check(torch.cuda.cudart().cudaHostUnregister(self.address))

    def _check(self, error: int) -> None:
        if int(error):
            raise RuntimeError(f"sharing {self.memory.size} bytes of host memory with the GPU failed: {error}")
