"""The engine: requests in, results out, and the loop between."""

import multiprocessing
import random
import reprlib
import signal
import threading
import time
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.config import Config, read_json
from nanovllm.engine.channel import Channel
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.model_runner import ModelRunner, PendingTokens, run_worker
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.models import MODELS
from nanovllm.sampling_params import SamplingParams
from nanovllm.trace import Trace

Prompt = str | list[int]
Prompts = str | SequenceOf[Prompt]
Params = SamplingParams | SequenceOf[SamplingParams] | None


class LLMEngine:
    """Drives a Scheduler and a rank-0 ModelRunner.

    `model` is a checkpoint directory in Hugging Face format or a hub id; `options` are the fields of `Config`.
    What is not right about them is a TypeError or ValueError.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = config = Config.from_options(model, options)
        MODELS[config.hf_config.architectures[0]].check_config(config.hf_config, config.tensor_parallel_size)
        self.tokenizer = load_tokenizer(config.model)
        self._generation_config = read_json(Path(config.model) / "generation_config.json")
        if config.eos == -1:
            named = [getattr(source, "eos_token_id", None) for source in (self.tokenizer, config.hf_config)]
            config.eos = find_eos(self._generation_config.get("eos_token_id"), *named)
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
            if channel is not None:
                channel.check_workers()
        except BaseException as error:
            failure = None
            if channel is not None:
                failure = channel.kill()
                channel.close()
                if dist.is_initialized():
                    dist.destroy_process_group()
            if failure is not None and isinstance(error, Exception):
                raise failure from error
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

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets: those that the model's generation_config.json recommends."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
        recommended = {name: self._generation_config.get(name) for name in names}
        options = {name.replace("_new", ""): value for name, value in recommended.items() if value is not None}
        if self._generation_config.get("do_sample") is False:
            options["temperature"] = 0
        try:
            return SamplingParams(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.config.model}/generation_config.json: {error}; pass sampling_params") from error

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt; returns the id by which `step` reports its result. Raises as `generate` does."""
        return self._queue(*self._checked([prompt], sampling_params)[0])[0].seq_id

    def abort(self, request_id: int) -> None:
        """End a request of `add_request`, if it has not ended; the next `step` reports what there is of it."""
        if (seqs := self._requests.pop(request_id, None)) is not None:
            self.scheduler.abort(seqs)
            self._ended.append((request_id, self._result(seqs)))

    def _queue(self, token_ids: list[int], params: SamplingParams, is_streamed: bool = False) -> list[Sequence]:
        """One sequence a completion. The first has the request's seed, the others seeds that follow from it."""
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        others, room = random.Random(seed), self.config.max_model_len - len(token_ids)
        seqs = [Sequence(token_ids, params, others.getrandbits(63) if i else seed) for i in range(params.n)]
        for seq in seqs:
            seq.request_id = seqs[0].seq_id
            seq.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
            if self.tokenizer is not None and (is_streamed or params.stop):
                seq.detokenizer = Detokenizer(self.tokenizer, params)
            self.scheduler.add(seq)
        if not is_streamed:  # `step` reports it
            self._requests[seqs[0].seq_id] = seqs
        return seqs

    def _check_alive(self) -> None:
        if self.model_runner is None:
            raise RuntimeError("this engine was shut down, by exit() or a failed rank; make a new LLM")

    def _checked(self, prompts: Prompts, sampling_params: Params) -> list[tuple[list[int], SamplingParams]]:
        """Token ids and parameters of each prompt; or an exception as `generate` describes."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a string or a list of prompts, not {prompts!r}")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or self.get_default_sampling_params()] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise TypeError(f"sampling_params must be a SamplingParams or a list of them, not {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; pass one for each")
        checked = map(self._checked_prompt, prompts, sampling_params, range(len(prompts)))
        return list(zip(checked, sampling_params, strict=True))

    def _checked_prompt(self, prompt: Prompt, params: SamplingParams, index: int) -> list[int]:
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
                token_ids = array("q", prompt)
            except OverflowError as error:
                raise ValueError(f"prompt {index} has a token id far outside the vocabulary: {error}") from None
            except TypeError:
                raise TypeError(
                    f"prompt {index} must be a string or a list of token ids, not {reprlib.repr(prompt)} (one prompt "
                    "of token ids is passed as a list of one list)"
                ) from None
        if not token_ids:
            raise ValueError(f"prompt {index} is empty; it must have at least one token")
        vocab = self.config.hf_config.vocab_size
        ends = np.min(token_ids), np.max(token_ids)  # of an array of 2048 ten times faster than min
        for token_id in (*ends, *params.stop_token_ids, *(params.logit_bias or ())):
            if not 0 <= token_id < vocab:
                raise ValueError(f"prompt {index} has the token id {token_id}; the vocabulary is 0 to {vocab - 1}")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"prompt {index} has stop strings, and {self.config.model} has no tokenizer")
        if len(token_ids) >= self.config.max_model_len:
            raise ValueError(
                f"prompt {index} has {len(token_ids)} tokens, and max_model_len {self.config.max_model_len} must "
                "hold it and at least one new token; shorten the prompt or raise max_model_len"
            )
        return token_ids

    def is_finished(self) -> bool:
        """Whether no request is queued or running."""
        return self.scheduler.is_finished() and not self._pending and not self._ended

    def step(self) -> tuple[list[tuple[int, dict[str, Any]]], int]:
        """Complete one forward pass, having launched the next one behind it.

        Returns:
            (request id, result) of each request that finished, and the number of tokens: of a prefill step, those
            computed; of a decode step, minus the number of sequences; 0 when there was nothing to do.
        """
        self._check_alive()
        ended, self._ended = self._ended, []
        if self.is_finished():
            return ended, 0
        start = time.perf_counter()
        try:
            while len(self._pending) <= self._max_pending and (step := self.scheduler.schedule()) is not None:
                if self._trace is not None:
                    self._trace.scheduled(step, self.scheduler)
                with _uninterrupted():  # Ctrl-C here would reach one rank and not the others
                    self._pending.append((step, self.model_runner.launch(step.seqs, step.is_prefill)))
            step, pending = self._pending.popleft()
            sampled = pending.wait()
            if self.model_runner.channel is not None:
                self.model_runner.channel.check_workers()  # what comes of a dead rank is garbage
            finished = self.scheduler.postprocess(step, *sampled)
            if self._trace is not None:
                self._trace.completed(step, pending, finished, start)
        except BaseException as error:
            failure = None
            if self.model_runner.channel is not None and isinstance(error, Exception):
                # The ranks may stand at different collectives now: nothing can go on from here.
                failure = self.model_runner.channel.kill()
                self.model_runner.let_go()
                self.exit()
            self.reset()
            if failure is not None:
                raise failure from error
            raise
        num_tokens = step.num_tokens if step.is_prefill else -step.num_tokens
        for seq in finished:
            seqs = self._requests.get(seq.request_id)  # None: a stream's
            if seqs is not None and all(other.is_finished for other in seqs):
                ended.append((seq.request_id, self._result(self._requests.pop(seq.request_id))))
        return ended, num_tokens

    def reset(self) -> None:
        """Drop all requests and the cache: a step that was cut short leaves blocks and queues half updated."""
        self.scheduler = Scheduler(self.config, self._counters)
        self._pending: deque[tuple[Step, PendingTokens]] = deque()  # launched, tokens not read back; oldest first
        self._requests: dict[int, list[Sequence]] = {}  # unfinished ones: id -> the sequences of its n completions
        self._ended: list[tuple[int, dict[str, Any]]] = []  # results for the next step to report

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

    def _result(self, seqs: list[Sequence]) -> dict[str, Any]:
        completions = [
            {
                "text": self._text(seq), "token_ids": seq.completion_token_ids, "finish_reason": seq.finish_reason,
                "stop_reason": seq.stop_reason, "logprobs": seq.logprobs,
            } for seq in seqs
        ]  # fmt: skip
        prompt, num_cached = seqs[0].token_ids[: seqs[0].num_prompt_tokens], seqs[0].num_cached_prompt_tokens or 0
        result = {**completions[0], "prompt_token_ids": prompt, "num_cached_tokens": num_cached}
        return result if len(seqs) == 1 else {**result, "completions": completions}

    def _text(self, seq: Sequence) -> str:
        if seq.detokenizer is not None or self.tokenizer is None:
            return "" if seq.detokenizer is None else seq.detokenizer.text
        hides_end = seq.finish_reason == "stop" and not seq.params.include_stop_str_in_output
        token_ids = seq.completion_token_ids[:-1] if hides_end else seq.completion_token_ids
        return self.tokenizer.decode(token_ids, skip_special_tokens=seq.params.skip_special_tokens)

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[dict[str, Any]]:
        """Complete prompts, batched as the cache allows.

        Args:
            prompts: one string, or a list whose items are strings or lists of token ids.
            sampling_params: one for all prompts, or one for each; None: `get_default_sampling_params`.
            use_tqdm: show a progress bar.

        Returns:
            For each prompt, in order, a dict with `text` (the completion; "" without a tokenizer), `token_ids` (of
            the completion, the one that ended it included), `finish_reason` ("stop", or "length": `max_tokens`, or
            `max_model_len`, was reached), `stop_reason` (which stop string or stop token id, else None), `logprobs`
            (None, or for each token a dict of token id -> log-probability, the sampled one first),
            `prompt_token_ids`, `num_cached_tokens` (of the prompt). With n > 1 these are the first completion's, and
            `completions` is a list of n such dicts.

        Raises:
            TypeError, ValueError: a prompt or its parameters are not right; nothing is queued then.
            RuntimeError: requests of `add_request` or of a stream are unfinished.
        """
        if not self.is_finished():
            raise RuntimeError("requests of add_request or stream are unfinished; step() until they are, or reset()")
        requests = self._checked(prompts, sampling_params)
        results: dict[int, dict[str, Any]] = {}
        rates = {"prefill": "-", "decode": "-"}
        try:
            request_ids = [self._queue(*request)[0].seq_id for request in requests]
            with tqdm(total=len(requests), desc="Generating", disable=not use_tqdm, dynamic_ncols=True) as progress:
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


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the `with`."""
    if threading.current_thread() is not threading.main_thread():  # it only ever comes to that one
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


def shut_down(model_runner: ModelRunner, channel: Channel | None) -> None:
    if channel is not None:
        channel.is_closing = True
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


def find_eos(*named: int | SequenceOf[int] | None) -> tuple[int, ...]:
    """All ids that any of these sources names as an end of sequence."""
    ids = (token_id for eos in named for token_id in (eos if isinstance(eos, (list, tuple)) else [eos]))
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
