"""From the parameters of a request to the rules of its completions."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nanovllm.params.structured import StructuredOutputsParams
from nanovllm.sampling.token_rules import (
    AllowedTokens,
    BadWords,
    CompletionRules,
    ThinkingBudget,
    TokenRule,
    mask_of,
)
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.config import Config
    from nanovllm.engine.requests import Request

MAX_CACHED = 256  # grammars and lists of words that are kept for later requests
# In JSON: a blank, or a line break and an indentation.
WHITESPACE = r"( | ?\r?\n( {0,40}|\t{0,10}))"
THINK_START = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What the completions of one request have in common."""

    index: int  # of its prompt
    num_words: int  # of a mask
    shared: list[TokenRule]  # those without state
    compiled: Future[Any] | None  # a matcher of llguidance that has read nothing, to be copied
    budget: Callable[[], ThinkingBudget] | None

    def wait(self) -> None:
        """Wait until the grammar is compiled; a ValueError if it cannot be."""
        if self.compiled is None:
            return
        try:
            self.compiled.result()
        except ValueError as error:
            raise ValueError(f"prompt {self.index}: {error}") from error

    def start(self) -> CompletionRules:
        """The rules of one new completion."""
        rules = list(self.shared)
        if self.budget is not None:
            rules.append(self.budget())
        make_matcher = None if self.compiled is None else self.compiled.result().deep_copy
        return CompletionRules(self.num_words, rules, make_matcher)


def compiled(requests: list[Request]) -> list[Request]:
    """Return the requests when their grammars are compiled; a ValueError if one cannot be."""
    for request in requests:
        if request.rules is not None:
            request.rules.wait()
    return requests


