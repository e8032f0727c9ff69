"""One rank: its part of the model and of the KV cache, and the forward pass of a step."""

import gc
import traceback
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.channel import Channel
from nanovllm.engine.decode_buffers import DecodeBuffers
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import Attention, select_backend
from nanovllm.layers.sampler import Sampler
from nanovllm.models import MODELS
from nanovllm.models.qwen3 import head_size
from nanovllm.utils.context import Context, reset_context, set_context
from nanovllm.utils.loader import fill_dummy, load_model
from nanovllm.utils.tensor_parallel import tensor_parallel

CPU_KVCACHE_BYTES = 2 << 30  # the cache's default size without a GPU; pages are committed as they are first used
MAX_GRAPH_BATCH = 512


class PendingTokens:
    """The tokens of a launched step, on their way to the host."""

    def __init__(self, token_ids: torch.Tensor) -> None:
        self.token_ids = torch.empty(
            token_ids.shape, dtype=token_ids.dtype, device="cpu", pin_memory=token_ids.is_cuda
        )
        self.token_ids.copy_(token_ids, non_blocking=True)
        self.copied = torch.cuda.Event() if token_ids.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def wait(self) -> list[int]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.token_ids.tolist()


class ModelRunner:
    """Runs the model on one device.

    Rank 0 lives in the user's process and is called by the engine; `call` passes each call on to the other ranks,
    which sit in `loop`, so that all of them execute the same methods in the same order.

    Args:
        config: the engine's options; `num_kvcache_blocks` is filled in when it is -1.
        rank: of tensor parallelism.
        channel, store: how the ranks find each other; None with one rank.
    """

    def __init__(
        self, config: Config, rank: int = 0, channel: Channel | None = None, store: dist.Store | None = None
    ) -> None:
        self.config, self.rank, self.channel = config, rank, channel
        self.device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if store is not None:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=config.tensor_parallel_size)

        hf_config = config.hf_config
        self.blocks_per_seq = -(-config.max_model_len // config.kvcache_block_size)
        self.backend = select_backend(
            config.attention_backend, config.device, config.kvcache_block_size, head_size(hf_config), config.dtype
        )
        config.attention_backend = self.backend.name
        with tensor_parallel(rank, config.tensor_parallel_size), _defaults(self.device, config.dtype):
            self.model = MODELS[hf_config.architectures[0]](hf_config, config.max_model_len)
            self.sampler = Sampler(self.model.lm_head.vocab_start)
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
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}  # with their output tokens
        if self.device.type == "cuda" and not config.enforce_eager:
            self._capture_graphs()

    # --- start-up --------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Run the largest prefill there can be, which shows the peak of the memory that activations take."""
        num_seqs = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
        num_tokens = min(self.config.max_num_batched_tokens, num_seqs * self.config.max_model_len)
        bounds = [num_tokens * i // num_seqs for i in range(num_seqs + 1)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        max_len = -(-num_tokens // num_seqs)
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        ones = torch.ones(num_seqs, dtype=torch.int64, device=self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        context = Context(True, None, cu_seqlens, cu_seqlens, max_len, max_len)
        self._forward(tokens, tokens, context, ones.float(), ones, ones)
        torch.cuda.synchronize(self.device)

    def _allocate_kv_cache(self) -> None:
        config, hf_config = self.config, self.config.hf_config
        kv_heads, head_dim = self.attention_layers[0].num_kv_heads, self.attention_layers[0].head_dim
        num_layers = hf_config.num_hidden_layers
        block_bytes = 2 * num_layers * config.kvcache_block_size * kv_heads * head_dim * config.dtype.itemsize
        if config.num_kvcache_blocks == -1:
            config.num_kvcache_blocks = self._fitting_blocks(block_bytes)
        config.check_kvcache(config.num_kvcache_blocks)
        # Zeros on a GPU, where that costs nothing; on a CPU it would touch, and so commit, every page.
        new = torch.zeros if self.device.type == "cuda" else torch.empty
        self.kv_cache = new(
            2, num_layers, config.num_kvcache_blocks, config.kvcache_block_size, kv_heads, head_dim,
            dtype=config.dtype, device=self.device,
        )  # fmt: skip
        for index, layer in enumerate(self.attention_layers):
            layer.k_cache, layer.v_cache = self.kv_cache[0, index], self.kv_cache[1, index]

    def _fitting_blocks(self, block_bytes: int) -> int:
        config = self.config
        if self.device.type == "cpu":
            most = config.max_num_seqs * self.blocks_per_seq
            return max(self.blocks_per_seq, min(CPU_KVCACHE_BYTES // block_bytes, most))
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        stats = torch.cuda.memory_stats(self.device)
        activations = stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]
        used = total - free  # by this process and by others
        num_blocks = int(total * config.gpu_memory_utilization - used - activations) // block_bytes
        if config.tensor_parallel_size > 1:  # the scheduler counts the same blocks for all ranks
            smallest = torch.tensor(num_blocks, device=self.device)
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
            num_blocks = int(smallest)
        return num_blocks

    def _allocate_buffers(self) -> None:
        """The arrays that decode steps read: the same ones in every step, so that a CUDA graph can be replayed."""
        num_rows = self.config.max_num_seqs
        self.buffers = DecodeBuffers(num_rows, self.blocks_per_seq, self.device)
        # The newest token of each admitted sequence stays on the device: the next step reads it from here, long
        # before the host does. The row after the last takes what padding writes.
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=self.device)
        # Per-sequence inputs on the host, by row; a decode step only gathers them.
        self.block_tables = np.full((num_rows + 1, self.blocks_per_seq), -1, dtype=np.int32)
        self.temperatures = np.zeros(num_rows + 1, dtype=np.float32)
        self.seeds = np.zeros(num_rows + 1, dtype=np.int64)

    def _capture_graphs(self) -> None:
        """Record a decode step, sampling included, for each batch size of a ladder.

        A graph replays on the addresses it was captured with, so all sizes share one set of buffers; and one memory
        pool, whose needs the largest size, captured first, sets.
        """
        largest = min(self.config.max_num_seqs, MAX_GRAPH_BATCH)
        self.graph_sizes = sorted({1, 2, 4, *range(8, largest, 8), largest} & set(range(1, largest + 1)))
        for size in (largest, 1):  # compiles the kernels, which a capture should not do
            self._decode(size)
        torch.cuda.synchronize(self.device)
        pool = None
        for size in reversed(self.graph_sizes):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool):
                tokens = self._decode(size)
            pool = pool or graph.pool()
            self.graphs[size] = graph, tokens
        torch.cuda.synchronize(self.device)

    # --- commands --------------------------------------------------------------------------------------------

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
        del self.kv_cache, self.model, self.sampler, self.attention_layers
        gc.collect()  # parameters and their layers refer to each other (weight_loader)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.config.tensor_parallel_size > 1:
            dist.destroy_process_group()

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> PendingTokens:
        """Start one step: compute the scheduled tokens of `seqs` and sample a token after each sequence's last one.

        On a GPU this returns while the step, or even the one before it, is still running.
        """
        tokens = self._launch_prefill(seqs) if is_prefill else self._launch_decode(seqs)
        return PendingTokens(tokens)

    def _launch_prefill(self, seqs: list[Sequence]) -> torch.Tensor:
        for seq in seqs:
            self.block_tables[seq.row, : len(seq.block_table)] = seq.block_table
            self.temperatures[seq.row], self.seeds[seq.row] = seq.temperature, seq.seed
        rows = [seq.row for seq in seqs]
        input_ids, positions, context = self.prepare_prefill(seqs)
        tokens = self._forward(
            input_ids, positions, context,
            self._to_device(self.temperatures[rows]),
            self._to_device(self.seeds[rows]),
            self._to_device([seq.num_computed_tokens - 1 for seq in seqs], torch.int64),
        )  # fmt: skip
        self.last_tokens.index_copy_(0, self._to_device(rows, torch.int64), tokens)
        return tokens

    def _launch_decode(self, seqs: list[Sequence]) -> torch.Tensor:
        num_seqs = size = len(seqs)
        if self.graphs and num_seqs <= self.graph_sizes[-1]:
            size = self.graph_sizes[bisect_left(self.graph_sizes, num_seqs)]
        self.prepare_decode(seqs, size)
        if not self.graphs or num_seqs > self.graph_sizes[-1]:
            return self._decode(size)
        graph, tokens = self.graphs[size]
        graph.replay()
        return tokens[:num_seqs]

    # --- inputs ----------------------------------------------------------------------------------------------

    def prepare_prefill(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, Context]:
        """Lay the scheduled tokens of all sequences one after the other: input ids, positions and metadata."""
        input_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        cu_seqlens_q, cu_seqlens_k = [0], [0]
        for seq in seqs:
            end = seq.num_computed_tokens
            start = end - seq.num_scheduled_tokens
            input_ids += seq.scheduled_token_ids
            positions += range(start, end)
            slot_mapping += self._slots(seq.block_table, start, end)
            cu_seqlens_q.append(cu_seqlens_q[-1] + end - start)
            cu_seqlens_k.append(cu_seqlens_k[-1] + end)
        reads_cache = cu_seqlens_k[-1] > cu_seqlens_q[-1]
        width = max(len(seq.block_table) for seq in seqs)
        context = Context(
            is_prefill=True,
            slot_mapping=self._to_device(slot_mapping, torch.int32),
            cu_seqlens_q=self._to_device(cu_seqlens_q, torch.int32),
            cu_seqlens_k=self._to_device(cu_seqlens_k, torch.int32),
            max_seqlen_q=max(seq.num_scheduled_tokens for seq in seqs),
            max_seqlen_k=max(seq.num_computed_tokens for seq in seqs),
            block_tables=self._to_device(self.block_tables[[seq.row for seq in seqs], :width]) if reads_cache else None,
        )
        return self._to_device(input_ids, torch.int64), self._to_device(positions, torch.int64), context

    def prepare_decode(self, seqs: list[Sequence], size: int) -> None:
        """Fill the decode buffers for one token of each sequence, padded to `size` rows, and upload them."""
        num_seqs, block_size = len(seqs), self.config.kvcache_block_size
        host = self.buffers.next_host()
        rows, context_lens = host["rows"][:size], host["context_lens"][:size]
        rows[:num_seqs] = [seq.row for seq in seqs]
        context_lens[:num_seqs] = [seq.num_computed_tokens for seq in seqs]
        positions = context_lens[:num_seqs] - 1
        for index in (positions % block_size == 0).nonzero()[0]:  # these have just been given a block
            seq = seqs[index]
            self.block_tables[seq.row, len(seq.block_table) - 1] = seq.block_table[-1]
        tables = host["block_tables"][:size]
        np.take(self.block_tables, rows[:num_seqs], axis=0, out=tables[:num_seqs])
        host["positions"][:num_seqs] = positions
        host["slots"][:num_seqs] = (
            tables[np.arange(num_seqs), positions // block_size] * block_size + positions % block_size
        )
        host["temperatures"][:num_seqs] = self.temperatures[rows[:num_seqs]]
        host["seeds"][:num_seqs] = self.seeds[rows[:num_seqs]]
        # Padding rows store nothing (slot -1), attend to nothing (context length 0) and write to the spare row.
        rows[num_seqs:], context_lens[num_seqs:], host["slots"][num_seqs:size] = self.config.max_num_seqs, 0, -1
        host["positions"][num_seqs:size] = host["temperatures"][num_seqs:size] = 0
        self.buffers.upload()

    def _slots(self, block_table: list[int], start: int, end: int) -> list[int]:
        """Cache slots of the positions `start` to `end` (exclusive), block by block."""
        block_size = self.config.kvcache_block_size
        slots: list[int] = []
        while start < end:
            stop = min(end, (start // block_size + 1) * block_size)
            first = block_table[start // block_size] * block_size + start % block_size
            slots += range(first, first + stop - start)
            start = stop
        return slots

    def _to_device(self, values: list[int] | np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.as_tensor(values, dtype=dtype, device="cpu")
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    # --- the forward pass ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context,
        temperatures: torch.Tensor, seeds: torch.Tensor, sample_positions: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Model, LM head and sampler: `[num_seqs]` int64 token ids, on the device."""
        set_context(context)
        try:
            logits = self.model.compute_logits(self.model(input_ids, positions))
            return self.sampler(logits, temperatures, seeds, sample_positions)
        finally:
            reset_context()

    @torch.inference_mode()
    def _decode(self, size: int) -> torch.Tensor:
        """One decode step on the first `size` rows of the buffers; this is what a graph records."""
        arrays = {name: array[:size] for name, array in self.buffers.device.items()}
        context = Context(
            slot_mapping=arrays["slots"], context_lens=arrays["context_lens"], block_tables=arrays["block_tables"]
        )
        tokens = self._forward(
            self.last_tokens[arrays["rows"]], arrays["positions"], context,
            arrays["temperatures"], arrays["seeds"], arrays["positions"],
        )  # fmt: skip
        self.last_tokens.index_copy_(0, arrays["rows"], tokens)
        return tokens


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
    """Entry of a worker process."""
    try:
        channel.taken[rank - 1].set()
        store = dist.TCPStore("127.0.0.1", port, config.tensor_parallel_size, is_master=False)
        ModelRunner(config, rank, channel, store).loop()
    except Exception:
        channel.errors.put((rank, traceback.format_exc()))
        raise SystemExit(1) from None
