"""Completions whose text must have a form: what they are, and that nothing else changes."""

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_idle, make_checkpoint, make_llm
from random_schemas import random_schema, schema_with_definition

from nanovllm import DEMO_MODEL, LLM, SamplingParams, StructuredOutputsParams
from nanovllm.results import RequestOutput

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

# All that issue 19 asks for, which takes minutes: 200 schemas, and 10 completions of each.
IS_FULL = os.environ.get("NANOVLLM_ALL_SCHEMAS") == "1"
PROMPT = "Tell me about the village."
EOS = [2, 0]  # of the demo checkpoint
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
COMPACT = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)


def of_form(
    form: StructuredOutputsParams | None = None, max_tokens: int = 60, **options: Any
) -> SamplingParams:
    return SamplingParams(structured_outputs=form, max_tokens=max_tokens, **options)


def run(llm: LLM, params: list[SamplingParams]) -> list[RequestOutput]:
    assert_idle(llm)
    outputs = llm.generate([PROMPT] * len(params), params, use_tqdm=False)
    assert_idle(llm)
    return outputs


def ids_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with the demo checkpoint's tokenizer, which lacks 77 of its 1,101 ids."""
    path = tmp_path_factory.mktemp("tiny")
    make_checkpoint(path, vocab_size=1101, std=0.15, eos_token_id=EOS, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO_MODEL, name), path)
    return str(path)


@pytest.fixture(scope="module")
def llm(tiny: str) -> LLM:
    return make_llm(tiny)


# --- what comes out -------------------------------------------------------------------------------


