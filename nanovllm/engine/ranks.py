"""The worker processes of tensor parallelism: how they start, what follows a fault, how they end."""

import multiprocessing
import os
import signal
import threading
import traceback
from contextlib import closing, suppress
from multiprocessing import parent_process

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.channel import Channel
from nanovllm.engine.model_runner import ModelRunner


def start_ranks(config: Config) -> ModelRunner:
    """Rank 0's ModelRunner; with tensor parallelism, worker processes with the other ranks' stand behind it."""
    size = config.tensor_parallel_size
    if size == 1:
        return ModelRunner(config)
    if dist.is_initialized():
        needed = f"tensor_parallel_size {size} needs torch.distributed's default process group"
        raise ValueError(
            f"{needed}, and it is in use; exit() the other engine, or use another process"
        )
    channel, context = Channel(size - 1), multiprocessing.get_context("spawn")
    try:
        store = dist.TCPStore(
            "127.0.0.1", 0, size, is_master=True, wait_for_workers=False
        )  # port 0: any free one
        for rank in range(1, size):
            process = context.Process(
                target=run_worker, args=(config, rank, channel, store.port), daemon=True
            )
            process.start()
            channel.processes.append(process)
        channel.wait_until_up()  # a worker that cannot start is found out here, not in a collective
        model_runner = ModelRunner(config, 0, channel, store)
        channel.check_workers()
        return model_runner
    except BaseException as error:
        failure = kill_ranks(channel, error)
        channel.close()
        with suppress(Exception):
            if dist.is_initialized():
                dist.destroy_process_group()
        if failure is not None and isinstance(error, Exception):
            raise failure from error
        raise


def kill_ranks(channel: Channel, error: BaseException) -> RuntimeError | None:
    """After an error of rank 0's; returns what a rank failed of, if one did."""
    traceback.clear_frames(
        error.__traceback__
    )  # NCCL does not end while a frame holds a graph with a kernel of it
    return channel.kill()


def shut_down(model_runner: ModelRunner) -> None:
    channel = model_runner.channel
    if channel is None:
        return model_runner.exit()
    with closing(channel):
        if channel.is_whole and all(process.is_alive() for process in channel.processes):
            channel.is_closing = True  # workers that end now have not died
            model_runner.call("exit")
        else:
            channel.kill()
            model_runner.exit()


def run_worker(config: Config, rank: int, channel: Channel, port: int) -> None:
    """Entry of a worker process. It ends at once if it fails or its parent does, whatever its GPU is waiting for."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the whole group; rank 0 decides what follows
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    try:
        if config.device == "cuda":
            torch.zeros(
                1, device=torch.device("cuda", rank)
            )  # a GPU that cannot be used is found out here
        channel.taken[rank - 1].release()
        store = dist.TCPStore("127.0.0.1", port, config.tensor_parallel_size, is_master=False)
        ModelRunner(config, rank, channel, store).loop()
    except Exception:
        channel.errors.put((rank, traceback.format_exc()))
        os._exit(1)
