"""The worker processes of tensor parallelism: how they start, what a fault does, how they end."""

import multiprocessing
import os
import signal
import threading
import traceback
from contextlib import closing, suppress
from multiprocessing import parent_process

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from nanovllm.config import Config
from nanovllm.engine.channel import Channel
from nanovllm.engine.model_runner import ModelRunner

HOST = "127.0.0.1"  # all ranks are on one machine


def start_ranks(config: Config) -> ModelRunner:
    """Make rank 0's ModelRunner, having started a worker process for every other rank.

    If a rank cannot start, this raises what it failed of, and leaves nothing behind.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return ModelRunner(config)
    if dist.is_initialized():
        raise ValueError(
            f"tensor_parallel_size {size} needs torch.distributed's default process group, and it "
            "is in use; exit() the other engine, or use another process"
        )
    channel = Channel(num_workers=size - 1)
    try:
        # Where the ranks meet to form a process group. Port 0: any free one, so that two engines
        # never meet.
        store = dist.TCPStore(HOST, 0, size, is_master=True, wait_for_workers=False)
        start_workers(config, channel, store.port)
        model_runner = ModelRunner(config, 0, channel, store)
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


def start_workers(config: Config, channel: Channel, port: int) -> None:
    """Start ranks 1, 2, ... and wait until they are up; RuntimeError if one dies before it is.

    The first collective would be too late to find out: rank 0 would already be waiting in it.
    """
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    for rank in range(1, config.tensor_parallel_size):
        arguments = (config, rank, channel, port)
        process = context.Process(target=run_worker, args=arguments, daemon=True)
        process.start()
        channel.processes.append(process)
    channel.wait_until_up()


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
        ModelRunner(config, rank, channel, store).loop()
    except Exception:
        channel.errors.put((rank, traceback.format_exc()))
        os._exit(1)  # at once: an orderly exit would wait for the GPU, which may wait for rank 0's


def exit_with_parent() -> None:
    """In a thread of a worker: end the process once rank 0's has ended, however that came about."""
    parent = parent_process()
    assert parent is not None
    parent.join()
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

    If rank 0's process dies, each worker ends by `exit_with_parent`, and Python's resource tracker
    frees the shared memory.
    """
    # NCCL does not end as long as a CUDA graph holds a kernel of it, and frames of the traceback
    # may hold graphs.
    traceback.clear_frames(error.__traceback__)
    return channel.kill()


def shut_down(model_runner: ModelRunner) -> None:
    """End all ranks and free their memory, in good order if the workers can still be told."""
    channel = model_runner.channel
    if channel is None:
        model_runner.exit()
        return
    with closing(channel):
        if channel.is_whole and all(process.is_alive() for process in channel.processes):
            channel.is_closing = True  # so that `watch` does not take their end for a failure
            model_runner.call("exit")
        else:
            channel.kill()
            model_runner.exit()
