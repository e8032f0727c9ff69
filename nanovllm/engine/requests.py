"""From what the user passes to Sequences: checks, tokenizer, defaults, seeds."""

import random
import threading
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanovllm.checkpoints.checkpoint import load_tokenizer, read_json
from nanovllm.config import Config
from nanovllm.engine.sequence import Sequence
from nanovllm.inputs import Prompt, Prompts, PromptTooLong, listed, split_prompt, token_ids_of
from nanovllm.params.snapshots import snapshots
from nanovllm.readout.readout import PromptLogprobs
from nanovllm.sampling.rule_maker import RequestRules, RuleMaker, compiled
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.decoder import decoder_of
from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.encoder import encode, find_bos

Params = SamplingParams | SequenceOf[SamplingParams] | None

# Fields of SamplingParams that generation_config.json may recommend values for.
RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and its parameters, both checked."""

    token_ids: list[int]  # of the prompt
    packed: "array[int]"  # the same as 32-bit integers, which are faster to hash
    params: SamplingParams
    prompt: str | None = None  # its text, if that was passed
    rules: RequestRules | None = None  # which tokens may be drawn, if not all


class InputProcessor:
    """Turns prompts and sampling parameters into sequences, with the model's own tokenizer."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocab_size: int = config.hf_config.vocab_size
        self.tokenizer = None
        if not config.skip_tokenizer_init:
            self.tokenizer = load_tokenizer(config.tokenizer)
        # A call of a tokenizer may change it: with truncation, other threads' prompts would be cut.
        self.lock = threading.RLock()
        self.bos_ids: list[int] = []  # what the tokenizer puts before every text
        if self.tokenizer is not None:
            decoder_of(self.tokenizer)  # fails now, if at all
            self.bos_ids = find_bos(self.tokenizer)
        self.rule_maker = RuleMaker(config, self.tokenizer, self.lock)
        self.generation_config = read_json(Path(config.model) / "generation_config.json")
        self.seeds = random.Random(config.seed)  # for the requests that bring none

    def find_eos(self) -> tuple[int, ...]:
        """Collect the token ids that end a sequence: the model's files may name several."""
        found: dict[int, None] = {}  # a set that keeps the order
        for eos in (
            self.generation_config.get("eos_token_id"),
            getattr(self.tokenizer, "eos_token_id", None),
            getattr(self.config.hf_config, "eos_token_id", None),
        ):
            for token_id in eos if isinstance(eos, list) else [eos]:
                # Some files name ids outside the vocabulary, or no integer (type: a bool is none).
                if type(token_id) is int and 0 <= token_id < self.vocab_size:
                    found[token_id] = None
        return tuple(found)

    def default_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends; a ValueError if that is invalid."""
        recommended = dict(self.generation_config)
        recommended["max_tokens"] = recommended.get("max_new_tokens")  # its name in that file
        options = {key: recommended[key] for key in RECOMMENDED if recommended.get(key) is not None}
        if self.generation_config.get("do_sample") is False:
            options["temperature"] = 0
        try:
            return SamplingParams(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.config.model}/generation_config.json: {error}; pass sampling_params"
            ) from error

    def check(self, prompts: Prompts, sampling_params: Params) -> list[Request]:
        """Check and encode all prompts, and check their parameters, before any of them is queued.

        Raises a TypeError or ValueError that names the first wrong prompt by its index.
        """
        if isinstance(prompts, (str, dict)):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a string or a list of prompts, not {prompts!r}")
        if sampling_params is None:
            sampling_params = self.default_params()
        if not isinstance(sampling_params, (list, tuple)):
            sampling_params = [sampling_params] * len(prompts)  # type: ignore[list-item]
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; pass one each"
            )
        kept = snapshots(sampling_params, self.vocab_size, self.config.max_logprobs)
        requests = [self._check_one(i, prompt, kept[i]) for i, prompt in enumerate(prompts)]
        return compiled(requests)  # grammars, which threads have begun to compile

    def _check_one(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        parts = split_prompt(index, prompt)
        is_text = isinstance(parts.content, str)
        if self.tokenizer is None and (is_text or params.stop):
            what = "is text" if is_text else "has stop strings"
            lacks = f"{self.config.model} has no tokenizer"
            if self.config.skip_tokenizer_init:
                lacks = "skip_tokenizer_init leaves no tokenizer"
            raise ValueError(f"prompt {index} {what}, and {lacks}; pass ids (stop_token_ids)")
        token_ids = token_ids_of(index, parts.content, self._encode)
        room = params.truncate_prompt_tokens
        if room is not None:
            room = self.config.max_model_len - 1 if room == -1 else room
            token_ids = token_ids[max(len(token_ids) - room, 0) :]
        self._check_token_ids(index, token_ids)
        rules = self.rule_maker.make(index, params) if params.has_token_rules else None
        return Request(listed(parts.content, token_ids), token_ids, params, parts.text, rules)

    def _encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None  # `_check_one` has seen to it
        with self.lock:
            return encode(self.tokenizer, text, self.bos_ids)

    def _check_token_ids(self, index: int, token_ids: "array[int]") -> None:
        """Check a prompt's length and token ids."""
        if not token_ids:
            raise ValueError(f"prompt {index} is empty; it must have at least one token")
        ids = np.frombuffer(token_ids, np.int32)  # a loop in Python would take 30 times as long
        unknown = ids[(ids < 0) | (ids >= self.vocab_size)].tolist()
        if unknown:
            raise ValueError(
                f"prompt {index} has the token id {unknown[0]}; "
                f"the vocabulary is 0 to {self.vocab_size - 1}"
            )
        max_model_len = self.config.max_model_len
        if len(token_ids) >= max_model_len:
            raise PromptTooLong(
                f"prompt {index} has {len(token_ids)} tokens, and max_model_len {max_model_len} "
                "must hold them and one more; shorten it or raise the limit"
            )

    def make_sequences(self, request: Request, is_streamed: bool) -> list[Sequence]:
        """Make a sequence for each of a request's n completions, all with one `request_id`."""
        params = request.params
        room = self.config.max_model_len - len(request.token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        needs_text = is_streamed or bool(params.stop)  # while it grows, not only at its end
        # A seed for each completion: the request's own, and others that follow from it.
        seeds = [self.seeds.getrandbits(63) if params.seed is None else params.seed]
        if params.n > 1:
            others = random.Random(seeds[0])
            seeds += [others.getrandbits(63) for _ in range(params.n - 1)]
        seqs = [Sequence(request.token_ids, params, seed) for seed in seeds]
        if params.prompt_logprobs is not None:
            seqs[0].readout = PromptLogprobs(params.prompt_logprobs)  # once, however many there are
        for seq in seqs:
            seq.request_id = seqs[0].seq_id
            seq.prompt = request.prompt
            seq.packed_prompt = request.packed
            seq.max_tokens = max_tokens
            if request.rules is not None:
                seq.rules = request.rules.start()
            if needs_text and params.detokenize and self.tokenizer is not None:
                seq.detokenizer = Detokenizer(self.tokenizer, params, request.token_ids)
        return seqs