def test_completions_of_random_schemas_are_valid(tiny: str) -> None:
    """The oracle is the package jsonschema, at a temperature at which the model knows nothing."""
    num_schemas, num_each = (200, 10) if IS_FULL else (30, 5)
    r = random.Random(7)
    schemas = [random_schema(r) for _ in range(num_schemas - num_schemas // 10)]
    schemas += [schema_with_definition(r) for _ in range(num_schemas // 10)]
    params = [
        of_form(
            StructuredOutputsParams(json=schema),
            max_tokens=120,
            temperature=1.5,
            n=num_each,
            seed=i,
        )
        for i, schema in enumerate(schemas)
    ]
    llm = make_llm(tiny, num_kvcache_blocks=1024)
    num_valid = 0
    texts = set()
    for schema, output in zip(schemas, run(llm, params), strict=True):
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        for completion in output["completions"]:
            assert completion["finish_reason"] in ("stop", "length")
            if completion["finish_reason"] == "stop":
                value = json.loads(completion["text"])
                jsonschema.validate(value, schema, format_checker=checker)
                num_valid += 1
                texts.add(completion["text"])
    num_all = num_schemas * num_each
    print(f"{num_valid} of {num_all} completions ended, {len(texts)} different ones, all valid")
    assert num_valid > 0.8 * num_all
    assert len(texts) > 0.4 * num_all


@pytest.mark.parametrize(
    "regex",
    [r"[a-c]{3}-\d+", r"(yes|no)( (yes|no))*\.", r"\w{1,4}@\w{3}\.com", r"\s?é+|ß{2,3}", r"a?b?c"],
)
def test_regex(llm: LLM, regex: str) -> None:
    outputs = run(llm, [of_form(StructuredOutputsParams(regex=regex), seed=i) for i in range(8)])
    ended = [output["text"] for output in outputs if output["finish_reason"] == "stop"]
    assert len(ended) >= 4
    assert all(re.fullmatch(regex, text, re.ASCII) for text in ended), ended


def test_choice(llm: LLM) -> None:
    choices = ["yes", "no", "maybe, é", 'a "quoted" one\n', "yes and no"]
    form = StructuredOutputsParams(choice=choices)
    outputs = run(llm, [of_form(form, seed=i, temperature=3.0) for i in range(24)])
    assert {output["text"] for output in outputs} == set(choices)
    assert all(output["finish_reason"] == "stop" for output in outputs)


@pytest.mark.parametrize(
    "grammar",
    ['start: item ("," item)*\nitem: /[a-z]/ | "[" item "]"', 'root ::= i ("," i)*\n'
     'i ::= [a-z] | "[" i "]"'],
    ids=["lark", "gbnf"],
)  # fmt: skip
def test_grammar(llm: LLM, grammar: str) -> None:
    """Brackets that match are no regular language."""
    form = StructuredOutputsParams(grammar=grammar)
    outputs = run(llm, [of_form(form, seed=i) for i in range(8)])
    ended = [output["text"] for output in outputs if output["finish_reason"] == "stop"]
    assert len(ended) >= 4
    for text in ended:
        for item in text.split(","):
            opening, letter, closing = re.fullmatch(r"(\[*)([a-z])(\]*)", item).groups()
            assert len(opening) == len(closing)


def test_any_json_object(llm: LLM) -> None:
    form = StructuredOutputsParams(json_object=True)
    outputs = run(llm, [of_form(form, max_tokens=200, seed=i) for i in range(12)])
    ended = [output["text"] for output in outputs if output["finish_reason"] == "stop"]
    assert len(ended) >= 2
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_the_schema_true_is_the_empty_one(llm: LLM) -> None:
    forms = [StructuredOutputsParams(json=schema) for schema in (True, "true", {})]
    outputs = run(llm, [of_form(form, seed=5) for form in forms])
    assert len({tuple(ids) for ids in ids_of(outputs)}) == 1


def test_a_schema_in_all_its_ways(llm: LLM) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=6)
        age: int = pydantic.Field(ge=0, le=150)

    for schema in (PERSON, json.dumps(PERSON), Person):
        output = run(llm, [of_form(StructuredOutputsParams(json=schema), 120, seed=3)])[0]
        assert output["finish_reason"] == "stop"
        Person.model_validate_json(output["text"])
    as_dict: Any = {"json": PERSON}  # as it comes out of a file
    assert SamplingParams(structured_outputs=as_dict).structured_outputs.json == json.dumps(PERSON)


def test_an_empty_whitespace_pattern_allows_none(llm: LLM) -> None:
    form = StructuredOutputsParams(json=PERSON, whitespace_pattern="")
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=200, structured_outputs=form)
    (output,) = llm.generate("Who?", params, use_tqdm=False)
    compact = SamplingParams(temperature=1.5, seed=3, max_tokens=200, structured_outputs=COMPACT)
    assert output.token_ids == llm.generate("Who?", compact, use_tqdm=False)[0].token_ids


def test_objects_are_closed_where_that_is_asked_for() -> None:
    part = {"properties": {"properties": {"type": "integer"}}}
    schema = {
        "properties": {"a": part, "b": {"properties": {}, "additionalProperties": True}},
        "anyOf": [part],
    }
    form = StructuredOutputsParams(json=schema, disable_additional_properties=True)
    closed = part | {"additionalProperties": False}
    assert json.loads(form.json) == {
        "properties": {"a": closed, "b": schema["properties"]["b"]},  # type: ignore[index]
        "anyOf": [closed],
        "additionalProperties": False,
    }
    assert json.loads(StructuredOutputsParams(json=schema).json) == schema


def test_the_end_comes_where_the_grammar_allows_it_and_only_there(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="[ab]{6}")
    ended, cut, going_on = run(
        llm,
        [
            of_form(form, seed=1, logit_bias={2: 100.0}),  # it would end at once
            of_form(form, seed=1, max_tokens=2),
            of_form(form, seed=1, ignore_eos=True, max_tokens=12),
        ],
    )
    assert re.fullmatch("[ab]{6}", ended["text"]) and ended["finish_reason"] == "stop"
    assert ended["token_ids"][-1] in EOS and ended["stop_reason"] is None
    assert cut["finish_reason"] == "length" and re.fullmatch("[ab]{1,5}", cut["text"])
    assert len(going_on["token_ids"]) == 12 and going_on["token_ids"][-1] in EOS
    assert re.fullmatch("[ab]{6}", going_on["text"])  # special tokens are left out of it


def test_ids_that_the_tokenizer_lacks_are_never_drawn(llm: LLM) -> None:
    """The model has more rows than the tokenizer has tokens; these mean nothing."""
    form = StructuredOutputsParams(regex="[^x]*")
    structured = run(llm, [of_form(form, seed=i, temperature=5.0) for i in range(8)])
    plain = run(llm, [of_form(seed=i, temperature=5.0) for i in range(8)])
    assert max(map(max, ids_of(structured))) < 1024 <= max(map(max, ids_of(plain)))


# --- together with all the rest -------------------------------------------------------------------


MIXED = [
    of_form(COMPACT, seed=1),
    of_form(seed=2),
    of_form(COMPACT, seed=3, top_k=20, top_p=0.9, repetition_penalty=1.2, logprobs=2),
    of_form(temperature=0, presence_penalty=0.5),
    of_form(COMPACT, temperature=0, logit_bias={40: 2.0}),
    of_form(StructuredOutputsParams(regex="[0-9]{30}"), seed=5, min_p=0.01),
    of_form(seed=6, logprobs=1, stop=["th"]),
    of_form(COMPACT, seed=7, stop=["age"]),
    of_form(COMPACT, seed=8, n=3),
]


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    """Of MIXED, each alone."""
    return [ids_of(run(llm, [params]))[0] for params in MIXED]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_neighbours_and_steps_ahead_change_nothing(
    tiny: str, expected: list[list[int]], depth: int
) -> None:
    """With steps that are launched before the tokens of the one before them are known, too."""
    llm = make_llm(tiny, depth=depth)
    outputs = run(llm, MIXED)
    assert ids_of(outputs) == expected
    assert re.fullmatch(r"[0-9]{30}", outputs[5]["text"])
    assert outputs[7]["text"].endswith('"') and outputs[7]["stop_reason"] == "age"
    completions = [completion["text"] for completion in outputs[8]["completions"]]
    assert len(set(completions)) == 3
    for text in [outputs[0]["text"], outputs[2]["text"], outputs[4]["text"], *completions]:
        jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("depth", [0, 1])
def test_preemption_and_chunks_change_nothing(
    tiny: str, expected: list[list[int]], depth: int
) -> None:
    llm = make_llm(
        tiny,
        depth=depth,
        max_model_len=96,
        num_kvcache_blocks=12,
        max_num_batched_tokens=7,
        enable_prefix_caching=False,
    )
    assert ids_of(run(llm, MIXED)) == expected
    assert llm.stats()["preemptions"] > 0


def test_a_stream(llm: LLM, expected: list[list[int]]) -> None:
    texts: dict[tuple[int, int], str] = {}
    ids: dict[int, list[int]] = {i: [] for i in range(len(MIXED))}
    for part in llm.stream([PROMPT] * len(MIXED), MIXED):
        key = (part["index"], part["completion"])
        texts[key] = texts.get(key, "") + part["text"]
        if part["completion"] == 0:
            ids[part["index"]] += part["token_ids"]
    assert list(ids.values()) == expected
    jsonschema.validate(json.loads(texts[8, 2]), PERSON)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_log_probabilities_of_a_prompt(tiny: str, depth: int) -> None:
    """The forward pass reads them, in a launch before the one that samples."""
    llm = make_llm(tiny, depth=depth)
    params = [of_form(COMPACT, seed=1, prompt_logprobs=1), of_form(seed=2, prompt_logprobs=1)]
    outputs = run(llm, params)
    assert outputs[0].prompt_logprobs == outputs[1].prompt_logprobs
    assert len(outputs[0].prompt_logprobs) == len(outputs[0].prompt_token_ids) > 5
    assert ids_of(outputs)[0] == ids_of(run(llm, [MIXED[0]]))[0]


def test_abort_between_two_steps(tiny: str) -> None:
    """A step that has been launched for a sequence which is aborted before it is sampled."""
    llm = make_llm(tiny, depth=1)
    aborted = llm.add_request(PROMPT, MIXED[0])
    kept = llm.add_request(PROMPT, MIXED[5])
    for _ in range(3):
        llm.step()
    llm.abort(aborted)
    results: dict[int, RequestOutput] = {}
    while not llm.is_finished():
        results.update(llm.step()[0])
    assert results[aborted]["finish_reason"] == "abort"
    assert re.fullmatch(r"[0-9]{30}", results[kept]["text"])
    assert_idle(llm)


def test_two_ranks(tiny: str, expected: list[list[int]]) -> None:
    llm = make_llm(tiny, tensor_parallel_size=2)
    try:
        outputs = run(llm, MIXED)
    finally:
        llm.exit()
    assert ids_of(outputs) == expected


def test_grammars_are_compiled_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.sampling import rule_maker

    compiled: list[str] = []
    compile_grammar = rule_maker.compile_grammar

    def recording(structure: StructuredOutputsParams, tokenizer: Any) -> Any:
        compiled.append(structure.regex)
        return compile_grammar(structure, tokenizer)

    monkeypatch.setattr(rule_maker, "compile_grammar", recording)
    monkeypatch.setattr(rule_maker, "MAX_CACHED", 4)
    llm = make_llm(tiny)
    forms = [StructuredOutputsParams(regex=regex) for regex in ("r[12]", "r[34]", "r[12]")]
    for _ in range(2):
        outputs = run(llm, [of_form(form, seed=1) for form in forms])
        assert [output["text"][0] for output in outputs] == ["r"] * 3
    assert sorted(compiled) == ["r[12]", "r[34]"]
    others = [StructuredOutputsParams(regex=f"r{i}") for i in range(6)]  # more than are kept
    outputs = run(llm, [of_form(form) for form in others])
    assert [output["text"] for output in outputs] == [f"r{i}" for i in range(6)]
    assert len(llm._inputs.rule_maker._kept) == 4


def test_a_grammar_that_grows_too_large_ends_its_sequence_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llguidance

    def with_limits(structure: StructuredOutputsParams, tokenizer: Any) -> Any:
        limits = llguidance.LLParserLimits(step_lexer_fuel=1)
        grammar = llguidance.LLMatcher.grammar_from_regex(structure.regex)
        return llguidance.LLMatcher(tokenizer, grammar, limits=limits, log_level=0)

    monkeypatch.setattr("nanovllm.sampling.rule_maker.compile_grammar", with_limits)
    alone = run(llm, [of_form(seed=1)])
    form = StructuredOutputsParams(regex="(a|bc+)*d{20,40}")
    outputs = run(llm, [of_form(form), of_form(seed=1)])
    assert outputs[0]["finish_reason"] == "error"
    assert outputs[0]["stop_reason"].startswith("structured_outputs: ")
    assert "\n" not in outputs[0]["stop_reason"]
    assert ids_of(outputs)[1] == ids_of(alone)[0]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, fault",
    [
        ({"json": {"type": "objekt"}}, "prompt 1.*json.*objekt"),
        ({"json": {"not": {"type": "string"}}}, "prompt 1.*json.*not"),
        ({"json": {"$ref": "#/nowhere"}}, "prompt 1.*json.*nowhere"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "prompt 1.*json.*minimum"),
        ({"regex": "[a"}, "prompt 1.*regex.*unclosed"),
        ({"regex": "(?=a)b"}, "prompt 1.*regex.*look"),
        ({"grammar": "start: nowhere"}, "prompt 1.*grammar.*nowhere"),
    ],
)
def test_a_form_that_cannot_be_compiled_is_refused_before_anything_is_queued(
    llm: LLM, form: dict[str, Any], fault: str
) -> None:
    params = [of_form(), of_form(StructuredOutputsParams(**form))]
    for start in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=f"(?s){fault}"):
            start([PROMPT] * 2, params)
        assert_idle(llm)


