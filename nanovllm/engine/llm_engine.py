"""The engine: requests in, results out, and the loop between."""

import multiprocessing
import operator
import random
import reprlib
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.config import Config
from nanovllm.engine.channel import Channel
from nanovllm.engine.model_runner import ModelRunner, PendingTokens, run_worker
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.models import MODELS
from nanovllm.sampling_params import SamplingParams
from nanovllm.trace import Trace

Prompt = str | list[int]


class LLMEngine:
    """Drives a Scheduler and a rank-0 ModelRunner.

    `model` is a checkpoint directory in Hugging Face format or a hub id; `options` are the fields of `Config`.
    What is not right about them is a TypeError or ValueError.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = config = Config.from_options(model, options)
        MODELS[config.hf_config.architectures[0]].check_config(config.hf_config, config.tensor_parallel_size)
        self.tokenizer = load_tokenizer(config.model)
        if config.eos == -1:
            config.eos = find_eos(config, self.tokenizer)
        self._seeds = random.Random(config.seed)  # of the requests that bring none
        channel = store = None
        if config.tensor_parallel_size > 1 and dist.is_initialized():
            raise ValueError(
                f"tensor_parallel_size {config.tensor_parallel_size} needs torch.distributed's default process "
                "group, and this process uses it already; exit() the other engine, or use another process"
            )
        try:
            if config.tensor_parallel_size > 1:
                size = config.tensor_parallel_size
                channel = Channel(size - 1)
                # Port 0: the system picks one that is free.
                store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
                context = multiprocessing.get_context("spawn")
                for rank in range(1, size):
                    args = (config, rank, channel, store.port)
                    process = context.Process(target=run_worker, args=args, daemon=True)
                    process.start()
                    channel.processes.append(process)
                channel.wait_taken()  # a worker that cannot start is found out here, not in a collective
            self.model_runner: ModelRunner | None = ModelRunner(config, 0, channel, store)
        except BaseException:
            if channel is not None:
                channel.close()
                if dist.is_initialized():
                    dist.destroy_process_group()
            raise
        # Runs once: at exit(), when the engine is collected, or at the interpreter's end.
        self._finalizer = weakref.finalize(self, shut_down, self.model_runner, channel)
        # On a GPU one step is always queued behind the one that runs, so that the device never waits for Python.
        self._max_pending = 1 if config.device == "cuda" else 0
        self._counters = Counter(requests=0, prompt_tokens=0, completion_tokens=0, prefix_hit_tokens=0, preemptions=0)
        self._trace: Trace | None = None
        self.reset()

    def exit(self) -> None:
        """End the workers and free the memory. The engine cannot be used afterwards."""
        self._finalizer()
        self.model_runner = None

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt; returns the id by which `step` reports its result. Raises as `generate` does."""
        params = sampling_params if sampling_params is not None else SamplingParams()
        return self._queue(self._checked(prompt, params, 0), params)

    def _queue(self, token_ids: list[int], params: SamplingParams) -> int:
        seq = Sequence(token_ids, params, seed=self._seeds.getrandbits(63))
        seq.max_tokens = min(seq.max_tokens, self.config.max_model_len - seq.num_prompt_tokens)
        self.scheduler.add(seq)
        return seq.seq_id

    def _check_alive(self) -> None:
        if self.model_runner is None:
            raise RuntimeError("this engine was shut down, by exit() or a failed rank; make a new LLM")

    def _checked(self, prompt: Prompt, params: SamplingParams, index: int) -> list[int]:
        """The token ids of a request that can be served; else an exception that says what is wrong with it."""
        self._check_alive()
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params of prompt {index} must be a SamplingParams, not {params!r}")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompt {index} is text, and {self.config.model} has no tokenizer; pass token ids")
            try:
                token_ids = self.tokenizer.encode(prompt)
            except Exception as error:  # a lone surrogate, say
                raise ValueError(f"prompt {index} cannot be tokenised: {reprlib.repr(prompt)}: {error}") from error
        else:
            try:
                if isinstance(prompt, (bytes, bytearray, dict, set, frozenset)):
                    raise TypeError
                token_ids = list(prompt)
                types = set(map(type, token_ids))
                if bool in types:
                    raise TypeError
                if types != {int}:  # numpy's integers, say
                    token_ids = [operator.index(token_id) for token_id in token_ids]
            except TypeError:
                raise TypeError(
                    f"prompt {index} must be a string or a list of token ids, not {reprlib.repr(prompt)} (one prompt "
                    "of token ids is passed as a list of one list)"
                ) from None
        if not token_ids:
            raise ValueError(f"prompt {index} is empty; it must have at least one token")
        vocab = self.config.hf_config.vocab_size
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < vocab:
                raise ValueError(f"prompt {index} has the token id {token_id}; the vocabulary is 0 to {vocab - 1}")
        if len(token_ids) >= self.config.max_model_len:
            raise ValueError(
                f"prompt {index} has {len(token_ids)} tokens, and max_model_len {self.config.max_model_len} must "
                "hold it and at least one new token; shorten the prompt or raise max_model_len"
            )
        return token_ids

    def is_finished(self) -> bool:
        """Whether no request is queued or running."""
        return self.scheduler.is_finished() and not self._pending

    def step(self) -> tuple[list[tuple[int, dict[str, Any]]], int]:
        """Complete one forward pass, having launched the next one behind it.

        Returns:
            (request id, result) of each request that finished, and the number of tokens: of a prefill step, those
            computed; of a decode step, minus the number of sequences; 0 when there was nothing to do.
        """
        self._check_alive()
        if self.is_finished():
            return [], 0
        start = time.perf_counter()
        try:
            while len(self._pending) <= self._max_pending and (step := self.scheduler.schedule()) is not None:
                if self._trace is not None:
                    self._trace.scheduled(step, self.scheduler)
                self._pending.append((step, self.model_runner.call("launch", step.seqs, step.is_prefill)))
            step, token_ids = self._pending.popleft()
            finished = self.scheduler.postprocess(step, token_ids.wait())
            if self._trace is not None:
                self._trace.completed(step, token_ids, finished, start)
        except BaseException as error:
            failure = None
            if self.model_runner.channel is not None:
                # The ranks may stand at different collectives now: nothing can go on from here.
                failure = self.model_runner.channel.kill()
                self.exit()
            self.reset()
            if failure is not None and isinstance(error, Exception):
                raise failure from error
            raise
        num_tokens = step.num_tokens if step.is_prefill else -step.num_tokens
        return [(seq.seq_id, self._result(seq)) for seq in finished], num_tokens

    def reset(self) -> None:
        """Drop all requests and the cache: a step that was cut short leaves blocks and queues half updated."""
        self.scheduler = Scheduler(self.config, self._counters)
        self._pending: deque[tuple[Step, PendingTokens]] = deque()  # launched, tokens not read back; oldest first

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """`with llm.trace() as trace:` records what runs inside it, except inside another such `with`."""
        outer, self._trace = self._trace, Trace(self.scheduler, self.config.device == "cuda")
        try:
            yield self._trace
        finally:
            self._trace = outer

    def stats(self) -> dict[str, int]:
        """Counters since the engine was made, which `reset` keeps, and the cache's blocks as they are now."""
        return {**self._counters, **self.scheduler.block_manager.usage()}

    def _result(self, seq: Sequence) -> dict[str, Any]:
        token_ids = seq.completion_token_ids
        text = "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return {"text": text, "token_ids": token_ids, "finish_reason": seq.finish_reason}

    def generate(
        self, prompts: str | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None, use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Complete prompts, batched as the cache allows.

        Args:
            prompts: one string, or a list whose items are strings or lists of token ids.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show a progress bar.

        Returns:
            For each prompt, in order, a dict with `text` (the completion, special tokens left out; "" without a
            tokenizer), `token_ids` (of the completion) and `finish_reason`: "stop" (end of sequence) or "length"
            (`max_tokens`, or `max_model_len`, was reached).

        Raises:
            TypeError, ValueError: a prompt or its parameters are not right; nothing is queued then.
            RuntimeError: requests of `add_request` are unfinished.
        """
        if not self.is_finished():
            raise RuntimeError("requests of add_request are unfinished; run step() until is_finished(), or reset()")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a string or a list of prompts, not {prompts!r}")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise TypeError(f"sampling_params must be a SamplingParams or a list of them, not {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; pass one for each")
        checked = list(map(self._checked, prompts, sampling_params, range(len(prompts))))
        results: dict[int, dict[str, Any]] = {}
        rates = {"prefill": "-", "decode": "-"}
        try:
            request_ids = [self._queue(*request) for request in zip(checked, sampling_params, strict=True)]
            with tqdm(total=len(prompts), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as progress:
                while not self.is_finished():
                    start = time.perf_counter()
                    finished, num_tokens = self.step()
                    kind = "prefill" if num_tokens > 0 else "decode"
                    rates[kind] = f"{abs(num_tokens) / (time.perf_counter() - start):.0f}tok/s"
                    progress.set_postfix(rates, refresh=False)
                    results.update(finished)
                    progress.update(len(finished))
        except BaseException:  # Ctrl-C too: the abandoned requests must not come back in the next call
            self.reset()
            raise
        return [results[request_id] for request_id in request_ids]


def shut_down(model_runner: ModelRunner, channel: Channel | None) -> None:
    try:
        if channel is None or all(process.is_alive() for process in channel.processes):
            model_runner.call("exit")
        else:
            model_runner.exit()
    finally:
        if channel is not None:
            channel.close()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None when it has none (prompts are then token ids)."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    if not any((Path(path) / file).is_file() for file in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a malformed file makes transformers raise
        raise ValueError(f"transformers cannot read the tokenizer in {path}: {error}") from error


def find_eos(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The end-of-sequence id: the tokenizer's, else the model's; -1 when neither names one."""
    eos = getattr(tokenizer, "eos_token_id", None)
    eos = getattr(config.hf_config, "eos_token_id", None) if eos is None else eos
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    return -1 if eos is None else eos
