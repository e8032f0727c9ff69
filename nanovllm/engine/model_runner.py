"""One rank: its part of the model and of the KV cache, and the steps it runs on them."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.config import Config
from nanovllm.engine.graphs import (
    SIZES_TO_COMPILE,
    StepGraphs,
    StepOutput,
    clear_all,
    decode_sizes,
)
from nanovllm.engine.kv_cache import allocate_kv_cache
from nanovllm.engine.padded_prefill import PaddedPrefill
from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.engine.prefill_batch import PrefillBatch
from nanovllm.engine.scheduler import Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_buffers import SEQUENCE, make_decode_buffers
from nanovllm.kernels.attention_backend import select_backend
from nanovllm.kernels.copy_blocks import copy_blocks
from nanovllm.kernels.cpu_memory import move_to_huge_pages
from nanovllm.kernels.cpu_threads import threads_for
from nanovllm.kernels.prefix_sharing import PrefixSharing
from nanovllm.layers.attention import Attention
from nanovllm.layers.residual import Normed
from nanovllm.layers.sampler import Sampled, Sampler
from nanovllm.models import build_model, head_size
from nanovllm.parallel.process_group import ProcessGroup
from nanovllm.readout.step_reader import Readings, StepReader
from nanovllm.sampling.extras import Extras, copying_extras
from nanovllm.sampling.masks import StepMasks
from nanovllm.sampling.table import SamplingTable
from nanovllm.sharing.copy_on_write import BlockCopy
from nanovllm.utils.context import StepInputs, running
from nanovllm.utils.tensor_parallel import tensor_parallel
from nanovllm.warm_up import cached_prefills, largest_prefill


class ModelRunner:
    """Runs the model on one device.

    Rank 0 lives in the user's process. Its `call` passes a call on through `channel` to the other
    ranks, which wait in `loop`. So all ranks execute the same methods in the same order, and meet
    in the all-reduces of the forward pass.

    Each admitted sequence has a row, of the same number on every rank, in the tables that are kept
    here: its block table, its sampling options, its newest token.
    """

    def __init__(self, config: Config, group: ProcessGroup | None = None) -> None:
        """Load the model, size the KV cache, and capture the CUDA graphs. One rank has no group."""
        self.config = config
        self.group = group
        self.rank = 0 if group is None else group.rank
        self.channel = None if group is None else group.channel
        self.is_cuda = config.device == "cuda"
        self.device = torch.device("cuda", self.rank) if self.is_cuda else torch.device("cpu")
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            self.stream = torch.cuda.current_stream(self.device)  # of all steps
        self.decode_graphs = StepGraphs()
        self.shared_decode_graphs = StepGraphs()  # of decode steps with shared prefixes
        self.prefill_graphs = StepGraphs()
        self.clear_graphs = partial(
            clear_all, self.decode_graphs, self.shared_decode_graphs, self.prefill_graphs
        )
        if group is not None:
            group.clear_graphs = self.clear_graphs
        self._load_model()
        if self.is_cuda:
            self._warm_up()
        self.kv_cache = allocate_kv_cache(config, self.attention_layers, self.device)
        self.allocate_tables()
        if self.is_cuda:
            for inputs in cached_prefills(config, self.backend, self._to_device):
                self._forward(inputs)
            self.copy_blocks([BlockCopy(0, 0, 1)])  # compiles this kernel, too
        if self.is_cuda and not config.enforce_eager:
            self.capture_graphs()

    def _load_model(self) -> None:
        config = self.config
        # Before the weights, which may take minutes to load: a wrong option is told at once.
        self.backend = select_backend(
            config.attention_backend,
            config.device,
            block_size=config.kvcache_block_size,
            head_dim=head_size(config.hf_config),
            dtype=config.dtype,
            cache_dtype=config.kv_cache_dtype,
        )
        config.attention_backend = self.backend.name
        size = config.tensor_parallel_size
        small_all_reduce = None if self.group is None else self.group.small_all_reduce
        prefill_all_reduce = None if self.group is None else self.group.prefill_all_reduce
        with tensor_parallel(self.rank, size, small_all_reduce, prefill_all_reduce):
            self.model = build_model(config, self.device)
            self.sampler = Sampler(self.model.lm_head.vocab_start, config.hf_config.vocab_size)
        if not self.is_cuda:
            move_to_huge_pages(self.model)
        self.num_parameters = sum(param.numel() for param in self.model.parameters())
        self.attention_layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        for layer in self.attention_layers:
            layer.backend = self.backend
            if config.kv_cache_dtype != config.dtype:
                layer.options = layer.options.with_fp8_cache(layer.kv_scales)
        self.attention_layers[-1].only_last_tokens = True

    def allocate_tables(self) -> None:
        """Make what belongs to the sequences' rows, and the buffers of steps."""
        max_num_seqs = self.config.max_num_seqs
        blocks_per_seq = -(-self.config.max_model_len // self.config.kvcache_block_size)
        num_rows = max_num_seqs + 1  # the last row is for the padding of steps
        # Each sequence's newest token, on the device: the next step reads it before the host can.
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        # On the host, a decode step only gathers what belongs to its sequences. The block tables
        # are `[blocks_per_seq, rows]`, so that the part in use lies in one piece.
        self.block_tables = np.full((blocks_per_seq, num_rows), -1, dtype=np.int32)
        self.temperatures = np.zeros(num_rows, dtype=np.float32)
        self.seeds = np.zeros(num_rows, dtype=np.int64)
        self.sampling = SamplingTable(num_rows, self.config, self.device, self._to_device)
        self.buffers = make_decode_buffers(max_num_seqs, blocks_per_seq, self.device)
        self.padded_prefill = PaddedPrefill(
            self.config, self.attention_layers[0], blocks_per_seq, self.device
        )
        self.prefix_sharing = PrefixSharing(self.config, self.attention_layers, self.device)

    def _warm_up(self) -> None:
        """Run the largest prefill there can be: it shows the peak of what activations take."""
        inputs = largest_prefill(self.config, self.backend, self._to_device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.inference_mode():
            _, logits = self._forward(inputs)
            extras = copying_extras(len(logits), self.device)
            self.sampler(logits, inputs.temperatures, inputs.seeds, inputs.last_positions, extras)
        torch.cuda.synchronize(self.device)

    def call(self, method: str | Callable[..., Any], *args: Any) -> Any:
        """Call a method, or a function of a runner, on every rank; returns this one's result."""
        if self.channel is not None and self.rank == 0:
            self.channel.send(method, args)
        function = getattr(self, method) if isinstance(method, str) else partial(method, self)
        return function(*args)

    def loop(self) -> None:
        """Workers: execute rank 0's commands until it says exit."""
        assert self.channel is not None
        method: str | Callable[..., Any] = ""
        while method != "exit":
            method, args = self.channel.receive(self.rank)
            self.call(method, *args)

    def exit(self) -> None:
        """Release the memory, for the next engine to use, and leave the process group."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        self.clear_graphs()
        for layer in self.attention_layers:
            layer.k_cache = torch.empty(0)
            layer.v_cache = torch.empty(0)
        del self.kv_cache, self.model, self.sampler, self.attention_layers, self.sampling
        gc.collect()  # parameters and their layers refer to each other, by `weight_loader`
        if self.group is not None:
            self.group.leave()
        if self.is_cuda:
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def launch(self, step: Step | StepMasks) -> PendingTokens:
        """Rank 0: queue a step on every device, or the draw of one that has waited for its masks.

        The modes that the user's thread is in are not the model's: autocast would round, and on
        another stream a step would not wait for the one before it.
        """
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self.launch(step)
        if self.is_cuda and torch.cuda.current_stream() != self.stream:
            with torch.cuda.stream(self.stream):  # of this runner's device, too
                return self.launch(step)
        # Always: tensors made in the user's own inference mode could not be changed outside of it.
        with torch.inference_mode():
            return self._launch(step)

    def _launch(self, step: Step | StepMasks) -> PendingTokens:
        if isinstance(step, StepMasks):
            return PendingTokens(self.call("sample_masked", step))
        if step.copies:
            self.call("copy_blocks", step.copies)
        if step.is_prefill:
            return PendingTokens(*self.call("launch_prefill", step.seqs))
        # This is all that the ranks are told, however long the contexts are.
        table_rows = np.array([seq.row for seq in step.seqs])
        context_lens = np.array([seq.num_computed_tokens for seq in step.seqs], dtype=np.int32)
        last_blocks = np.array([seq.block_table[-1] for seq in step.seqs], dtype=np.int32)
        return PendingTokens(self.call("launch_decode", table_rows, context_lens, last_blocks))

    def copy_blocks(self, copies: list[BlockCopy]) -> None:
        """Copy the beginnings of blocks, in all layers, behind the steps that are queued."""
        copy_blocks(self.kv_cache, copies, self._to_device)

    def sample_masked(self, masks: StepMasks) -> Sampled | None:
        """Draw the tokens of the last step, which waits for these masks."""
        logits, inputs, extras = self._held
        del self._held  # else the logits would take memory until the next step of this kind
        return self._sample(logits, inputs, self.sampling.add_masks(extras, masks))

    def launch_prefill(self, seqs: list[Sequence]) -> tuple[Sampled | None, Readings | None]:
        """Compute the scheduled tokens of all sequences; sample, and read what else they want."""
        batch = PrefillBatch.of(seqs, self.config.kvcache_block_size)
        rows = batch.table_rows
        self.prefix_sharing.forget()
        self.block_tables[: len(batch.block_tables), rows] = batch.block_tables
        self.temperatures[rows] = batch.temperatures
        self.seeds[rows] = batch.seeds
        for seq in seqs:
            self.sampling.fill(seq)
        extras = self.sampling.build(rows, batch.num_total)
        reader = StepReader.of(seqs, self.sampler, self._to_device)
        padded = self.padded_prefill
        size = self.prefill_graphs.padded_size(len(batch.input_ids))
        # Followers have no tokens of their own, so there may be more sequences than tokens.
        fits_graph = len(seqs) <= min(size, padded.max_seqs)
        fits_graph = fits_graph and (reader is None or reader.reads_output_only)
        if fits_graph and size in self.prefill_graphs:
            padded.upload(batch, size)
            output = self.prefill_graphs.replay(size)
            if reader is not None:
                return reader.read_output(output, self.model, len(seqs))
            return self._graph_samples(output, padded.inputs, size, len(seqs), extras), None
        inputs = batch.inputs(self.backend, self._to_device)
        with self._threads(len(batch.input_ids)):
            if reader is not None:
                sample = partial(self._sample, inputs=inputs, extras=extras)
                return reader.run(inputs, self.model, sample)
            _, logits = self._forward(inputs)
            return self._sample(logits, inputs, extras), None

    def prepare_prefill(self, seqs: list[Sequence]) -> StepInputs:
        """Lay the scheduled tokens of all sequences one after the other; see `StepInputs`."""
        batch = PrefillBatch.of(seqs, self.config.kvcache_block_size)
        return batch.inputs(self.backend, self._to_device)

    def launch_decode(
        self, table_rows: np.ndarray, context_lens: np.ndarray, last_blocks: np.ndarray
    ) -> Sampled | None:
        """Compute the newest token of each sequence, and sample the next one. `[n]` each: the
        sequences' rows, their lengths, and the blocks of their newest tokens.
        """
        num_seqs = len(table_rows)
        extras = self.sampling.build(table_rows, context_lens)
        shares = self.prefix_sharing.find(table_rows, context_lens, self.block_tables)
        graphs = self.shared_decode_graphs if shares else self.decode_graphs
        size = graphs.padded_size(num_seqs)
        self.prepare_decode(table_rows, context_lens, last_blocks, size)
        if shares:
            self.prefix_sharing.upload(size)
        if size in graphs:
            output = graphs.replay(size)
            return self._graph_samples(output, self._decode_inputs, size, num_seqs, extras)
        inputs = self._decode_inputs(size, shares)
        with self._threads(size):
            _, logits = self._forward(inputs)
            return self._sample(logits, inputs, extras)

    def prepare_decode(
        self, table_rows: np.ndarray, context_lens: np.ndarray, last_blocks: np.ndarray, size: int
    ) -> None:
        """Fill the decode buffers, padded to `size` rows, and upload them."""
        block_size = self.config.kvcache_block_size
        positions = context_lens - 1
        columns = positions // block_size
        self.block_tables[columns, table_rows] = last_blocks  # some are new
        inputs = {
            "table_rows": table_rows,
            "positions": positions,
            "context_lens": context_lens,
            "slots": last_blocks * block_size + positions % block_size,
            "temperatures": self.temperatures[table_rows],
            "seeds": self.seeds[table_rows],
        }
        used_columns = self.block_tables[: columns.max() + 1]
        block_tables = used_columns.take(table_rows, axis=1)  # a third faster than [...]
        self.buffers.upload(inputs, block_tables, {SEQUENCE: size})

    def _decode_inputs(self, size: int, shares: bool = False) -> StepInputs:
        """The first `size` rows of the decode buffers. shares: read what groups share once."""
        rows = self.buffers.on_device({SEQUENCE: size})
        plan = self.backend.plan_decode(rows["context_lens"], rows["block_tables"])
        if shares:
            plan = replace(plan, prefixes=self.prefix_sharing.on_device(size, plan.context_lens))
        return StepInputs(
            is_prefill=False,
            positions=rows["positions"],
            slot_mapping=rows["slots"],
            attention=plan,
            table_rows=rows["table_rows"],
            temperatures=rows["temperatures"],
            seeds=rows["seeds"],
            last_positions=rows["positions"],
        )

    def capture_graphs(self) -> None:
        """Capture all graphs, on buffers that hold nothing but padding."""
        # A real step's tiles would name rows that smaller sizes, run on the same buffers, lack.
        pool = None
        if self.backend.tiled_prefill is not None and self.config.tensor_parallel_size == 1:
            sizes = self.padded_prefill.sizes
            pool = self.prefill_graphs.capture(self._prefill, sizes, sizes)
        sizes = decode_sizes(self.config.max_num_seqs)
        to_compile = sorted({*SIZES_TO_COMPILE, sizes[-1]} & {*sizes})
        pool = self.decode_graphs.capture(self._decode, sizes, to_compile, pool)
        if self.prefix_sharing.is_on:
            sizes = self.prefix_sharing.graph_sizes(sizes)
            to_compile = [sizes[0], sizes[-1]]  # kernels with splits, and without
            decode = partial(self._decode, shares=True)
            self.shared_decode_graphs.capture(decode, sizes, to_compile, pool)

    def _decode(self, size: int, shares: bool = False) -> StepOutput:
        """Run one decode step on the first `size` rows of the buffers: what a graph records."""
        return self._run(self._decode_inputs(size, shares))

    def _prefill(self, size: int) -> StepOutput:
        """Run one prefill of `size` tokens on its buffers: what a graph records."""
        return self._run(self.padded_prefill.inputs(size))

    def _run(self, inputs: StepInputs) -> StepOutput:
        normed, logits = self._forward(inputs)
        sampled = self._sample(logits, inputs, None)
        assert sampled is not None  # it waits for no masks
        return StepOutput(sampled.token_ids, logits, normed.hidden)

    def _graph_samples(
        self,
        output: StepOutput,
        make_inputs: Callable[[int], StepInputs],
        size: int,
        num_seqs: int,
        extras: Extras,
    ) -> Sampled | None:
        """The samples of a step that a graph has run, without padding."""
        if extras is None:
            return Sampled(output.token_ids[:num_seqs], None)
        # The graph has sampled plainly. Sample again from its logits, over its tokens.
        return self._sample(output.logits[:num_seqs], make_inputs(size), extras)

    def _threads(self, num_tokens: int) -> AbstractContextManager[None]:
        """On a CPU: as many threads as a step of so many tokens is worth."""
        return nullcontext() if self.is_cuda else threads_for(num_tokens * self.num_parameters)

    @torch.inference_mode()
    def _forward(self, inputs: StepInputs) -> tuple[Normed, Tensor]:
        """Run model and LM head: hidden states and logits `[n, vocab / tp]` of the last tokens."""
        input_ids = inputs.input_ids
        if input_ids is None:
            input_ids = self.last_tokens[inputs.table_rows]
        with running(inputs):
            hidden = self.model(input_ids, inputs.positions)
            return hidden, self.model.compute_logits(hidden)

    @torch.inference_mode()
    def _sample(self, logits: Tensor, inputs: StepInputs, extras: Extras) -> Sampled | None:
        """Draw the next tokens, and keep them on the device for the next step. None if the masks of
        some are not there yet: `sample_masked` draws them when they are.
        """
        if extras is not None and extras.waits_for_masks:
            self._held = (logits, inputs, extras)
            return None
        assert inputs.table_rows is not None and inputs.temperatures is not None
        assert inputs.seeds is not None and inputs.last_positions is not None
        num_seqs = len(logits)  # a graph's inputs may have padding behind them
        sampled: Sampled = self.sampler(
            logits,
            inputs.temperatures[:num_seqs],
            inputs.seeds[:num_seqs],
            inputs.last_positions[:num_seqs],
            extras,
        )
        # A -1 ends its sequence, but the next step may be launched before the host has read it.
        token_ids = sampled.token_ids.clamp(min=0)
        self.last_tokens.index_copy_(0, inputs.table_rows[:num_seqs], token_ids)
        return sampled

    def _to_device(self, values: list[int] | np.ndarray, dtype: type | None = None) -> Tensor:
        """Copy to the device as a tensor of a NumPy type, without waiting for it."""
        # By way of NumPy: of a list, torch's own way is several times slower.
        tensor = torch.from_numpy(np.asarray(values, dtype=dtype))
        if not self.is_cuda:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
