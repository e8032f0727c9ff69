"""Words in the host's memory that all GPUs and CPUs of a host read and write."""

import ctypes
import struct
from multiprocessing.shared_memory import SharedMemory

import torch


class HostWords:
    """32-bit words by which the ranks' GPUs wait for each other; all are 0 at first.

    They are in the host's memory so that a CPU can end a wait, by writing the word, when a rank has
    died. Were they in a GPU's memory, writing would be a launch. But a rank may have launched so
    much that the driver makes every further launch wait, in all threads of the process.
    """

    def __init__(self, memory: SharedMemory) -> None:
        """Let this process's GPU use the memory; raise RuntimeError if it cannot."""
        self.memory = memory
        assert memory.buf is not None  # it is open
        # The same address is valid on the GPU.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory.buf))
        error = torch.cuda.cudart().cudaHostRegister(self.address, memory.size, 0)
        if int(error):
            raise RuntimeError(
                f"sharing {memory.size} bytes of host memory with the GPU failed: {error}"
            )

    def write(self, index: int, *values: int) -> None:
        """Write values, modulo 2^32, into the words from number `index` on."""
        assert self.memory.buf is not None  # it is open
        words = [value % 2**32 for value in values]
        struct.pack_into(f"{len(words)}I", self.memory.buf, 4 * index, *words)

    def close(self) -> None:
        """Take the memory back from the GPU, before it is freed and when no GPU uses it any more.

        A GPU that has failed may report its error here once more.
        """
        torch.cuda.cudart().cudaHostUnregister(self.address)
