"""The worker processes of tensor parallelism: how they start, what a fault does, how they end."""

import ctypes
import multiprocessing
import multiprocessing.spawn
import os
import signal
import threading
import traceback
import weakref
from contextlib import closing, suppress

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.parallel.channel import Channel
from nanovllm.parallel.process_group import ProcessGroup

HOST = "127.0.0.1"  # all ranks are on one machine
MAX_STEP_SECONDS = 10.0  # so long `shut_down` waits for a step of another thread
_channels: "weakref.WeakSet[Channel]" = weakref.WeakSet()  # of the engines in this process


def check_process() -> None:
    """Raise a RuntimeError if this process cannot start others, which import its main script."""
    # This raises if we are such another process, whose script has no `if __name__ == "__main__"`.
    script = multiprocessing.spawn.get_preparation_data("rank").get("init_main_from_path")
    remedy = "or pass tensor_parallel_size=1"
    if multiprocessing.current_process().daemon:
        raise RuntimeError(
            "the ranks of tensor parallelism cannot start in a daemonic process, such as a worker "
            f"of multiprocessing.Pool; use concurrent.futures.ProcessPoolExecutor, {remedy}"
        )
    if script is not None and not os.path.exists(script):
        raise RuntimeError(
            "the ranks of tensor parallelism import the main script, and there is no file "
            f"{script!r} (a script on stdin is none); save it as a file, {remedy}"
        )


def start_ranks(config: Config) -> ModelRunner:
    """Make rank 0's ModelRunner, having started a worker process for every other rank. If a rank
    cannot start, this raises what it failed of, and leaves nothing behind.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return ModelRunner(config)
    check_process()
    if dist.is_initialized():
        raise ValueError(
            f"tensor_parallel_size {size} needs torch.distributed's default process group, and it "
            "is in use; exit() the other engine, or use another process"
        )
    channel = Channel(num_workers=size - 1)
    _channels.add(channel)
    try:
        # Where the ranks meet. Port 0: any free one, so that two engines never meet in one.
        store = dist.TCPStore(HOST, 0, size, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        for rank in range(1, size):
            arguments = (config, rank, channel, store.port)
            process = context.Process(target=run_worker, args=arguments, daemon=True)
            process.start()
            channel.processes.append(process)
        # Otherwise rank 0 would wait, in the first collective, for one that could not start.
        channel.wait_until_up()
        model_runner = ModelRunner(config, ProcessGroup(config, 0, channel, store))
        channel.check_workers()
        return model_runner
    except BaseException as error:
        failure = kill_ranks(channel, error)
        channel.close()
        with suppress(Exception):  # an error here would hide the one that this is about
            if dist.is_initialized():
                dist.destroy_process_group()
        if failure is not None and isinstance(error, Exception):
            raise failure from error
        raise


def run_worker(config: Config, rank: int, channel: Channel, port: int) -> None:
    """Be a worker: the entry of its process, which ends when rank 0 says so, fails or is gone."""
    # The terminal sends Ctrl-C to all processes; what follows from it is rank 0's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    # Here tqdm's own lock would have a name, which would outlive a process that is killed.
    tqdm.set_lock(threading.RLock())
    try:
        if config.device == "cuda":
            # Fails now if the GPU cannot be used, and not later, in a collective.
            torch.zeros(1, device=torch.device("cuda", rank))
        channel.report_up(rank)
        store = dist.TCPStore(HOST, port, config.tensor_parallel_size, is_master=False)
        ModelRunner(config, ProcessGroup(config, rank, channel, store)).loop()
    except Exception:
        channel.errors.put((rank, traceback.format_exc()))
        os._exit(1)  # at once: an orderly exit would wait for the GPU, which may wait for rank 0's


def exit_with_parent() -> None:
    """In a thread of a worker: end the process once rank 0's has ended, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # `parent` is a pipe, which a fork of rank 0's process would keep open. So look at the pid too.
    while parent.is_alive() and os.getppid() == parent.pid:
        parent.join(timeout=1.0)
    os._exit(1)


def kill_ranks(channel: Channel, error: BaseException) -> RuntimeError | None:
    """End all workers after `error` was raised in rank 0; returns what one failed of, if one did.

    How a fault of any rank ends everything, in order:

    1. A worker that raises puts its traceback into `channel.errors` and exits. One that is killed,
       or that crashes, exits without a word. The other ranks wait for it in their next collective.
    2. Rank 0 finds out by whichever comes first: the thread of `Channel.watch`; `check_workers`,
       called after each step and while a command waits to be sent; or a collective that raises, as
       gloo's do when a peer is gone. A fault of rank 0's own is an exception in a step, too.
    3. Whoever found out calls `Channel.kill`, the main thread from here. Under the channel's lock,
       and once: all workers are killed, then `on_death` ends what rank 0's GPU is waiting for.
    4. That wakes the main thread, if it is waiting for the GPU. The tokens it gets are garbage, but
       `check_workers` raises before anybody sees them, and so it learns the cause in step 3.
    5. `LLMEngine.exit` calls `shut_down`, which frees rank 0's memory and the channel's, and the
       user's call raises the worker's traceback. The engine cannot be used again.

    If rank 0's process dies, workers end by `exit_with_parent`, and Python frees the shared memory.
    """
    # NCCL does not end while a CUDA graph holds a kernel of it, and these frames may hold graphs.
    traceback.clear_frames(error.__traceback__)
    return channel.kill()


def shut_down(model_runner: ModelRunner, lock: threading.RLock, pid: int) -> None:
    """End all ranks and free their memory, in good order if the workers can still be told.

    `lock` is the engine's, and `pid` the process that made it: a fork of that leaves all as it is.
    """
    if os.getpid() != pid:
        return
    # Another thread may be in a step. When that is done it finds the engine ended, and raises.
    is_idle = lock.acquire(timeout=MAX_STEP_SECONDS)
    channel = model_runner.channel
    try:
        if channel is None:
            if is_idle:  # otherwise the memory is freed with the last reference to it
                model_runner.exit()
            return
        with closing(channel):
            workers = channel.processes
            if is_idle and channel.is_whole and all(worker.is_alive() for worker in workers):
                channel.is_closing = True  # so that `watch` does not take their end for a failure
                model_runner.call("exit")
            else:
                channel.kill()
                model_runner.exit()
    finally:
        if is_idle:
            lock.release()


def _disown_ranks() -> None:
    """In a forked child: keep its end from touching the ranks, which are its parent's."""
    for channel in _channels:
        # `multiprocessing` terminates the child processes in this list, which the fork inherits.
        processes = multiprocessing.process._children  # type: ignore[attr-defined]
        processes.difference_update(channel.processes)
        if dist.is_initialized():
            # One reference too many: a group that is destroyed waits for threads of the parent.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_disown_ranks)
