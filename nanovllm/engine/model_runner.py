"""One rank: its part of the model and of the KV cache, and the forward pass of a step."""

import gc
import math
import os
import signal
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing import parent_process
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.channel import Channel
from nanovllm.engine.decode_buffers import DecodeBuffers
from nanovllm.engine.sampling_table import SamplingTable
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.all_reduce import SmallAllReduce
from nanovllm.layers.attention import Attention, select_backend
from nanovllm.layers.sampler import Sampler, SamplingExtras
from nanovllm.models import MODELS
from nanovllm.models.qwen3 import head_size
from nanovllm.utils.context import Context, reset_context, set_context
from nanovllm.utils.loader import fill_dummy, load_model
from nanovllm.utils.tensor_parallel import tensor_parallel

CPU_KVCACHE_BYTES = 2 << 30  # the cache's default size without a GPU; pages are committed as they are first used
MAX_GRAPH_BATCH = 512

Sampled = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]  # token ids, log-probabilities


class PendingTokens:
    """The tokens of a launched step, and the log-probabilities asked for, on their way to the host."""

    def __init__(self, token_ids: torch.Tensor, logprobs: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        tensors = (token_ids, *(logprobs or ()))
        self.parts = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
        for part, tensor in zip(self.parts, tensors, strict=True):
            part.copy_(tensor, non_blocking=True)
        self.copied = torch.cuda.Event(enable_timing=True) if token_ids.is_cuda else None
        self.launched_at = time.perf_counter()  # on a CPU the step has run by now
        if self.copied is not None:
            self.copied.record()

    def wait(self) -> tuple[list[int], list[tuple[list[int], list[float]]] | None]:
        """The token ids, and (token ids, log-probabilities) for each sequence that asked."""
        if self.copied is not None:
            self.copied.synchronize()
        token_ids, *logprobs = (part.tolist() for part in self.parts)
        return token_ids, list(zip(*logprobs, strict=True)) if logprobs else None


class ModelRunner:
    """Runs the model on one device.

    Rank 0 lives in the user's process and is called by the engine; `call` passes each call on to the other ranks,
    which sit in `loop`, so that all of them execute the same methods in the same order. By `channel` and `store` they
    find each other. `config.num_kvcache_blocks` is filled in when it is -1.
    """

    def __init__(
        self, config: Config, rank: int = 0, channel: Channel | None = None, store: dist.Store | None = None
    ) -> None:
        self.config, self.rank, self.channel = config, rank, channel
        self.small_all_reduce: SmallAllReduce | None = None
        self.lock = threading.Lock()  # of let_go
        self.device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if store is not None:
            self._join(store)
        hf_config, block_size = config.hf_config, config.kvcache_block_size
        self.blocks_per_seq = -(-config.max_model_len // block_size)
        head_dim, name = head_size(hf_config), config.attention_backend
        self.backend = select_backend(name, config.device, block_size, head_dim, config.dtype)
        config.attention_backend = self.backend.name
        tp_size = config.tensor_parallel_size
        with tensor_parallel(rank, tp_size, self.small_all_reduce), _defaults(self.device, config.dtype):
            self.model = MODELS[hf_config.architectures[0]](hf_config, config.max_model_len)
            self.sampler = Sampler(self.model.lm_head.vocab_start, hf_config.vocab_size)
        if config.load_format == "dummy":
            fill_dummy(self.model, getattr(hf_config, "initializer_range", 0.02), config.seed)
        else:
            load_model(self.model, config.model)
        self.attention_layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer in self.attention_layers:
            layer.backend = self.backend
        if self.device.type == "cuda":
            self._warm_up()
        self._allocate_kv_cache()
        self._allocate_buffers()
        # With the tokens and the logits that they leave.
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        if self.device.type == "cuda" and not config.enforce_eager:
            self._capture_graphs()

    def _join(self, store: dist.Store) -> None:
        """Meet the other ranks."""
        size, gpu = self.config.tensor_parallel_size, self.device if self.device.type == "cuda" else None
        backend = "gloo" if gpu is None else "nccl"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=size, device_id=gpu)
        if self.channel is not None and self.rank == 0:
            self.channel.watch(self.let_go)
        peers = [i for i in range(size) if i != self.rank]
        if gpu is not None and all(torch.cuda.can_device_access_peer(self.rank, peer) for peer in peers):
            self.small_all_reduce = SmallAllReduce(self.rank, size, gpu, store)

    def let_go(self) -> None:
        """A rank died: end the collectives that wait for it, with whatever result; the engine raises then."""
        with self.lock:
            if self.small_all_reduce is not None:
                self.small_all_reduce.release()
            if self.device.type == "cuda" and dist.is_initialized():
                dist.distributed_c10d._abort_process_group()

    def _warm_up(self) -> None:
        """Run the largest prefill there can be, which shows the peak of the memory that activations take."""
        num_seqs = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        num_tokens = min(self.config.max_num_batched_tokens, num_seqs * self.config.max_model_len)
        bounds = [num_tokens * i // num_seqs for i in range(num_seqs + 1)]
        cu_seqlens, max_len = self._to_device(bounds, np.int32), -(-num_tokens // num_seqs)
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        ones = torch.ones(num_seqs, dtype=torch.int64, device=self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        context = Context(True, None, cu_seqlens, cu_seqlens, max_len, max_len)
        self.sampler(self._forward(tokens, tokens, context), ones.float(), ones, ones)
        torch.cuda.synchronize(self.device)

    def _allocate_kv_cache(self) -> None:
        config, num_layers, layer = self.config, len(self.attention_layers), self.attention_layers[0]
        block_shape = (config.kvcache_block_size, layer.num_kv_heads, layer.head_dim)
        if config.num_kvcache_blocks == -1:
            block_bytes = 2 * num_layers * math.prod(block_shape) * config.dtype.itemsize
            config.num_kvcache_blocks = self._fitting_blocks(block_bytes)
        config.check_kvcache(config.num_kvcache_blocks)
        # Zeros on a GPU, where that costs nothing; on a CPU it would touch, and so commit, every page.
        new = torch.zeros if self.device.type == "cuda" else torch.empty
        shape = (2, num_layers, config.num_kvcache_blocks, *block_shape)
        self.kv_cache = new(shape, dtype=config.dtype, device=self.device)
        for index, layer in enumerate(self.attention_layers):
            layer.k_cache, layer.v_cache = self.kv_cache[0, index], self.kv_cache[1, index]

    def _fitting_blocks(self, block_bytes: int) -> int:
        config = self.config
        if self.device.type == "cpu":
            most = config.max_num_seqs * self.blocks_per_seq
            return max(self.blocks_per_seq, min(CPU_KVCACHE_BYTES // block_bytes, most))
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        used = total - free  # by this process and by others
        activations = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        # CUDA graphs have a pool of their own; it takes at most what a prefill of as many sequences does.
        reserved = activations if config.enforce_eager else 2 * activations
        num_blocks = int(total * config.gpu_memory_utilization - used - reserved) // block_bytes
        # All that can run at once, and as much again for cached prefixes: more blocks would only cost time to keep.
        num_blocks = min(num_blocks, 2 * config.max_num_seqs * self.blocks_per_seq)
        if config.tensor_parallel_size > 1:  # the scheduler counts the same blocks for all ranks
            smallest = torch.tensor(num_blocks, device=self.device)
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
            num_blocks = int(smallest)
        return num_blocks

    def _allocate_buffers(self) -> None:
        """The arrays that decode steps read: the same ones in every step, so that a CUDA graph can be replayed."""
        self.buffers = DecodeBuffers(self.config.max_num_seqs, self.blocks_per_seq, self.device)
        num_rows = self.config.max_num_seqs + 1  # one for each admitted sequence, and one that padding writes to
        # The newest token stays on the device: the next step reads it from here, long before the host does.
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        # Per-sequence inputs on the host; a decode step only gathers them.
        self.block_tables = np.full((num_rows, self.blocks_per_seq), -1, dtype=np.int32)
        self.temperatures, self.seeds = np.zeros(num_rows, dtype=np.float32), np.zeros(num_rows, dtype=np.int64)
        self.sampling = SamplingTable(num_rows, self.config.hf_config.vocab_size, self.device, self._to_device)

    def _capture_graphs(self) -> None:
        """Record a decode step, sampling included, for each batch size of a ladder.

        A graph replays on the addresses it was captured with, so all sizes share one set of buffers, and one memory
        pool, sized by the largest, which is captured first.
        """
        largest = min(self.config.max_num_seqs, MAX_GRAPH_BATCH)
        self.graph_sizes = sorted({1, 2, 4, *range(8, largest, 8), largest} & set(range(1, largest + 1)))
        for size in (largest, 1):  # compiles the kernels, which a capture should not do
            self._decode(size)
        torch.cuda.synchronize(self.device)
        pool = None
        for size in reversed(self.graph_sizes):
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog thread makes CUDA calls of its own meanwhile.
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                tokens, _, logits = self._decode(size)
            pool = pool or graph.pool()
            # Only the address of the logits is kept: holding their memory would keep the next graph from using it.
            self.graphs[size] = graph, tokens, alias(logits)
            del logits
        torch.cuda.synchronize(self.device)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method on every rank; the result is this rank's."""
        if self.channel is not None and self.rank == 0:
            self.channel.send(method, args)
        return getattr(self, method)(*args)

    def loop(self) -> None:
        """Workers: execute rank 0's commands until it says exit."""
        method = ""
        while method != "exit":
            method, args = self.channel.receive(self.rank)
            self.call(method, *args)

    def exit(self) -> None:
        """Release the memory, for the next engine to use, and leave the process group."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.graphs.clear()
        for layer in self.attention_layers:
            layer.k_cache = layer.v_cache = torch.empty(0)
        was_shared, self.small_all_reduce = self.small_all_reduce is not None, None
        del self.kv_cache, self.model, self.sampler, self.attention_layers
        gc.collect()  # parameters and their layers refer to each other (weight_loader)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.config.tensor_parallel_size > 1 and dist.is_initialized():
            if was_shared:
                dist.barrier()  # no process ends while another one holds its memory
            dist.destroy_process_group()

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> PendingTokens:
        """Rank 0: queue one step on every device: compute the scheduled tokens, sample one after each sequence's last.

        What the other ranks are sent of a decode step is small, whatever the lengths of the contexts.
        """
        if is_prefill:
            return PendingTokens(*self.call("launch_prefill", seqs))
        block_size = self.config.kvcache_block_size
        rows = np.array([seq.row for seq in seqs])
        context_lens = np.array([seq.num_computed_tokens for seq in seqs], dtype=np.int32)
        # (row, index in its table, block) of those that have just been given one
        first_of_block = (context_lens % block_size == 1 % block_size).nonzero()[0].tolist()
        tables = [(seqs[i].row, seqs[i].block_table) for i in first_of_block]
        new_blocks = [(row, len(table) - 1, table[-1]) for row, table in tables]
        return PendingTokens(*self.call("launch_decode", rows, context_lens, new_blocks))

    def launch_prefill(self, seqs: list[Sequence]) -> Sampled:
        for seq in seqs:
            self.block_tables[seq.row, : len(seq.block_table)] = seq.block_table
            self.temperatures[seq.row], self.seeds[seq.row] = seq.temperature, seq.seed
            self.sampling.fill(seq)
        rows, lengths = np.array([seq.row for seq in seqs]), np.array([seq.num_computed_tokens for seq in seqs])
        arrays = dict(rows=rows, temperatures=self.temperatures[rows], seeds=self.seeds[rows], positions=lengths - 1)
        arrays, extras = {name: self._to_device(x) for name, x in arrays.items()}, self.sampling.build(rows, lengths)
        return self._sample(self._forward(*self.prepare_prefill(seqs)), arrays, extras)

    def launch_decode(
        self, rows: np.ndarray, context_lens: np.ndarray, new_blocks: list[tuple[int, int, int]]
    ) -> Sampled:
        for row, index, block_id in new_blocks:
            self.block_tables[row, index] = block_id
        num_seqs, extras = len(rows), self.sampling.build(rows, context_lens)
        if not self.graphs or num_seqs > self.graph_sizes[-1]:
            self.prepare_decode(rows, context_lens, num_seqs)
            return self._decode(num_seqs, extras)[:2]
        size = self.graph_sizes[bisect_left(self.graph_sizes, num_seqs)]
        self.prepare_decode(rows, context_lens, size)
        graph, tokens, logits = self.graphs[size]
        graph.replay()
        if extras is None:
            return tokens[:num_seqs], None
        return self._sample(logits[:num_seqs], self._arrays(num_seqs), extras)  # the graph's are plain samples

    def prepare_prefill(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, Context]:
        """Lay the scheduled tokens of all sequences one after the other: input ids, positions and metadata."""
        block_size = self.config.kvcache_block_size
        lens_q = [seq.num_scheduled_tokens for seq in seqs]
        lens_k = [seq.num_computed_tokens for seq in seqs]
        rows = [seq.row for seq in seqs]
        input_ids = [token_id for seq in seqs for token_id in seq.scheduled_token_ids]
        positions = np.concatenate([np.arange(end - num, end) for num, end in zip(lens_q, lens_k, strict=True)])
        blocks = self.block_tables[np.repeat(rows, lens_q), positions // block_size]
        width = max(len(seq.block_table) for seq in seqs)
        context = Context(
            is_prefill=True,
            slot_mapping=self._to_device(blocks * block_size + positions % block_size, np.int32),
            cu_seqlens_q=self._to_device([0, *accumulate(lens_q)], np.int32),
            cu_seqlens_k=self._to_device([0, *accumulate(lens_k)], np.int32),
            max_seqlen_q=max(lens_q),
            max_seqlen_k=max(lens_k),
            block_tables=self._to_device(self.block_tables[rows, :width]) if lens_k != lens_q else None,
        )
        return self._to_device(input_ids, np.int64), self._to_device(positions, np.int64), context

    def prepare_decode(self, seq_rows: np.ndarray, seq_lens: np.ndarray, size: int) -> None:
        """Fill the decode buffers for the newest token of each sequence, padded to `size` rows, and upload them."""
        num_seqs, block_size, host = len(seq_rows), self.config.kvcache_block_size, self.buffers.next_host()
        rows, context_lens = host["rows"][:size], host["context_lens"][:size]
        rows[:num_seqs], context_lens[:num_seqs], positions = seq_rows, seq_lens, seq_lens - 1
        tables = host["block_tables"][:size]
        np.take(self.block_tables, rows[:num_seqs], axis=0, out=tables[:num_seqs])
        host["positions"][:num_seqs] = positions
        blocks = tables[np.arange(num_seqs), positions // block_size]
        host["slots"][:num_seqs] = blocks * block_size + positions % block_size
        host["temperatures"][:num_seqs] = self.temperatures[rows[:num_seqs]]
        host["seeds"][:num_seqs] = self.seeds[rows[:num_seqs]]
        # Padding rows store nothing (slot -1), attend to nothing (context length 0) and write to the spare row.
        rows[num_seqs:], context_lens[num_seqs:], host["slots"][num_seqs:size] = self.config.max_num_seqs, 0, -1
        host["positions"][num_seqs:size] = host["temperatures"][num_seqs:size] = 0
        self.buffers.upload()

    def _to_device(self, values: list[int] | np.ndarray, dtype: type | None = None) -> torch.Tensor:
        tensor = torch.from_numpy(np.asarray(values, dtype=dtype))  # of a list several times faster than torch's own
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    @torch.inference_mode()
    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        """Model and LM head: `[num_seqs, vocab / tp]` logits of each sequence's last token."""
        set_context(context)
        try:
            return self.model.compute_logits(self.model(input_ids, positions))
        finally:
            reset_context()

    @torch.inference_mode()
    def _sample(
        self, logits: torch.Tensor, arrays: dict[str, torch.Tensor], extras: SamplingExtras | None
    ) -> Sampled:
        """Draw `[num_seqs]` int64 token ids and keep them for the next step, all on the device."""
        sampling = arrays["temperatures"], arrays["seeds"], arrays["positions"]
        tokens, logprobs = self.sampler(logits, *sampling, extras)
        self.last_tokens.index_copy_(0, arrays["rows"], tokens)
        return tokens, logprobs

    def _arrays(self, size: int) -> dict[str, torch.Tensor]:
        return {name: array[:size] for name, array in self.buffers.device.items()}

    @torch.inference_mode()
    def _decode(self, size: int, extras: SamplingExtras | None = None) -> tuple[Any, ...]:
        """One decode step on the first `size` rows of the buffers: what a graph records. `Sampled`, and logits."""
        arrays = self._arrays(size)
        tables, input_ids = arrays["block_tables"], self.last_tokens[arrays["rows"]]
        context = Context(slot_mapping=arrays["slots"], context_lens=arrays["context_lens"], block_tables=tables)
        logits = self._forward(input_ids, arrays["positions"], context)
        return *self._sample(logits, arrays, extras), logits


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same (contiguous) memory of a CUDA device, not owned: somebody else must see to it that it stays."""
    data = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 2}
    memory = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=data), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Tensors made inside the `with` have this device and dtype; the caller's defaults come back after it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def run_worker(config: Config, rank: int, channel: Channel, port: int) -> None:
    """Entry of a worker process. It ends at once if it fails or its parent does, whatever its GPU is waiting for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; rank 0 decides what follows
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    try:
        if config.device == "cuda":
            torch.zeros(1, device=torch.device("cuda", rank))  # a GPU that cannot be used is found out here
        channel.taken[rank - 1].set()
        store = dist.TCPStore("127.0.0.1", port, config.tensor_parallel_size, is_master=False)
        ModelRunner(config, rank, channel, store).loop()
    except Exception:
        channel.errors.put((rank, traceback.format_exc()))
        os._exit(1)
