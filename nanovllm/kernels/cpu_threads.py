"""How many CPU threads a step uses: no more than its work is worth.

PyTorch's threads meet after every operation, and wait for one another by spinning. For small
operations that costs more than sharing them brings; and on a busy machine, where the system takes a
core away from one thread, the others spin until it comes back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Multiplications and additions of a step for which one more thread pays, see docs/PERFORMANCE.md.
WORK_PER_THREAD = 64_000_000


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Run a step of so many multiply-adds with as many of the caller's threads as it is worth.

    The caller's setting, of OMP_NUM_THREADS or `torch.set_num_threads`, is the upper limit, and is
    as it was afterwards. A thread that first uses PyTorch meanwhile takes over the step's number:
    PyTorch reads the setting of the process once for each thread.
    """
    limit = torch.get_num_threads()
    wanted = max(1, min(limit, work // WORK_PER_THREAD))
    if wanted == limit:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(limit)