@pytest.mark.parametrize(
    "form, error, fault",
    [
        ({}, ValueError, "exactly one of json, .*not none"),
        ({"json_object": False}, ValueError, "exactly one"),
        ({"json": {}, "regex": "a"}, ValueError, "not json and regex"),
        ({"json": "{'type': 'object'}"}, ValueError, "not the text of a schema"),
        ({"json": "[1]"}, TypeError, "must be a JSON schema"),
        ({"json": 3}, TypeError, "must be a JSON schema"),
        ({"json": {"const": object()}}, ValueError, "no JSON schema"),
        ({"regex": 3}, TypeError, "regex must be a string, not 3"),
        ({"choice": []}, ValueError, "at least one"),
        ({"choice": "yes"}, TypeError, "list of strings, not 'yes'"),
        ({"json_object": 1}, TypeError, "json_object must be True"),
        ({"json": {}, "whitespace_pattern": 1}, TypeError, "whitespace_pattern"),
        ({"json": {}, "disable_any_whitespace": "no"}, TypeError, "disable_any_whitespace.*'no'"),
        ({"json": {}, "disable_additional_properties": 1}, TypeError, "properties must be True"),
    ],
)
def test_wrong_forms(form: dict[str, Any], error: type[Exception], fault: str) -> None:
    with pytest.raises(error, match=fault):
        StructuredOutputsParams(**form)


