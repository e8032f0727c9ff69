"""One rank: its part of the model and of the KV cache, and the forward pass of a step."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.channel import Channel
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


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a forward pass reads, on the device.

    Attributes:
        input_ids, positions: `[num_tokens]` int64.
        context: for the attention layers.
        temperatures: `[num_seqs]` float32.
        seeds: `[num_seqs]` int64.
        sample_positions: `[num_seqs]` int64, position of the token that is to be sampled.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    context: Context
    temperatures: torch.Tensor
    seeds: torch.Tensor
    sample_positions: torch.Tensor


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
        self.backend = select_backend(
            config.attention_backend, config.device, config.kvcache_block_size, head_size(hf_config), config.dtype
        )
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
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
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
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        context = Context(True, None, cu_seqlens, cu_seqlens, max_len, max_len)
        ones = torch.ones(num_seqs, dtype=torch.int64, device=self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._forward(StepInputs(zeros, zeros, context, ones.float(), ones, ones))
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
        blocks_per_seq = -(-config.max_model_len // config.kvcache_block_size)
        if self.device.type == "cpu":
            return max(blocks_per_seq, min(CPU_KVCACHE_BYTES // block_bytes, config.max_num_seqs * blocks_per_seq))
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

    @torch.inference_mode()
    def _capture_graphs(self) -> None:
        """Record a decode step, sampling included, for each batch size of a ladder.

        A graph replays on the addresses it was captured with, so all sizes share one set of input and output
        buffers; and one memory pool, whose needs the largest size, captured first, sets.
        """
        largest = min(self.config.max_num_seqs, MAX_GRAPH_BATCH)
        blocks_per_seq = -(-self.config.max_model_len // self.config.kvcache_block_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.graph_slots = torch.full((largest,), -1, dtype=torch.int32, device=self.device)
        self.graph_context_lens = zeros(largest, dtype=torch.int32)
        self.graph_block_tables = zeros(largest, blocks_per_seq, dtype=torch.int32)
        self.graph_ids, self.graph_positions, self.graph_sample_positions = (zeros(largest) for _ in range(3))
        self.graph_temperatures, self.graph_seeds = zeros(largest, dtype=torch.float32), zeros(largest)
        self.graph_tokens = zeros(largest)
        self.graph_sizes = sorted({1, 2, 4, *range(8, largest, 8), largest} & set(range(1, largest + 1)))
        pool = None
        for size in reversed(self.graph_sizes):
            inputs = StepInputs(
                self.graph_ids[:size],
                self.graph_positions[:size],
                Context(
                    slot_mapping=self.graph_slots[:size],
                    context_lens=self.graph_context_lens[:size],
                    block_tables=self.graph_block_tables[:size],
                ),
                self.graph_temperatures[:size],
                self.graph_seeds[:size],
                self.graph_sample_positions[:size],
            )
            if pool is None:
                self._forward(inputs)  # compiles the kernels, which a capture must not do
                torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool):
                self.graph_tokens[:size] = self._forward(inputs)
            pool = pool or graph.pool()
            self.graphs[size] = graph
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
        """Release the device memory and leave the process group."""
        self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.config.tensor_parallel_size > 1:
            dist.destroy_process_group()

    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int]:
        """One step: compute the scheduled tokens of `seqs` and sample a token after each sequence's last one."""
        inputs = self.prepare_prefill(seqs) if is_prefill else self.prepare_decode(seqs)
        if is_prefill or not self.graphs or len(seqs) > self.graph_sizes[-1]:
            return self._forward(inputs).tolist()
        return self._replay(inputs).tolist()

    # --- inputs ----------------------------------------------------------------------------------------------

    def prepare_prefill(self, seqs: list[Sequence]) -> StepInputs:
        """Lay the scheduled tokens of all sequences one after the other."""
        input_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        cu_seqlens_q, cu_seqlens_k = [0], [0]
        max_seqlen_q = max_seqlen_k = 0
        reads_cache = False
        for seq in seqs:
            start, num_new = seq.num_computed_tokens, seq.num_scheduled_tokens
            input_ids += seq.scheduled_token_ids
            positions += range(start, start + num_new)
            slot_mapping += self._slots(seq.block_table, start, start + num_new)
            cu_seqlens_q.append(cu_seqlens_q[-1] + num_new)
            cu_seqlens_k.append(cu_seqlens_k[-1] + start + num_new)
            max_seqlen_q, max_seqlen_k = max(max_seqlen_q, num_new), max(max_seqlen_k, start + num_new)
            reads_cache |= start > 0
        context = Context(
            is_prefill=True,
            slot_mapping=self._to_device(slot_mapping, torch.int32),
            cu_seqlens_q=self._to_device(cu_seqlens_q, torch.int32),
            cu_seqlens_k=self._to_device(cu_seqlens_k, torch.int32),
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            block_tables=self._block_tables(seqs) if reads_cache else None,
        )
        return self._step_inputs(seqs, input_ids, positions, context)

    def prepare_decode(self, seqs: list[Sequence]) -> StepInputs:
        """One token of each sequence: its last, whose K and V are not in the cache yet."""
        block_size = self.config.kvcache_block_size
        positions = [seq.num_tokens - 1 for seq in seqs]
        slot_mapping = [
            seq.block_table[position // block_size] * block_size + position % block_size
            for seq, position in zip(seqs, positions, strict=True)
        ]
        context = Context(
            slot_mapping=self._to_device(slot_mapping, torch.int32),
            context_lens=self._to_device([seq.num_tokens for seq in seqs], torch.int32),
            block_tables=self._block_tables(seqs),
        )
        return self._step_inputs(seqs, [seq.token_ids[-1] for seq in seqs], positions, context)

    def _step_inputs(
        self, seqs: list[Sequence], input_ids: list[int], positions: list[int], context: Context
    ) -> StepInputs:
        return StepInputs(
            self._to_device(input_ids, torch.int64),
            self._to_device(positions, torch.int64),
            context,
            self._to_device([seq.temperature for seq in seqs], torch.float32),
            self._to_device([seq.seed for seq in seqs], torch.int64),
            self._to_device([seq.num_tokens for seq in seqs], torch.int64),
        )

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

    def _block_tables(self, seqs: list[Sequence]) -> torch.Tensor:
        width = max(len(seq.block_table) for seq in seqs)
        rows = [seq.block_table + [-1] * (width - len(seq.block_table)) for seq in seqs]
        return self._to_device(rows, torch.int32)

    def _to_device(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        if self.device.type == "cpu":
            return torch.tensor(values, dtype=dtype)
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self.device, non_blocking=True)

    # --- the forward pass ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Model, LM head and sampler: `[num_seqs]` int64 token ids, on the device."""
        set_context(inputs.context)
        try:
            hidden = self.model(inputs.input_ids, inputs.positions)
            logits = self.model.compute_logits(hidden)
            return self.sampler(logits, inputs.temperatures, inputs.seeds, inputs.sample_positions)
        finally:
            reset_context()

    @torch.inference_mode()
    def _replay(self, inputs: StepInputs) -> torch.Tensor:
        """The same for a decode step, by the graph of the next larger batch size."""
        num_seqs, context = len(inputs.input_ids), inputs.context
        size = next(size for size in self.graph_sizes if size >= num_seqs)
        # Padding rows store nothing (slot -1) and attend to nothing (context length 0).
        self.graph_slots[:size].fill_(-1)
        self.graph_context_lens[:size].zero_()
        self.graph_slots[:num_seqs] = context.slot_mapping
        self.graph_context_lens[:num_seqs] = context.context_lens
        self.graph_block_tables[:num_seqs, : context.block_tables.shape[1]] = context.block_tables
        self.graph_ids[:num_seqs] = inputs.input_ids
        self.graph_positions[:num_seqs] = inputs.positions
        self.graph_sample_positions[:num_seqs] = inputs.sample_positions
        self.graph_temperatures[:num_seqs] = inputs.temperatures
        self.graph_seeds[:num_seqs] = inputs.seeds
        self.graphs[size].replay()
        return self.graph_tokens[:num_seqs]


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
