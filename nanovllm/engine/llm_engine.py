"""The engine's loop: schedule a step, run it on the device, account for the tokens that it sampled.

Around it: requests.py makes Sequences of what the user passes, outputs.py builds what a request
returns, ranks.py starts and ends the processes of tensor parallelism.
"""

import copy
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any
from weakref import finalize

import torch
from transformers import PreTrainedTokenizerBase

from nanovllm.checkpoints.headless import check_head
from nanovllm.collector import collector_slowed
from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.engine.ranks import kill_ranks, shut_down, start_ranks
from nanovllm.engine.requests import InputProcessor, Params, Request
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.exclusive import exclusive
from nanovllm.inputs import Prompt, Prompts
from nanovllm.models import MODELS, check_model
from nanovllm.outputs import build_result, has_failed
from nanovllm.progress import progress_bar
from nanovllm.results import RequestOutput
from nanovllm.sampling.masks import StepMasks, launch_sampling, waits_for_masks
from nanovllm.sampling_params import SamplingParams
from nanovllm.sharing.job_order import job_order
from nanovllm.trace import Trace
from nanovllm.utils.interrupts import uninterrupted
from nanovllm.vllm_compat.absent import ABSENT_IN_GENERATE, refuse_others

COUNTERS = ("requests", "prompt_tokens", "completion_tokens", "prefix_hit_tokens", "preemptions")


