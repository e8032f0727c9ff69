"""Checks of those options of a request that are lists, dicts or objects, and copies to keep."""

from typing import Any

from nanovllm.params.frozen import FrozenDict, FrozenList
from nanovllm.params.structured import StructuredOutputsParams
from nanovllm.utils.checks import Range, check_value, plain_number

NOTHING = FrozenList()  # as `stop` and `stop_token_ids`
# The fields of a SamplingParams that forbid tokens.
TOKEN_RULES = ("allowed_token_ids", "bad_words", "thinking_token_budget", "structured_outputs")


def checked_stop(stop: Any) -> FrozenList:
    """Turn None, a string or several into a list; raise for anything else and for empty strings."""
    if stop is None:
        return NOTHING
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(each, str) for each in strings):
        raise TypeError(f"stop must be a string, a list of strings or None, not {stop!r}")
    if "" in strings:
        raise ValueError(f"stop must hold strings of at least one character, not {strings!r}")
    return FrozenList(strings)


def checked_stop_token_ids(token_ids: Any) -> FrozenList:
    """Turn None, or a list or tuple of integers, into a list; a TypeError if it is none of them."""
    if token_ids is None:
        return NOTHING
    ids = [plain_number(i) for i in token_ids] if isinstance(token_ids, (list, tuple)) else [None]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):  # True is an int, but no id
        raise TypeError(f"stop_token_ids must be a list of integers or None, not {token_ids!r}")
    return FrozenList(ids)


def checked_logit_bias(logit_bias: Any) -> FrozenDict:
    """Copy a dict of token ids (at least 0) and numbers from -100 to 100; raise if it is none."""
    if not isinstance(logit_bias, dict):
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, not {logit_bias!r}")
    checked = {}
    for token_id, bias in logit_bias.items():
        token_id = check_value("a token id in logit_bias", token_id, int, Range(0))
        name = f"logit_bias of token {token_id}"
        checked[token_id] = check_value(name, bias, float, Range(-100, 100))
    return FrozenDict(checked)


def check_token_rules(params: Any) -> None:
    """Check the fields of a SamplingParams that forbid tokens, and keep copies of their lists."""
    structure = params.structured_outputs
    if isinstance(structure, dict):  # as it comes out of a JSON file
        structure = StructuredOutputsParams(**structure)
        params._set("structured_outputs", structure)
    if structure is not None:
        if not isinstance(structure, StructuredOutputsParams):
            raise TypeError(
                f"structured_outputs must be a StructuredOutputsParams or None, not {structure!r}"
            )
        others = {
            "min_tokens": params.min_tokens or None,
            "thinking_token_budget": params.thinking_token_budget,
        }
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"{name} {value} cannot be combined with structured_outputs, whose form alone "
                    f"says where a completion may end; leave out one of them"
                )
    if params.bad_words is not None:
        params._set("bad_words", checked_bad_words(params.bad_words))
    if params.allowed_token_ids is not None:
        params._set("allowed_token_ids", checked_allowed_ids(params.allowed_token_ids))


def checked_bad_words(words: Any) -> FrozenList | None:
    """Copy a list of strings, None if there are none in it; raise if it is no list of them."""
    is_list = isinstance(words, (list, tuple))
    if not is_list or not all(isinstance(word, str) for word in words):
        raise TypeError(f"bad_words must be a list of strings or None, not {words!r}")
    if not all(word.strip() for word in words):
        raise ValueError(f"bad_words must hold strings with more than blanks, not {words!r}")
    return FrozenList(words) or None


def checked_allowed_ids(token_ids: Any) -> FrozenList:
    """Copy a list of at least one token id; raise if it is none."""
    ids = [plain_number(i) for i in token_ids] if isinstance(token_ids, (list, tuple)) else [None]
    if not all(type(token_id) is int for token_id in ids):  # a bool is none
        raise TypeError(f"allowed_token_ids must be a list of integers or None, not {token_ids!r}")
    if not ids:
        raise ValueError("allowed_token_ids must hold at least one token id; None allows all")
    return FrozenList(ids)
