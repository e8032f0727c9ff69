"""`beam_search`: the beams of all prompts are sequences that run together, a token at a time.

In each step a beam is a sequence of its own, with all tokens so far. It computes one of them, and
ends with the next one's log-probabilities. Its blocks outlive it: the beams that continue it are
forked from it (see sharing/copy_on_write.py), so that beams share all blocks up to where they part.
In a trace each of these sequences is a request.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanovllm.beam_search.hypotheses import Hypothesis, Search
from nanovllm.beam_search.results import BeamSearchOutput, BeamSearchSequence
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.requests import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.exclusive import exclusive
from nanovllm.inputs import Prompts
from nanovllm.params.beam_params import BeamSearchParams
from nanovllm.progress import progress_bar
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.decoder import decoder_of
from nanovllm.vllm_compat.absent import ABSENT_IN_BEAM_SEARCH, refuse_others


@dataclass(slots=True)
class PromptSearch:
    """The search for one prompt, and the sequences of its running beams."""

    request: Request
    search: Search
    step_params: SamplingParams  # of all sequences
    # Of the KV cache, that its beams can need, whatever they share beyond the prompt. If that is
    # more than there is, or there are more beams than sequences can run, it runs alone, and its
    # beams give their blocks back after each step and are found in the prefix cache.
    num_blocks: int
    keeps_blocks: bool
    seqs: list[Sequence] = field(default_factory=list)
    error: str | None = None


class BeamSearchEngine(LLMEngine):
    """An engine that also searches for the likeliest completions."""

    def beam_search(
        self,
        prompts: Prompts,
        params: BeamSearchParams,
        use_tqdm: bool = False,
        **absent: Any,
    ) -> list[BeamSearchOutput]:
        """Search for the likeliest completions, and return a result for each prompt, in order.

        Args:
            prompts: as for `generate`.
            params: of all prompts.
            use_tqdm: whether to show a progress bar.
            absent: options of vLLM's, if their values ask for nothing.

        Returns:
            For each prompt a dict with `prompt_token_ids` and `sequences`, the best `beam_width`
            beams (fewer if the vocabulary has no more), which results.py describes; its items are
            attributes as well.

        Raises:
            TypeError, ValueError: for a wrong prompt or parameter; nothing is computed then.
            RuntimeError: as for `generate`.
        """
        refuse_others("LLM.beam_search", absent, ABSENT_IN_BEAM_SEARCH)
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be a BeamSearchParams, not {params!r:.60}")
        requests = self._check_requests(prompts, SamplingParams(temperature=0, max_tokens=1))
        return self._beam_search([self._make_search(r, params) for r in requests], params, use_tqdm)

    def _make_search(self, request: Request, params: BeamSearchParams) -> PromptSearch:
        num_prompt_tokens = len(request.token_ids)
        max_tokens = min(params.max_tokens, self.config.max_model_len - num_prompt_tokens)
        eos = self.config.eos if isinstance(self.config.eos, tuple) else (self.config.eos,)
        search = Search(
            beam_width=params.beam_width,
            length_penalty=params.length_penalty,
            max_tokens=max_tokens,
            end_ids=set() if params.ignore_eos else {eos_id for eos_id in eos if eos_id >= 0},
        )
        block_size = self.config.kvcache_block_size
        most_blocks = -(-(num_prompt_tokens + max_tokens) // block_size)  # of one beam
        shared_blocks = num_prompt_tokens // block_size
        num_blocks = shared_blocks + params.beam_width * (most_blocks - shared_blocks)
        keeps_blocks = (
            num_blocks <= self.config.num_kvcache_blocks
            and params.beam_width <= self.config.max_num_seqs
        )
        step_params = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprobs=search.num_candidates,
            ignore_eos=True,
            detokenize=False,
        )
        return PromptSearch(request, search, step_params, num_blocks, keeps_blocks)

    @exclusive
    def _beam_search(
        self, searches: list[PromptSearch], params: BeamSearchParams, use_tqdm: bool
    ) -> list[BeamSearchOutput]:
        self._check_idle()
        try:
            with progress_bar(
                total=len(searches), desc="Searching", disable=not use_tqdm
            ) as update:
                self._run_searches(searches, update)
        except BaseException:
            # Ctrl-C too: blocks of beams that are left alone would never be free again.
            self._reset()
            raise
        errors = [one.error for one in searches if one.error is not None]
        if errors and len(errors) == len(searches):
            raise RuntimeError(f"no search could be completed: {errors[0]}")
        return [self._make_output(one, params) for one in searches]

    def _run_searches(self, searches: list[PromptSearch], update: Callable[..., None]) -> None:
        """Run as many searches together as surely fit, the others when those have ended."""
        waiting = deque(searches)
        active: list[PromptSearch] = []
        while waiting or active:
            while waiting and self._has_room(active, waiting[0]):
                one = waiting.popleft()
                active.append(one)
                one.seqs = [self._make_sequence(one, one.search.running[0])]
                self.scheduler.add(one.seqs[0])
            while self._has_work():
                self._advance()
            for one in active:
                self._go_on(one)
            num_active = len(active)
            active = [one for one in active if one.seqs]
            update(num_active - len(active))

    def _has_room(self, active: list[PromptSearch], new: PromptSearch) -> bool:
        """Whether a search can join the active ones, with blocks and rows for all of them."""
        if not active:
            return True
        together = [*active, new]
        num_beams = sum(one.search.beam_width for one in together)
        return (
            all(one.keeps_blocks for one in together)
            and sum(one.num_blocks for one in together) <= self.config.num_kvcache_blocks
            and num_beams <= self.config.max_num_seqs
        )

    def _make_sequence(self, one: PromptSearch, beam: Hypothesis) -> Sequence:
        """Make the sequence that computes a beam's last token, and the likeliest next ones."""
        seq = Sequence([*one.request.token_ids, *beam.token_ids], one.step_params)
        seq.keeps_blocks = one.keeps_blocks
        return seq

    def _go_on(self, one: PromptSearch) -> None:
        """Take in what the beams' sequences have found, and queue those of the next step."""
        parents = one.seqs
        one.seqs = []
        failed = next((seq for seq in parents if seq.finish_reason == "error"), None)
        if failed is not None:
            one.error = str(failed.stop_reason)
        else:
            one.search.advance([seq.logprobs[0] for seq in parents if seq.logprobs])
            if not one.search.is_done:
                one.seqs = [self._make_sequence(one, beam) for beam in one.search.running]
        if one.keeps_blocks:
            self._fork(one, parents)
        else:
            for seq in one.seqs:
                self.scheduler.add(seq)

    def _fork(self, one: PromptSearch, parents: list[Sequence]) -> None:
        """Queue the sequences of the next step, with the blocks of those that they continue."""
        scheduler = self.scheduler
        manager = scheduler.block_manager
        for seq, beam in zip(one.seqs, one.search.running, strict=False):  # none, if it has ended
            manager.tails.fork(parents[beam.parent], seq)
        for parent in parents:
            manager.deallocate(parent)
        # Only now, so that a beam which alone continues another writes to its last block in place.
        for seq in one.seqs:
            manager.may_append(seq)
            seq.row = scheduler.free_rows.pop()
            scheduler.waiting[seq] = None

    def _make_output(self, one: PromptSearch, params: BeamSearchParams) -> BeamSearchOutput:
        prompt_ids = one.request.token_ids
        sequences = [self._make_beam(prompt_ids, beam, params) for beam in one.search.ended]
        if one.error is not None:
            failed = Hypothesis([], 0.0, parent=0, logprobs=[], finish_reason="error")
            sequences = [self._make_beam(prompt_ids, failed, params)]
            sequences[0].stop_reason = one.error
        output = BeamSearchOutput(sequences=sequences, prompt_token_ids=prompt_ids)
        output.prompt = one.request.prompt
        return output

    def _make_beam(
        self, prompt_ids: list[int], beam: Hypothesis, params: BeamSearchParams
    ) -> BeamSearchSequence:
        tokenizer = self._inputs.tokenizer
        tokens = [*prompt_ids, *beam.token_ids]
        text = ""
        decode = None
        if tokenizer is not None:
            decoder = decoder_of(tokenizer)
            is_cut = beam.finish_reason == "stop" and not params.include_stop_str_in_output
            text = decoder.decode(tokens[:-1] if is_cut else tokens, skips_special=False)

            def decode(token_id: int) -> str:
                return decoder.decode([token_id], skips_special=False)

        return BeamSearchSequence(
            text=text,
            tokens=tokens,
            token_ids=beam.token_ids,
            cum_logprob=beam.cum_logprob,
            score=beam.score,
            logprobs=[entry.as_dict(decode) for entry in beam.logprobs],
            finish_reason=beam.finish_reason,
            stop_reason=None,
        )
