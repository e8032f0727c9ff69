"""The engine: requests in, results out, and the loop between."""

import random
import time
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.config import Config, read_json
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.engine.ranks import kill_ranks, shut_down, start_ranks
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.trace import Trace
from nanovllm.models import MODELS
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.interrupts import uninterrupted

Prompt = str | list[int]
Prompts = str | SequenceOf[Prompt]
Params = SamplingParams | SequenceOf[SamplingParams] | None
Request = tuple[list[int], SamplingParams]
Result = dict[str, Any]


class LLMEngine:
    """Drives a Scheduler and a rank-0 ModelRunner.

    `model` and `options` are the fields of `Config`; what is not right about them is a TypeError or ValueError.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = config = Config.from_options(model, options, MODELS)
        MODELS[config.hf_config.architectures[0]].check_config(
            config.hf_config, config.tensor_parallel_size
        )
        self.tokenizer = load_tokenizer(config.model)
        self._generation_config = read_json(Path(config.model) / "generation_config.json")
        if config.eos == -1:
            vocab_size = config.hf_config.vocab_size
            config.eos = find_eos(
                vocab_size, self._generation_config, self.tokenizer, config.hf_config
            )
        self.model_runner: ModelRunner | None = start_ranks(config)
        # Runs once: at exit(), when the engine is collected, or at the interpreter's end.
        self._finalizer = weakref.finalize(self, shut_down, self.model_runner)
        # On a GPU one step is always queued behind the one that runs, so that the device never waits for Python.
        self._max_pending = 1 if config.device == "cuda" else 0
        self._seeds = random.Random(config.seed)  # of the requests that bring none
        self._counters = Counter(
            requests=0, prompt_tokens=0, completion_tokens=0, prefix_hit_tokens=0, preemptions=0
        )
        self._trace: Trace | None = None
        self.reset()

    def reset(self) -> None:
        """Drop all requests and the cache: a step that was cut short leaves blocks and queues half updated."""
        self.scheduler = Scheduler(self.config, self._counters)
        self._pending: deque[tuple[Step, PendingTokens]] = (
            deque()
        )  # launched, tokens not read back; oldest first
        self._requests: dict[
            int, list[Sequence]
        ] = {}  # unfinished ones: id -> the sequences of its n completions
        self._ended: list[tuple[int, Result]] = []  # results for the next step to report

    def exit(self) -> None:
        """End the workers and free the memory. The engine cannot be used afterwards."""
        self.model_runner = None
        with uninterrupted():  # it runs once: what it leaves undone stays
            self._finalizer()

    def _check_alive(self) -> None:
        if self.model_runner is None:
            raise RuntimeError(
                "this engine was shut down, by exit() or a failed rank; make a new LLM"
            )

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[Result]:
        """Complete prompts (one string, or a list of strings and token-id lists), batched as the cache allows.

        `sampling_params`: one for all, one for each, or None for `get_default_sampling_params`. Returns a dict for
        each prompt, in order: `text` ("" without a tokenizer) and `token_ids` of the completion, the token that ended
        it included; `finish_reason`, "stop" or "length" (`max_tokens` or `max_model_len` was reached); `stop_reason`,
        the stop string or stop token id, else None; `logprobs`, None or for each token a dict of token id ->
        log-probability, the sampled one first; `prompt_token_ids`, and `num_cached_tokens` of them. With n > 1 these
        are the first completion's, and `completions` is a list of n such dicts. Raises TypeError or ValueError for a
        wrong prompt or parameter (nothing is queued then), RuntimeError beside requests that are not finished.
        """
        if not self.is_finished():
            raise RuntimeError(
                "requests of add_request or stream are unfinished; step() until they are, or reset()"
            )
        requests, rates = self._checked(prompts, sampling_params), {"prefill": "-", "decode": "-"}
        try:
            results: dict[int, Result] = {
                self._queue(*request)[0].seq_id: {} for request in requests
            }
            with tqdm(
                total=len(results), desc="Generating", disable=not use_tqdm, dynamic_ncols=True
            ) as progress:
                while not self.is_finished():
                    start = time.perf_counter()
                    finished, num_tokens = self.step()
                    kind = "prefill" if num_tokens > 0 else "decode"
                    rates[kind] = f"{abs(num_tokens) / (time.perf_counter() - start):.0f}tok/s"
                    progress.set_postfix(rates, refresh=False)
                    progress.update(len(finished))
                    results.update(finished)
        except (
            BaseException
        ):  # Ctrl-C too: the abandoned requests must not come back in the next call
            self.reset()
            raise
        return list(results.values())

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt; returns the id by which `step` reports its result. Raises as `generate` does."""
        return self._queue(*self._checked([prompt], sampling_params)[0])[0].seq_id

    def abort(self, request_id: int) -> None:
        """End a request of `add_request`, if it has not ended; the next `step` reports what there is of it."""
        if (seqs := self._requests.pop(request_id, None)) is not None:
            self.scheduler.abort(seqs)
            self._ended.append((request_id, self._result(seqs)))

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets: those that the model's generation_config.json recommends."""
        given = self._generation_config
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
        options = {
            name.replace("_new", ""): given[name] for name in names if given.get(name) is not None
        }
        if given.get("do_sample") is False:
            options["temperature"] = 0
        try:
            return SamplingParams(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.config.model}/generation_config.json: {error}; pass sampling_params"
            ) from error

    def _checked(self, prompts: Prompts, sampling_params: Params) -> list[Request]:
        """Token ids and parameters of each prompt; or an exception as `generate` describes."""
        self._check_alive()
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a string or a list of prompts, not {prompts!r}")
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = params if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(params)} sampling_params for {len(prompts)} prompts; pass one for each"
            )
        return [
            self._checked_request(index, *pair) for index, pair in enumerate(zip(prompts, params))
        ]

    def _checked_request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        if not isinstance(params, SamplingParams):
            raise TypeError(
                f"sampling_params of prompt {index} must be a SamplingParams, not {params!r}"
            )
        config, is_text = self.config, isinstance(prompt, str)
        if self.tokenizer is None and (is_text or params.stop):
            what = "is text" if is_text else "has stop strings"
            raise ValueError(
                f"prompt {index} {what}, and {config.model} has no tokenizer; pass ids (stop_token_ids)"
            )
        try:
            if isinstance(prompt, (bytes, bytearray, dict, set, frozenset)):
                raise TypeError
            token_ids = array("q", self.tokenizer.encode(prompt) if is_text else prompt)
        except OverflowError as error:
            raise ValueError(
                f"prompt {index} has a token id far outside the vocabulary: {error}"
            ) from None
        except Exception as error:
            if is_text:  # with a lone surrogate, say
                raise ValueError(
                    f"prompt {index} cannot be tokenised: {prompt!r:.60}: {error}"
                ) from error
            expected = "a string or a list of token ids (one prompt of token ids is passed as a list of one list)"
            raise TypeError(f"prompt {index} must be {expected}, not {prompt!r:.60}") from error
        if not token_ids:
            raise ValueError(f"prompt {index} is empty; it must have at least one token")
        vocab = config.hf_config.vocab_size
        largest = np.frombuffer(
            token_ids, np.uint64
        ).max()  # fast; read as unsigned, a negative number is huge
        ids = token_ids if largest >= vocab else ()
        for token_id in (*ids, *params.stop_token_ids, *(params.logit_bias or ())):
            if not 0 <= token_id < vocab:
                raise ValueError(
                    f"prompt {index} has the token id {token_id}; the vocabulary is 0 to {vocab - 1}"
                )
        if len(token_ids) >= config.max_model_len:
            limit = f"max_model_len {config.max_model_len} must hold them and one more; shorten it or raise the limit"
            raise ValueError(f"prompt {index} has {len(token_ids)} tokens, and {limit}")
        return token_ids, params

    def _queue(
        self, token_ids: list[int], params: SamplingParams, is_streamed: bool = False
    ) -> list[Sequence]:
        """One sequence a completion. The first has the request's seed, the others seeds that follow from it."""
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        room, seeds = self.config.max_model_len - len(token_ids), [seed]
        if params.n > 1:
            others = random.Random(seed)
            seeds += [others.getrandbits(63) for _ in range(params.n - 1)]
        seqs = [Sequence(token_ids, params, seed) for seed in seeds]
        for seq in seqs:
            seq.request_id = seqs[0].seq_id
            seq.max_tokens = min(params.max_tokens or room, room)
            if self.tokenizer is not None and (is_streamed or params.stop):
                seq.detokenizer = Detokenizer(self.tokenizer, params)
            self.scheduler.add(seq)
        if not is_streamed:  # `step` reports it
            self._requests[seqs[0].seq_id] = seqs
        return seqs

    def is_finished(self) -> bool:
        """Whether no request is queued or running."""
        return self.scheduler.is_finished() and not self._pending and not self._ended

    def step(self) -> tuple[list[tuple[int, Result]], int]:
        """Complete one forward pass, having launched the next one behind it.

        Returns (request id, result) of each request that finished, and the number of tokens: of a prefill step, those
        computed; of a decode step, minus the number of sequences; 0 when there was nothing to do.
        """
        self._check_alive()
        ended, self._ended = self._ended, []
        if self.is_finished():
            return ended, 0
        start, channel = time.perf_counter(), self.model_runner.channel
        try:
            while (
                len(self._pending) <= self._max_pending
                and (step := self.scheduler.schedule()) is not None
            ):
                if self._trace is not None:
                    self._trace.scheduled(step, self.scheduler)
                # With several ranks, Ctrl-C here would reach one and not the others.
                with nullcontext() if channel is None else uninterrupted():
                    self._pending.append(
                        (step, self.model_runner.launch(step.seqs, step.is_prefill))
                    )
            step, pending = self._pending.popleft()
            sampled = pending.wait()
            if channel is not None:
                channel.check_workers()  # what comes of a dead rank is garbage
            finished = self.scheduler.postprocess(step, *sampled)
            if self._trace is not None:
                self._trace.completed(step, pending, finished, start)
        except BaseException as error:
            self.reset()
            if channel is None or not isinstance(error, Exception):
                raise
            failure = kill_ranks(
                channel, error
            )  # they may stand at different collectives: this is the end
            with suppress(Exception):  # a CUDA error comes back at every call
                self.exit()
            self.model_runner = None
            raise failure or error
        for seq in finished:
            seqs = self._requests.get(seq.request_id)  # None: a stream's
            if seqs is not None and all(other.is_finished for other in seqs):
                ended.append((seq.request_id, self._result(self._requests.pop(seq.request_id))))
        return ended, step.num_tokens if step.is_prefill else -step.num_tokens

    def _result(self, seqs: list[Sequence]) -> Result:
        completions = [self._completion(seq, self._text(seq)) for seq in seqs]
        prompt, num_cached = (
            seqs[0].token_ids[: seqs[0].num_prompt_tokens],
            seqs[0].num_cached_prompt_tokens or 0,
        )
        result = {**completions[0], "prompt_token_ids": prompt, "num_cached_tokens": num_cached}
        return result if len(seqs) == 1 else {**result, "completions": completions}

    def _completion(self, seq: Sequence, text: str, start: int = 0) -> Result:
        """From its token number `start` on."""
        token_ids, logprobs = (
            seq.token_ids[seq.num_prompt_tokens + start :],
            seq.logprobs and seq.logprobs[start:],
        )
        reasons = {"finish_reason": seq.finish_reason, "stop_reason": seq.stop_reason}
        return {"text": text, "token_ids": token_ids, **reasons, "logprobs": logprobs}

    def _text(self, seq: Sequence) -> str:
        if self.tokenizer is None:
            return ""
        if seq.detokenizer is not None:
            return seq.detokenizer.text
        hides_end = seq.finish_reason == "stop" and not seq.params.include_stop_str_in_output
        token_ids = seq.completion_token_ids[:-1] if hides_end else seq.completion_token_ids
        return self.tokenizer.decode(token_ids, skip_special_tokens=seq.params.skip_special_tokens)

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """`with llm.trace() as trace:` records what runs inside it, except inside another such `with`."""
        outer, self._trace = self._trace, Trace(self.config.device == "cuda")
        try:
            yield self._trace
        finally:
            self._trace = outer

    def stats(self) -> dict[str, int]:
        """Counters since the engine was made, which `reset` keeps, and the cache's blocks as they are now.

        With n > 1 each completion counts as a request with a prompt.
        """
        return {**self._counters, **self.scheduler.block_manager.usage()}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None when it has none (prompts are then token ids)."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    if not any((Path(path) / file).is_file() for file in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a malformed file makes transformers raise
        raise ValueError(f"transformers cannot read the tokenizer in {path}: {error}") from error


def find_eos(vocab_size: int, generation_config: dict[str, Any], *sources: Any) -> tuple[int, ...]:
    """All ids that any of these names as an end of sequence, each as `eos_token_id`: one, a list of them or None."""
    named = [
        generation_config.get("eos_token_id"),
        *(getattr(source, "eos_token_id", None) for source in sources),
    ]
    ids = (token_id for eos in named for token_id in (eos if isinstance(eos, list) else [eos]))
    return tuple(
        dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < vocab_size)
    )  # some files name others
