"""Words in the host's memory that all GPUs and CPUs of a host read and write."""

import ctypes
import struct
from multiprocessing.shared_memory import SharedMemory

import torch


class HostWords:
    """32-bit words that the ranks' GPUs wait for; all are 0 at first. RuntimeError if the GPU cannot use the memory.

    A CPU can end such a wait by writing the word. It could not by a launch, were the word in the GPU's memory: a rank
    may have launched so much that the driver makes it wait, and every other thread of its process with it.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory.buf))  # of the GPU, too
        error = torch.cuda.cudart().cudaHostRegister(self.address, memory.size, 0)
        if int(error):
            raise RuntimeError(
                f"sharing {memory.size} bytes of host memory with the GPU failed: {error}"
            )

    def write(self, index: int, *values: int) -> None:
        """The words from number `index` on, modulo 2^32."""
        struct.pack_into(
            f"{len(values)}I", self.memory.buf, 4 * index, *(value % 2**32 for value in values)
        )

    def close(self) -> None:
        """Before the memory goes, and when no GPU uses it any more. A GPU that has failed may say so once more."""
        torch.cuda.cudart().cudaHostUnregister(self.address)