class LLMEngine:
    """Drives a Scheduler and a rank-0 ModelRunner. `model` and `options` are the fields of Config,
    which raises a TypeError or ValueError for what is not right about them.

    An engine belongs to the process that made it, and several threads may use it: see `exclusive`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        config = Config.from_options(model, options, architectures=MODELS)
        check_model(config)
        self.config = config
        self._inputs = InputProcessor(config)
        if config.eos == -1:
            config.eos = self._inputs.find_eos()
        self._pid = os.getpid()
        self._lock = threading.RLock()  # held while an exclusive method runs
        self._is_busy = False  # whether one runs, perhaps in this thread, to which the lock is open
        # Not in the modes of the user's thread: what is made here is used outside of them, too.
        with (
            torch.inference_mode(False),
            torch.autocast(config.device, enabled=False),
            torch.device("cpu"),
        ):
            self.model_runner: ModelRunner | None = start_ranks(config)
        self._channel = self.model_runner.channel  # to the other ranks; None if there are none
        # Runs once: at exit(), when the engine is collected, or at the interpreter's end.
        self._finalizer = finalize(self, shut_down, self.model_runner, self._lock, self._pid)
        # One step is always queued behind the one that runs, so that a GPU never waits for Python.
        self._max_pending = 1 if config.device == "cuda" else 0
        self._counters = Counter(dict.fromkeys(COUNTERS, 0))
        self._traces: list[Trace] = []  # those under way, perhaps of several threads
        self._trace: Trace | None = None  # the last of them, which records
        self._reset()

    @exclusive
    def reset(self) -> None:
        """Drop all requests and cached prefixes: the remedy after a step that was cut short."""
        self._reset()

    def _reset(self) -> None:
        self.scheduler = Scheduler(self.config, self._counters)
        # Steps that were launched and whose tokens have not been read back, oldest first. The last
        # one may wait for masks, and has no tokens then.
        self._pending: deque[tuple[Step, PendingTokens]] = deque()
        # Requests that `step` is to report at their end: their ids -> the sequences of each.
        self._requests: dict[int, list[Sequence]] = {}
        # The mailbox: ids and results of requests that have ended, until `step` reports them.
        self._results: list[tuple[int, RequestOutput]] = []
        # Sequences that are to be aborted, and their scheduler: see `_abort_soon`.
        self._to_abort: deque[tuple[Scheduler, list[Sequence]]] = deque()

    def exit(self) -> None:
        """End the workers and free the memory. The engine cannot be used afterwards: a call that
        another thread is in raises a RuntimeError after its step. A forked child ends nothing.
        """
        if os.getpid() != self._pid:
            return
        self.model_runner = None
        # The finalizer runs only once: what Ctrl-C cut off would never be freed.
        with uninterrupted():
            self._finalizer()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this engine belongs to process {self._pid}, and this is a fork of it, process "
                f"{os.getpid()}; use the engine there, or a process that is spawned, not forked"
            )

    def _check_alive(self) -> ModelRunner:
        self._check_process()
        # At the interpreter's end the finalizer runs without `exit`, and daemon threads go on.
        if self.model_runner is None or not self._finalizer.alive:
            raise RuntimeError("the engine was shut down by exit() or a failed rank; make another")
        return self.model_runner

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A copy of the checkpoint's tokenizer; None if it has none.

        A call changes it (truncation, padding), which must not change how the engine reads prompts.
        """
        return copy.deepcopy(self._inputs.tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets: what generation_config.json recommends."""
        return self._inputs.default_params()

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True, **absent: Any
    ) -> list[RequestOutput]:
        """Complete prompts, batched as the cache allows, and return a dict for each, in order.

        Args:
            prompts: one string, or a list of strings and token-id lists (dicts: see `inputs`).
            sampling_params: one for all, one for each, or None for `get_default_sampling_params`.
            use_tqdm: whether to show a progress bar.
            absent: options of vLLM's, if their values ask for nothing.

        Returns:
            For each prompt a dict, with `text`, `token_ids` and more: see results.py. With n > 1
            these are the first completion's, and `completions` is a list of n dicts.

        Raises:
            TypeError, ValueError: for a wrong prompt or parameter; nothing is queued then.
            RuntimeError: while requests of `add_request` or `stream` are unfinished, after `exit`,
                in a forked child, and if all requests of the call end with an error. If only some
                do, that is their `finish_reason`, and their `stop_reason` says what went wrong. A
                `generate` of another thread is waited for.
        """
        refuse_others("LLM.generate", absent, ABSENT_IN_GENERATE)
        with collector_slowed():  # lists of tokens are many small objects, too
            # Without the lock: a prompt may be an iterator of the user's, which takes its time.
            return self._generate(self._check_requests(prompts, sampling_params), use_tqdm)

    @exclusive
    def _generate(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        self._check_idle()
        try:
            # They are made, and seeds drawn for them, in the order in which the user has put them.
            made = [self._inputs.make_sequences(request, is_streamed=False) for request in requests]
            for seqs in job_order(made, self.config):
                self._queue_sequences(seqs)
            results = self._run_to_the_end(len(requests), use_tqdm)
        except BaseException:
            # Ctrl-C too: the abandoned requests must not come back in the next call.
            self._reset()
            raise
        if len(results) < len(made):
            raise RuntimeError("requests of generate were dropped by a reset() while it ran")
        in_order = [results[seqs[0].request_id] for seqs in made]
        if in_order and all(has_failed(result) for result in in_order):
            raise RuntimeError(f"no request could be completed: {in_order[0]['stop_reason']}")
        return in_order

    def _check_idle(self) -> None:
        """Raise a RuntimeError if there are other requests, whose results would be nobody's."""
        self._settle()
        if not self.is_finished():
            raise RuntimeError(
                "requests of add_request or stream are unfinished; step() to their end, or reset()"
            )

    def _run_to_the_end(self, num_requests: int, use_tqdm: bool) -> dict[int, RequestOutput]:
        """Step until nothing is left to do, behind a progress bar; returns request id -> result."""
        results: dict[int, RequestOutput] = {}
        rates = {"prefill": "-", "decode": "-"}
        options = dict(desc="Generating", disable=not use_tqdm, dynamic_ncols=True)
        with progress_bar(total=num_requests, **options) as update:
            while not self.is_finished():
                start = time.perf_counter()
                finished, num_tokens = self._step()
                rate = abs(num_tokens) / (time.perf_counter() - start)
                rates["prefill" if num_tokens > 0 else "decode"] = f"{rate:.0f}tok/s"
                update(len(finished), rates)
                results.update(finished)
        return results

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue a prompt; returns the id by which `step` reports it. Raises as `generate` does."""
        return self._add_request(self._check_requests([prompt], sampling_params)[0])

    @exclusive
    def _add_request(self, request: Request) -> int:
        return self._queue(request)[0].request_id

    def abort(self, request_id: int) -> None:
        """End a request of `add_request`; the next `step` reports what there is of it.

        This never waits: a request that another thread is at work on ends after that step.
        """
        self._check_process()
        scheduler = self.scheduler  # before the request, which is of no scheduler after this one
        seqs = self._requests.get(request_id)
        if seqs is not None:
            self._abort_soon(scheduler, seqs)

    def _abort_soon(self, scheduler: Scheduler, seqs: list[Sequence]) -> None:
        """Abort sequences: at once or, if the engine is busy, before its next step. So a signal
        handler may do it, and a forgotten stream that Python collects in the middle of a step.
        """
        self._to_abort.append((scheduler, seqs))
        if os.getpid() == self._pid:  # a fork's copy of a stream ends in silence
            self._abort_if_idle()

    def _abort_if_idle(self) -> None:
        with uninterrupted():
            if not self._lock.acquire(blocking=False):
                return  # who holds it looks again when it has let go
            try:
                if not self._is_busy:
                    self._abort_now()
            finally:
                self._lock.release()

    @exclusive
    def _abort_now(self) -> None:
        self._settle()

    def _settle(self) -> None:
        self._abort_waiting()
        # With no other requests, nobody would complete the steps launched ahead.
        while self._pending and self.scheduler.is_finished() and self._finalizer.alive:
            self._advance()

    def _abort_waiting(self) -> None:
        """Abort what waits for it. A scheduler of before a `reset` has dropped its requests."""
        seqs: list[Sequence] = []
        while self._to_abort:
            scheduler, some = self._to_abort.popleft()
            if scheduler is self.scheduler:
                seqs += some
        if seqs:
            self.scheduler.abort(seqs)
            self._post_results(seqs)

    def _check_requests(self, prompts: Prompts, sampling_params: Params) -> list[Request]:
        self._check_alive()
        check_head(self.config.hf_config)
        return self._inputs.check(prompts, sampling_params)

    def _queue(self, request: Request, is_streamed: bool = False) -> list[Sequence]:
        """Queue a request. `step` reports it at its end, unless a stream reads the sequences."""
        seqs = self._inputs.make_sequences(request, is_streamed)
        self._queue_sequences(seqs, is_streamed)
        return seqs

    def _queue_sequences(self, seqs: list[Sequence], is_streamed: bool = False) -> None:
        for seq in seqs:
            self.scheduler.add(seq)
        if not is_streamed:
            self._requests[seqs[0].request_id] = seqs

    def is_finished(self) -> bool:
        """Whether no request is queued or running, and no result waits for `step` to report it."""
        return not self._has_work() and not self._results

    def _has_work(self) -> bool:
        return not self.scheduler.is_finished() or len(self._pending) > 0

    @exclusive
    def step(self) -> tuple[list[tuple[int, RequestOutput]], int]:
        """Complete one forward pass, having launched the next one behind it.

        Returns (request id, result) of each request that finished, and the number of tokens: of a
        prefill step, those computed; of a decode step, minus the number of sequences; of none, 0.
        """
        return self._step()

    def _step(self) -> tuple[list[tuple[int, RequestOutput]], int]:
        step = self._advance()
        results, self._results = self._results, []
        if step is None:
            return results, 0
        return results, step.num_tokens if step.is_prefill else -step.num_tokens

    def _advance(self) -> Step | None:
        """Complete the oldest step, having launched the next one behind it; None: nothing to do."""
        self._check_alive()
        self._abort_waiting()
        if not self._has_work():
            return None
        start = time.perf_counter()  # for a trace
        try:
            self._launch_ahead()
            step, tokens = self._pending.popleft()
            token_ids, logprobs = tokens.wait()
            if self._channel is not None:
                self._channel.check_workers()  # if a rank has died, the tokens are garbage
            if tokens.readings is not None:  # before a sequence ends, whose result they are part of
                tokens.readings.deliver(step.seqs)
            finished = self.scheduler.postprocess(step, token_ids, logprobs)
            launch_sampling(self._pending, self._launch)  # if the next step waits for these tokens
            if self._trace is not None:
                self._trace.completed(step, tokens, finished, start)
            if len(self._pending) < self._max_pending:
                # The next step had to wait for the room that these tokens have made. Results are
                # built beside it: 512 at once would leave the device idle for some 10 ms.
                self._launch_ahead()
        except BaseException as error:
            self._fail(error)
            raise
        self._post_results(finished)
        return step

    def _launch_ahead(self) -> None:
        """Launch steps until `_max_pending` of them are queued behind the oldest."""
        while len(self._pending) <= self._max_pending and not waits_for_masks(self._pending):
            step = self.scheduler.schedule()
            if step is None:  # nothing is left, or only the end of a pending step makes room
                return
            if self._trace is not None:
                self._trace.scheduled(step, self.scheduler)
            self._pending.append((step, self._launch(step)))
            launch_sampling(self._pending, self._launch)  # at once, if its masks need no tokens

    def _launch(self, step: Step | StepMasks) -> PendingTokens:
        model_runner = self._check_alive()
        # Ctrl-C would stop this rank half-way and none of the others, and they would wait for it in
        # a collective for ever. So it waits until the launch is done.
        with nullcontext() if self._channel is None else uninterrupted():
            return model_runner.launch(step)

    def _post_results(self, finished: list[Sequence]) -> None:
        """Put the results of requests into the mailbox, if these sequences were their last ones."""
        for seq in finished:
            seqs = self._requests.get(seq.request_id)
            # None: a stream reads it, or an earlier one of `finished` was of the same request.
            if seqs is not None and all(other.is_finished for other in seqs):
                del self._requests[seq.request_id]
                self._results.append((seq.request_id, build_result(seqs, self._inputs.tokenizer)))

    def _fail(self, error: BaseException) -> None:
        """After an error in a step: empty the engine and, if ranks may be out of step, end it.

        If a worker has failed, that is the cause of `error`, and a RuntimeError says so; otherwise
        this returns, and the caller raises `error` again.
        """
        self._reset()
        # Ctrl-C takes effect between two launches, when all ranks have been told the same. After
        # other exceptions they may stand at different collectives, with no way to meet again.
        if not isinstance(error, Exception):
            return
        self._check_alive()  # the cause, if a fork or an exit() came in the middle of the step
        if self._channel is None:
            return
        failure = kill_ranks(self._channel, error)
        with suppress(Exception):  # after a CUDA error every call raises it again
            self.exit()
        if failure is not None:
            raise failure from error

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """`with llm.trace() as trace:` records what runs inside it and inside no inner trace."""
        trace = self._trace = Trace(is_cuda=self.config.device == "cuda")
        self._traces.append(trace)
        try:
            yield trace
        finally:
            self._traces.remove(trace)
            self._trace = self._traces[-1] if self._traces else None

    def stats(self) -> dict[str, int]:
        """Counters since the engine was made, and numbers of the cache's blocks as they are now.

        `reset` keeps the counters. With n > 1 each completion counts as a request with a prompt.
        """
        return {**self._counters, **self.scheduler.block_manager.usage()}
