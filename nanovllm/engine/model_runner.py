"""One rank: its part of the model and of the KV cache, and the forward pass of a step."""

import gc
import math
import threading
from bisect import bisect_left
from contextlib import suppress
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.channel import Channel
from nanovllm.engine.decode_buffers import DecodeBuffers
from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.engine.sampling_table import SamplingTable
from nanovllm.engine.scheduler import Step
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.all_reduce import SmallAllReduce
from nanovllm.kernels.host_words import HostWords
from nanovllm.kernels.prefill_all_reduce import MIN_TOKENS, PrefillAllReduce
from nanovllm.layers.attention import Attention, select_backend
from nanovllm.layers.sampler import Sampler, SamplingExtras
from nanovllm.models import MODELS
from nanovllm.models.qwen3 import head_size
from nanovllm.utils.context import Context, reset_context, set_context
from nanovllm.utils.loader import fill_dummy, load_model
from nanovllm.utils.tensor_parallel import tensor_parallel

CPU_KVCACHE_BYTES = (
    2 << 30
)  # the cache's default size without a GPU; pages are committed as they are first used
MAX_GRAPH_BATCH = 512

Sampled = tuple[Tensor, tuple[Tensor, Tensor] | None]  # token ids, log-probabilities


class ModelRunner:
    """Runs the model on one device.

    Rank 0 lives in the user's process. Its `call` passes a call on through `channel` to the other ranks, which sit in
    `loop`, so that all execute the same methods in the same order; `store` is where they meet.
    """

    def __init__(
        self,
        config: Config,
        rank: int = 0,
        channel: Channel | None = None,
        store: dist.Store | None = None,
    ) -> None:
        self.config, self.rank, self.channel = config, rank, channel
        self.all_reduces: list[SmallAllReduce | PrefillAllReduce] = []  # of our own
        self.graph_sizes: list[int] = []  # in ascending order
        self.graphs: dict[
            int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]
        ] = {}  # and what it leaves: tokens, logits
        self.is_cuda = config.device == "cuda"
        self.device = torch.device("cuda", rank) if self.is_cuda else torch.device("cpu")
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        if store is not None:
            self._join(store)
        self.blocks_per_seq = -(-config.max_model_len // config.kvcache_block_size)
        self._load_model()
        if self.is_cuda:
            self._warm_up()
        self._allocate_kv_cache()
        self._allocate_buffers()
        if self.is_cuda:
            self._warm_up_cached()
        if self.is_cuda and not config.enforce_eager:
            self._capture_graphs()

    def _join(self, store: dist.Store) -> None:
        """Meet the other ranks, and share memory with them where the GPUs can."""
        size, gpu = self.config.tensor_parallel_size, self.device if self.is_cuda else None
        backend = "nccl" if self.is_cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=size, device_id=gpu
        )
        if self.rank == 0:
            self.channel.on_death = self.let_go
            threading.Thread(target=self.channel.watch, daemon=True).start()
        peers = (peer for peer in range(size) if peer != self.rank)
        shape, dtype = (
            (self.config.max_num_batched_tokens, self.config.hf_config.hidden_size),
            self.config.dtype,
        )
        row_bytes = shape[1] * dtype.itemsize
        is_close = self.is_cuda and all(
            torch.cuda.can_device_access_peer(self.rank, peer) for peer in peers
        )
        if is_close and row_bytes % 4 == 0:
            words = HostWords(self.channel.words)
            self.channel.on_close = words.close
            self.all_reduces.append(SmallAllReduce(self.rank, size, self.device, words, row_bytes))
            if shape[0] >= MIN_TOKENS:
                self.all_reduces.append(
                    PrefillAllReduce(self.rank, size, self.device, words, shape, dtype)
                )

    def let_go(self) -> None:
        """A rank failed: end the collectives that wait for it, with whatever result; the engine raises then."""
        for all_reduce in self.all_reduces:
            all_reduce.release()
        if self.is_cuda and dist.is_initialized():
            abort = threading.Thread(target=abort_nccl, daemon=True)
            abort.start()
            for _ in range(5):  # it ends NCCL's kernels first, and goes on until no graph holds one
                abort.join(timeout=1.0)
                if not abort.is_alive():
                    break
                self.graphs.clear()

    def _load_model(self) -> None:
        config, hf_config, before = self.config, self.config.hf_config, torch.get_default_dtype()
        name, block_size, head_dim = (
            config.attention_backend,
            config.kvcache_block_size,
            head_size(hf_config),
        )
        backend = select_backend(name, config.device, block_size, head_dim, config.dtype)
        config.attention_backend = backend.name
        torch.set_default_dtype(config.dtype)
        try:
            with (
                tensor_parallel(self.rank, config.tensor_parallel_size, *self.all_reduces),
                self.device,
            ):
                self.model = MODELS[hf_config.architectures[0]](hf_config, config.max_model_len)
                self.sampler = Sampler(self.model.lm_head.vocab_start, hf_config.vocab_size)
        finally:
            torch.set_default_dtype(before)
        if config.load_format == "dummy":
            fill_dummy(self.model, getattr(hf_config, "initializer_range", 0.02), config.seed)
        else:
            load_model(self.model, config.model)
        self.attention_layers = [
            module for module in self.model.modules() if isinstance(module, Attention)
        ]
        for layer in self.attention_layers:
            layer.backend = backend

    def _warm_up(self) -> None:
        """Run the largest prefill there can be, which shows the peak of the memory that activations take."""
        num_seqs = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        num_tokens = min(self.config.max_num_batched_tokens, num_seqs * self.config.max_model_len)
        bounds = [num_tokens * i // num_seqs for i in range(num_seqs + 1)]
        cu_seqlens, max_len = self._to_device(bounds, np.int32), -(-num_tokens // num_seqs)
        tokens, ones = (
            self._to_device([0] * num_tokens, np.int64),
            self._to_device([1] * num_seqs, np.int64),
        )
        torch.cuda.reset_peak_memory_stats(self.device)
        context = Context(True, None, cu_seqlens, cu_seqlens, max_len, max_len)
        # Options that make float32 copies of all logits.
        bias = ones[:1] * 0, ones[:1] * 0, ones[:1].float()
        logprobs = torch.arange(num_seqs, device=self.device), 1
        with torch.inference_mode():
            logits = self._forward(tokens, tokens, context)
            self.sampler(
                logits, ones.float(), ones, ones, SamplingExtras(bias=bias, logprobs=logprobs)
            )
        torch.cuda.synchronize(self.device)

    def _allocate_kv_cache(self) -> None:
        config, num_layers, layer = (
            self.config,
            len(self.attention_layers),
            self.attention_layers[0],
        )
        block_shape = (config.kvcache_block_size, layer.num_kv_heads, layer.head_dim)
        if config.num_kvcache_blocks == -1:
            block_bytes = 2 * num_layers * math.prod(block_shape) * config.dtype.itemsize
            config.num_kvcache_blocks = self._fitting_blocks(block_bytes)
        config.check_kvcache(config.num_kvcache_blocks)
        shape = (2, num_layers, config.num_kvcache_blocks, *block_shape)
        new = (
            torch.zeros if self.is_cuda else torch.empty
        )  # on a CPU, zeros would touch, and so commit, every page
        self.kv_cache = new(shape, dtype=config.dtype, device=self.device)
        for index, layer in enumerate(self.attention_layers):
            layer.k_cache, layer.v_cache = self.kv_cache[0, index], self.kv_cache[1, index]

    def _fitting_blocks(self, block_bytes: int) -> int:
        """How many blocks of the KV cache the memory has room for."""
        config, most = (
            self.config,
            self.config.max_num_seqs * self.blocks_per_seq,
        )  # most: all that can run at once
        if not self.is_cuda:
            return max(self.blocks_per_seq, min(CPU_KVCACHE_BYTES // block_bytes, most))
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        used = total - free  # by this process and by others
        activations = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(
            self.device
        )
        # CUDA graphs have a pool of their own; it takes at most what a prefill of as many sequences does.
        reserved = activations if config.enforce_eager else 2 * activations
        num_blocks = int(total * config.gpu_memory_utilization - used - reserved) // block_bytes
        # As much again for cached prefixes; more would only cost time to keep.
        fitting = torch.tensor(min(num_blocks, 2 * most), device=self.device)
        if config.tensor_parallel_size > 1:  # the scheduler counts the same blocks for all ranks
            dist.all_reduce(fitting, op=dist.ReduceOp.MIN)
        return int(fitting)

    def _warm_up_cached(self) -> None:
        """Run a prefill that reads the cache: it has kernels of its own, which no step should wait for."""
        tokens, table = self._to_device([0], np.int64), self._to_device([[0, 0]], np.int32)
        lens_q, lens_k = self._to_device([0, 1], np.int32), self._to_device([0, 2], np.int32)
        self._forward(
            tokens,
            tokens,
            Context(True, table[0, :1] - 1, lens_q, lens_k, 1, 2, block_tables=table),
        )

    def _allocate_buffers(self) -> None:
        """What decode steps read, at the same addresses in every step, so that a CUDA graph can be replayed."""
        self.buffers = DecodeBuffers(self.config.max_num_seqs, self.blocks_per_seq, self.device)
        num_rows = (
            self.config.max_num_seqs + 1
        )  # one for each admitted sequence, and one that padding writes to
        # The newest token stays on the device: the next step reads it from here, long before the host does.
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        # Per-sequence inputs on the host; a decode step only gathers them.
        self.block_tables = np.full((num_rows, self.blocks_per_seq), -1, dtype=np.int32)
        self.temperatures, self.seeds = (
            np.zeros(num_rows, dtype=np.float32),
            np.zeros(num_rows, dtype=np.int64),
        )
        self.sampling = SamplingTable(
            num_rows, self.config.hf_config.vocab_size, self.device, self._to_device
        )

    def _capture_graphs(self) -> None:
        """Record a decode step, sampling included, for each of many batch sizes: they share one memory pool."""
        largest = min(self.config.max_num_seqs, MAX_GRAPH_BATCH)
        self.graph_sizes = sorted(
            {1, 2, 4, *range(8, largest, 8), largest} & set(range(1, largest + 1))
        )
        # Compiles the kernels, which a capture should not do: those of `split_gemm` and decode attention depend on
        # the size. All their choices are among these, but for some numbers of KV heads, or on smaller cards.
        for size in sorted(
            {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, largest} & set(self.graph_sizes)
        ):
            self._decode(size)
        torch.cuda.synchronize(self.device)
        pool = None
        for size in reversed(self.graph_sizes):  # the largest sizes the pool
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
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        self.graphs.clear()
        for layer in self.attention_layers:
            layer.k_cache = layer.v_cache = torch.empty(0)
        was_shared, self.all_reduces = len(self.all_reduces) > 0, []
        del self.kv_cache, self.model, self.sampler, self.attention_layers, self.sampling
        gc.collect()  # parameters and their layers refer to each other (weight_loader)
        if self.config.tensor_parallel_size > 1 and dist.is_initialized():
            if was_shared:
                dist.barrier()  # no process ends while another one holds its memory
            dist.destroy_process_group()
        if self.is_cuda:
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def launch(self, step: Step) -> PendingTokens:
        """Rank 0: queue one step on every device: compute the scheduled tokens, sample each sequence's next one."""
        seqs = step.seqs
        if step.is_prefill:
            return PendingTokens(*self.call("launch_prefill", seqs))
        # All that the ranks are told, however long the contexts are.
        rows = np.array([seq.row for seq in seqs])
        context_lens = np.array([seq.num_computed_tokens for seq in seqs], dtype=np.int32)
        last_blocks = np.array([seq.block_table[-1] for seq in seqs], dtype=np.int32)
        return PendingTokens(*self.call("launch_decode", rows, context_lens, last_blocks))

    def launch_prefill(self, seqs: list[Sequence]) -> Sampled:
        for seq in seqs:
            self.block_tables[seq.row, : len(seq.block_table)] = seq.block_table
            self.temperatures[seq.row], self.seeds[seq.row] = seq.temperature, seq.seed
            self.sampling.fill(seq)
        rows, lengths = (
            np.array([seq.row for seq in seqs]),
            np.array([seq.num_computed_tokens for seq in seqs]),
        )
        arrays = dict(
            rows=rows,
            temperatures=self.temperatures[rows],
            seeds=self.seeds[rows],
            positions=lengths - 1,
        )
        arrays = {name: self._to_device(values) for name, values in arrays.items()}
        return self._sample(
            self._forward(*self.prepare_prefill(seqs)), arrays, self.sampling.build(rows, lengths)
        )

    def prepare_prefill(self, seqs: list[Sequence]) -> tuple[Tensor, Tensor, Context]:
        """Lay the scheduled tokens of all sequences one after the other: input ids, positions and metadata."""
        block_size = self.config.kvcache_block_size
        lens_q, lens_k = (
            [seq.num_scheduled_tokens for seq in seqs],
            [seq.num_computed_tokens for seq in seqs],
        )
        rows, width = [seq.row for seq in seqs], max(len(seq.block_table) for seq in seqs)
        input_ids = [token_id for seq in seqs for token_id in seq.scheduled_token_ids]
        positions = np.concatenate(
            [np.arange(end - num, end) for num, end in zip(lens_q, lens_k, strict=True)]
        )
        blocks = self.block_tables[np.repeat(rows, lens_q), positions // block_size]
        slots = self._to_device(blocks * block_size + positions % block_size, np.int32)
        bounds = (self._to_device([0, *accumulate(lens)], np.int32) for lens in (lens_q, lens_k))
        tables = self._to_device(self.block_tables[rows, :width]) if lens_k != lens_q else None
        context = Context(True, slots, *bounds, max(lens_q), max(lens_k), block_tables=tables)
        return self._to_device(input_ids, np.int64), self._to_device(positions, np.int64), context

    def launch_decode(
        self, rows: np.ndarray, context_lens: np.ndarray, last_blocks: np.ndarray
    ) -> Sampled:
        num_seqs, extras = len(rows), self.sampling.build(rows, context_lens)
        index = bisect_left(self.graph_sizes, num_seqs)
        size = self.graph_sizes[index] if index < len(self.graph_sizes) else num_seqs
        self.prepare_decode(rows, context_lens, last_blocks, size)
        if size not in self.graphs:
            return self._decode(size, extras)[:2]
        graph, tokens, logits = self.graphs[size]
        graph.replay()
        if extras is None:
            return tokens[:num_seqs], None
        return self._sample(
            logits[:num_seqs], self._arrays(num_seqs), extras
        )  # the graph's are plain samples

    def prepare_decode(
        self, rows: np.ndarray, context_lens: np.ndarray, last_blocks: np.ndarray, size: int
    ) -> None:
        """Fill the decode buffers for the newest token of each sequence, padded to `size` rows, and upload them."""
        block_size, positions = self.config.kvcache_block_size, context_lens - 1
        self.block_tables[rows, positions // block_size] = last_blocks  # some of them are new
        inputs = {
            "rows": rows,
            "positions": positions,
            "context_lens": context_lens,
            "slots": last_blocks * block_size + positions % block_size,
            "block_tables": self.block_tables.take(rows, axis=0),  # a third faster than [rows]
            "temperatures": self.temperatures[rows],
            "seeds": self.seeds[rows],
        }
        self.buffers.upload(inputs, size)

    def _to_device(self, values: list[int] | np.ndarray, dtype: type | None = None) -> Tensor:
        tensor = torch.from_numpy(
            np.asarray(values, dtype=dtype)
        )  # of a list several times faster than torch's own
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.is_cuda else tensor

    @torch.inference_mode()
    def _forward(self, input_ids: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Model and LM head: `[num_seqs, vocab / tp]` logits of each sequence's last token."""
        set_context(context)
        try:
            return self.model.compute_logits(self.model(input_ids, positions))
        finally:
            reset_context()

    @torch.inference_mode()
    def _sample(
        self, logits: Tensor, arrays: dict[str, Tensor], extras: SamplingExtras | None
    ) -> Sampled:
        """Draw `[num_seqs]` int64 token ids and keep them for the next step, all on the device."""
        sampling = arrays["temperatures"], arrays["seeds"], arrays["positions"]
        tokens, logprobs = self.sampler(logits, *sampling, extras)
        self.last_tokens.index_copy_(0, arrays["rows"], tokens)
        return tokens, logprobs

    def _arrays(self, size: int) -> dict[str, Tensor]:
        return {name: array[:size] for name, array in self.buffers.device.items()}

    @torch.inference_mode()
    def _decode(self, size: int, extras: SamplingExtras | None = None) -> tuple[Any, ...]:
        """One decode step on the first `size` rows of the buffers: what a graph records. `Sampled`, and logits."""
        arrays = self._arrays(size)
        tables, input_ids = arrays["block_tables"], self.last_tokens[arrays["rows"]]
        context = Context(
            slot_mapping=arrays["slots"], context_lens=arrays["context_lens"], block_tables=tables
        )
        logits = self._forward(input_ids, arrays["positions"], context)
        return *self._sample(logits, arrays, extras), logits


def abort_nccl() -> None:
    with suppress(Exception):  # what it says would hide why it was called
        dist.distributed_c10d._abort_process_group()


def alias(tensor: Tensor) -> Tensor:
    """The same (contiguous) memory of a CUDA device, not owned: somebody else must see to it that it stays."""
    data = {
        "shape": (tensor.nbytes,),
        "typestr": "|u1",
        "data": (tensor.data_ptr(), False),
        "version": 2,
    }
    memory = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=data), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)
