"""The inputs of a decode step, on the host and on the device."""

import numpy as np
import torch


class DecodeBuffers:
    """Arrays of one row for each sequence of the batch, side by side in one piece of memory.

    So one copy takes them all to the device. There are two pieces of (pinned) host memory, used in turn: while one
    is still being copied, the next step is written to the other. On a CPU the device's arrays are the host's.

    Attributes:
        device: name -> tensor, `[max_num_seqs]` or, for block_tables, `[max_num_seqs, blocks_per_seq]`.
    """

    def __init__(self, max_num_seqs: int, blocks_per_seq: int, device: torch.device) -> None:
        arrays = {  # the wide ones first, so that every one is aligned
            "rows": (torch.int64, 1),  # where the sequence's newest token is kept
            "positions": (torch.int64, 1),  # of that token
            "seeds": (torch.int64, 1),
            "context_lens": (torch.int32, 1),
            "slots": (torch.int32, 1),  # where its K and V go
            "temperatures": (torch.float32, 1),
            "block_tables": (torch.int32, blocks_per_seq),
        }
        num_bytes = sum(dtype.itemsize * width * max_num_seqs for dtype, width in arrays.values())
        is_cuda = device.type == "cuda"

        def views(memory: torch.Tensor) -> dict[str, torch.Tensor]:
            named, offset = {}, 0
            for name, (dtype, width) in arrays.items():
                end = offset + dtype.itemsize * width * max_num_seqs
                named[name] = memory[offset:end].view(dtype)
                offset = end
            named["block_tables"] = named["block_tables"].view(max_num_seqs, blocks_per_seq)
            return named

        self._host = [torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=is_cuda) for _ in range(1 + is_cuda)]
        self._host_arrays = [{name: x.numpy() for name, x in views(memory).items()} for memory in self._host]
        self._copied = [torch.cuda.Event() for _ in self._host] if is_cuda else []
        self._turn = 0
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device) if is_cuda else self._host[0]
        self.device = views(self._device)

    def next_host(self) -> dict[str, np.ndarray]:
        """The host arrays to fill for the next step."""
        self._turn = (self._turn + 1) % len(self._host)
        if self._copied:
            self._copied[self._turn].synchronize()  # the copy of two steps ago; it has long been done
        return self._host_arrays[self._turn]

    def upload(self) -> None:
        """Send what `next_host` returned to the device, behind the steps that are queued there."""
        if self._copied:
            self._device.copy_(self._host[self._turn], non_blocking=True)
            self._copied[self._turn].record()