class RuleMaker:
    """Makes the rules of requests, and keeps what is expensive about them for later ones.

    Several threads may use it. Grammars are compiled in threads of its own, all those of a call at
    the same time.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase | None, lock: threading.RLock
    ) -> None:
        """lock: held while the tokenizer is used."""
        self.config = config
        self.tokenizer = tokenizer
        self.lock = lock
        self.vocab_size: int = config.hf_config.vocab_size
        # Some tokenizers have more tokens than the model, and llguidance has a bit for each.
        num_tokens = max(self.vocab_size, 0 if tokenizer is None else len(tokenizer))
        self.num_words = -(-num_tokens // 32)
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()  # latest last

    def make(self, index: int, params: SamplingParams) -> RequestRules:
        """The rules of the request of prompt number `index`. Its grammar may still be compiled.

        Raises a ValueError for what this model or this tokenizer cannot do.
        """
        if self.tokenizer is None and params.bad_words:
            raise ValueError(
                f"prompt {index} has bad_words, and {self.config.model} has no tokenizer"
            )
        with self.lock:
            shared = self._keep((params.allowed_token_ids, params.bad_words), self._shared_rules)
            compiled = None
            if params.structured_outputs is not None:
                compiled = self._keep(params.structured_outputs, self._compile)
        budget = None
        if params.thinking_token_budget is not None:
            budget = self._budget(index, params.thinking_token_budget)
        return RequestRules(index, self.num_words, shared, compiled, budget)

    def _keep(self, key: Any, make: Callable[[Any], Any]) -> Any:
        """Return what `make(key)` has returned lately, or call it."""
        if key not in self._kept:
            self._kept[key] = make(key)
            if len(self._kept) > MAX_CACHED:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _shared_rules(
        self, key: tuple[tuple[int, ...] | None, tuple[str, ...] | None]
    ) -> list[TokenRule]:
        allowed_ids, bad_words = key
        rules: list[TokenRule] = []
        if allowed_ids is not None:
            rules.append(AllowedTokens(mask_of(allowed_ids, self.num_words)))
        words = [ids for word in bad_words or () for ids in self._token_ids_of(word)]
        single = [ids[0] for ids in words if len(ids) == 1]
        longer = [ids for ids in words if len(ids) > 1]
        if single:
            rules.append(AllowedTokens(~mask_of(single, self.num_words)))
        if longer:
            rules.append(BadWords(longer, self.num_words))
        return rules

    def _token_ids_of(self, word: str) -> set[tuple[int, ...]]:
        """How a word is spelled, at the beginning of a text and within it."""
        assert self.tokenizer is not None
        bare = word.lstrip()
        spellings = set()
        for text in (bare, f" {bare}"):
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            spellings.add(tuple(ids))
        return spellings - {()}

    def _budget(self, index: int, budget: int) -> Callable[[], ThinkingBudget]:
        start_id = self._id_of(index, THINK_START)
        end_id = self._id_of(index, THINK_END)
        return lambda: ThinkingBudget(budget, start_id, end_id, self.num_words)

    def _id_of(self, index: int, token: str) -> int:
        token_id = None
        if self.tokenizer is not None:
            token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None or token_id >= self.vocab_size:
            raise ValueError(
                f"prompt {index} has a thinking_token_budget, which needs {token!r} as one token "
                f"of the vocabulary, and {self.config.model} has none; leave the option out"
            )
        return token_id

    def _compile(self, structure: StructuredOutputsParams) -> Future[Any]:
        """Start compiling."""
        grammar_tokenizer = self._grammar_tokenizer
        self._check_spelling(structure)
        return self._pool.submit(compile_grammar, structure, grammar_tokenizer)

    def _check_spelling(self, structure: StructuredOutputsParams) -> None:
        """Raise a ValueError for a form that spells a special token. Where a form leaves no choice,
        llguidance takes the tokenizer's tokens for the text, and such a token ends the completion,
        or leaves a gap in its text. (A grammar may name special tokens on purpose.)
        """
        if structure.kind not in ("choice", "json", "regex"):
            return
        assert self.tokenizer is not None  # `_grammar_tokenizer` has seen to it
        # Without backslashes, as a regex escapes "|", and JSON what is not ASCII.
        text = " ".join(structure.choice or (structure.json or structure.regex or "",))
        text = text.replace("\\", "")
        for token in self.tokenizer.added_tokens_decoder.values():
            spellings = (token.content, json.dumps(token.content)[1:-1].replace("\\", ""))
            if token.special and any(spelling in text for spelling in spellings):
                raise ValueError(
                    f"structured_outputs: {structure.kind} holds {token.content!r}, which is a "
                    f"special token of {self.config.model} and cannot be part of a text of that "
                    "form; leave it out"
                )

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(16, os.cpu_count() or 1), "compile-grammar")

    @cached_property
    def _grammar_tokenizer(self) -> Any:
        """The tokenizer, as llguidance needs it: the bytes of all tokens as a tree."""
        try:
            import llguidance.hf
        except ImportError as error:
            raise ImportError(
                "structured_outputs needs the package llguidance; pip install 'nano-vllm"
                "[structured]'"
            ) from error
        eos = self.config.eos
        eos_ids = [
            token_id for token_id in ([eos] if isinstance(eos, int) else eos) if token_id >= 0
        ]
        model = self.config.model
        if not eos_ids:
            raise ValueError(
                "structured_outputs needs a token that ends a completion, and the files of "
                f"{model} name none; pass eos=... to LLM"
            )
        tokenizer: Any = self.tokenizer
        if tokenizer is None or not tokenizer.is_fast:
            raise ValueError(
                f"structured_outputs needs a fast tokenizer (tokenizer.json), and {model} has none"
            )
        num_tokens = max(self.vocab_size, len(tokenizer))
        try:
            return llguidance.hf.from_tokenizer(tokenizer, num_tokens, eos_ids)
        except Exception as error:  # one that is built in a way it does not know
            raise ValueError(
                f"structured_outputs: llguidance cannot read the tokenizer of {model}: {error}"
            ) from error


def compile_grammar(structure: StructuredOutputsParams, tokenizer: Any) -> Any:
    """Compile to a matcher of llguidance that has read nothing yet; a ValueError says why not."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    kind: Any = structure.kind
    try:
        if kind in ("json", "json_object"):
            pattern = structure.whitespace_pattern
            options: Any = {"whitespace_pattern": WHITESPACE if pattern is None else pattern}
            if structure.disable_any_whitespace or pattern == "":
                options = {"whitespace_flexible": False}
            schema = structure.json or '{"type": "object"}'
            if schema == "true":  # any JSON; the library takes options only with an object
                schema = "{}"
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=options)
        elif kind == "regex":
            # Digits, words and blanks are those of ASCII, as in JSON schemas.
            regex = regex_to_lark(structure.regex or "", use_ascii="dws")
            grammar = grammar_from("lark", f"start: /{regex}/")
        else:
            grammar = grammar_from(kind, getattr(structure, kind))
    except ValueError as error:
        raise ValueError(f"structured_outputs: {kind} is not right: {error}") from error
    matcher = LLMatcher(tokenizer, grammar, log_level=0)  # what goes wrong is a stop_reason
    if matcher.is_error():
        raise ValueError(f"structured_outputs: {kind} is not right: {matcher.get_error()}")
    return matcher
