"""Options of vLLM that are not there: which of them make no difference, and what to do without."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Absent:
    """An option of vLLM's that has no counterpart here."""

    remedy: str  # what to do instead
    # The values that ask for nothing but what is done anyway; None: all of them.
    harmless: Collection[Any] | None = (None,)


@dataclass(frozen=True, slots=True)
class Sifted:
    """Options, without those that make no difference."""

    kept: dict[str, Any]
    left_out: list[str]  # their names


def without_absent(owner: str, options: dict[str, Any], absent: dict[str, Absent]) -> Sifted:
    """Leave out the options of `absent` that make no difference.

    owner: whose options they are, for the error.

    Raises:
        TypeError: for one that would make a difference; it names the remedy.
    """
    left_out = [name for name in options if name in absent]
    for name in left_out:
        rule = absent[name]
        if rule.harmless is None or any(is_same(options[name], value) for value in rule.harmless):
            continue
        raise TypeError(f"{owner} has no option {name}={options[name]!r:.60}; {rule.remedy}")
    kept = {name: value for name, value in options.items() if name not in absent}
    return Sifted(kept, left_out)


def refuse_others(owner: str, options: dict[str, Any], absent: dict[str, Absent]) -> None:
    """Raise a TypeError unless all options are of `absent` and make no difference."""
    for name in without_absent(owner, options, absent).kept:
        raise TypeError(f"{owner} has no option {name!r}")


def is_same(value: object, harmless: object) -> bool:
    """Whether an option has a harmless value. 1 is not True, and an array equals nothing."""
    return type(value) is type(harmless) and value == harmless


# Of SamplingParams.
ABSENT_PARAMS = {
    "best_of": Absent(
        "sample n completions with logprobs=0 and keep those of the largest cumulative_logprob",
        (None, 1),
    ),
    "early_stopping": Absent("beams are made by LLM.beam_search", (None, False)),
    "extra_args": Absent("nothing here reads any", (None, {})),
    "flat_logprobs": Absent("log-probabilities are dicts", (None, False)),
    "guided_decoding": Absent("it is called structured_outputs"),
    "length_penalty": Absent("beams are made by LLM.beam_search", (None, 1, 1.0)),
    "logits_processors": Absent(
        "no code of the user's runs between logits and draw; logit_bias, allowed_token_ids, "
        "bad_words and structured_outputs say which tokens may be drawn",
        (None, []),
    ),
    "output_kind": Absent("LLM.stream yields what is new, and generate whole results"),
    "skip_reading_prefix_cache": Absent(
        "pass enable_prefix_caching=False to LLM, or call reset_prefix_cache()", (None, False)
    ),
    "spaces_between_special_tokens": Absent("the tokenizer decides", (None, True)),
    "use_beam_search": Absent("call LLM.beam_search", (None, False)),
}

# Of LLM.generate.
ABSENT_IN_GENERATE = {
    "lora_request": Absent("merge the adapter into the weights and save them"),
    "priority": Absent("requests run in the order of arrival"),
    "tokenization_kwargs": Absent("pass truncate_prompt_tokens to SamplingParams", (None, {})),
}
# Of LLM.embed and LLM.score.
ABSENT_IN_POOLING = {
    "lora_request": ABSENT_IN_GENERATE["lora_request"],
    "pooling_task": Absent("call embed or score", (None, "embed")),
    "tokenization_kwargs": Absent("pass truncate_prompt_tokens to embed", (None, {})),
}
# Of LLM.beam_search.
ABSENT_IN_BEAM_SEARCH = {
    "lora_request": ABSENT_IN_GENERATE["lora_request"],
    "concurrency_limit": Absent("as many searches run together as the cache can hold", None),
}
# Of LLM.chat.
ABSENT_IN_CHAT = {
    **ABSENT_IN_GENERATE,
    "chat_template_content_format": Absent(
        "contents are passed in the form that the template reads", (None, "auto")
    ),
    "mm_processor_kwargs": Absent("nothing but text is read", (None, {})),
}