@pytest.mark.parametrize(
    "form",
    [
        {"choice": ["yes", "a<|im_end|>"]},
        {"regex": r"x<\|im_end\|>"},
        {"json": {"enum": ["<|im_end|>", "b"]}},
    ],
)
def test_a_form_that_spells_a_special_token_is_refused(llm: LLM, form: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
    with pytest.raises(ValueError, match=r"holds '<\|im_end\|>', which is a special token"):
        llm.generate("Hello", params, use_tqdm=False)
    assert llm.is_finished()


def test_wrong_combinations() -> None:
    with pytest.raises(ValueError, match="min_tokens 3 cannot be combined"):
        of_form(COMPACT, min_tokens=3)
    with pytest.raises(ValueError, match="thinking_token_budget 0 cannot be combined"):
        of_form(COMPACT, thinking_token_budget=0)
    with pytest.raises(TypeError, match="must be a StructuredOutputsParams"):
        of_form("json")  # type: ignore[arg-type]


def test_what_a_model_must_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, vocab_size=1101)
    llm = make_llm(str(tmp_path))
    with pytest.raises(ValueError, match="a token that ends a completion.*pass eos"):
        llm.generate([[1, 2]], of_form(COMPACT))
    llm = make_llm(str(tmp_path), eos=7)
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        llm.generate([[1, 2]], of_form(COMPACT))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=re.escape("nano-vllm[structured]")):
        llm.generate([[1, 2]], of_form(COMPACT))


def test_rules_that_leave_no_token_end_their_sequence_alone(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="[0-9]+")
    alone = run(llm, [of_form(seed=1)])
    contradiction = dict(allowed_token_ids=[100, 101, 102])
    outputs = run(
        llm,
        [
            of_form(form, **contradiction),
            of_form(seed=1),
            of_form(form, **contradiction, top_k=5, top_p=0.9, min_p=0.1, logprobs=1),
        ],
    )
    for output in (outputs[0], outputs[2]):
        assert output["finish_reason"] == "error"
        assert "contradict each other" in output["stop_reason"]
    assert ids_of(outputs)[1] == ids_of(alone)[0]
