"""From the results of the engine, or an exception, to a line of a job's output.

Each begins with its line's number and with whether it failed, which is what a job that goes on
reads back: `{"id":"batch_req_17","custom_id":...,"response":{"status_code":200,...` in the batch
form, `{"line":17,...` and `{"line":17,"error":...` in the plain one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nanovllm.jobs.lines import json_text
from nanovllm.jobs.lines.bodies import (
    completion_body,
    echoed,
    embedding_body,
    ends,
    num_completion_tokens,
    num_prompt_tokens,
    prompt_items,
    vector,
)
from nanovllm.jobs.lines.errors import line_error
from nanovllm.jobs.lines.fields import SUBJECTS
from nanovllm.jobs.lines.line import Answer, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.line_request import LineRequest
from nanovllm.jobs.lines.logprobs import logprobs_content
from nanovllm.jobs.lines.parse import is_batch, plain_custom_id
from nanovllm.jobs.lines.unreadable import (
    MAX_LINE_BYTES,
    custom_id_in,
    fields_of,
    names_subject,
)
from nanovllm.results import CompletionOutput, RequestOutput

# Names that only an answer has, whatever it answers.
RESERVED = ("line", "error")
GOOD_ENDS = ("stop", "length")
# The beginning of an answer. A custom_id is a string of JSON, which may hold anything else. (It is
# matched in long pieces: by single characters, one of 10 MB would take 1.5 GB.)
BATCH_HEAD = re.compile(
    rb'\{"id":"batch_req_(\d+)","custom_id":(?:null|"[^"\\]*(?:\\.[^"\\]*)*"),'
    rb'"response":\{"status_code":(\d+),'
)
PLAIN_HEAD = re.compile(rb'\{"line":(\d+),("error":)?')


def answer(request: LineRequest, results: Sequence[Any]) -> Answer:
    """Write what a line is answered with.

    results: of its prompts, in their order; of a chat, one.

    Raises:
        LineError: if a completion ended with an error, as with a model that yields NaN, or a vector
            holds one. The whole line is to be an error then.
    """
    completion_tokens = 0
    if request.kind != "embed":
        for result in results:
            check_ends(result)
        completion_tokens = num_completion_tokens(results)
    if request.is_batch:
        fields = batch_fields(request, results)
    else:
        fields = plain_fields(request, results)
    return Answer(
        number=request.number,
        data=json_text.dump(fields),
        prompt_tokens=num_prompt_tokens(results),
        completion_tokens=completion_tokens,
    )


def error_answer(number: int, data: bytes, error: BaseException, options: LineOptions) -> Answer:
    """Write what is wrong with a line; never raises.

    number, data: of the line, of which the answer has what can be found: its custom_id, the fields
        of a plain one. error: any exception, see `line_error`.
    """
    fields = readable_fields(data)
    wrong = line_error(error, fields or {})
    in_batch_form = options.form == "batch"
    if options.form == "auto":
        in_batch_form = looks_like_batch(data) if fields is None else is_batch(fields)
    if in_batch_form:
        custom_id = find_custom_id(number, data, fields)
        return Answer(number, json_text.dump(batch_error(number, custom_id, wrong)), wrong.code)
    carried = carried_by_error(fields or {}, options)
    try:
        text = json_text.dump(plain_error(number, carried, wrong))
    except RecursionError:  # writing what the line holds takes a deeper stack than reading it did
        text = json_text.dump(plain_error(number, {}, wrong))
    return Answer(number, text, wrong.code)


def answered(data: bytes) -> tuple[int, bool] | None:
    """The number of the line that an output line answers, and whether it says that it failed.

    None of what no job has written. Only the beginning and the last byte are looked at, as all
    lines of an output are read so when a job goes on: one that was cut off before its last "}"
    gives None, but one cut off behind another "}" does not. Whoever reads the file knows that its
    last line is whole by the line break behind it.
    """
    if not data.endswith(b"}"):
        return None
    batch = BATCH_HEAD.match(data)
    if batch is not None:
        return int(batch[1]), batch[2] != b"200"
    plain = PLAIN_HEAD.match(data)
    if plain is not None:
        return int(plain[1]), plain[2] is not None
    return None


# --- results --------------------------------------------------------------------------------------


def check_ends(result: RequestOutput) -> None:
    """Raise a LineError unless all completions came to a good end."""
    for completion in result.outputs:
        if completion["finish_reason"] == "error":
            raise LineError(str(completion["stop_reason"]), "model_error", status=500)
        if completion["finish_reason"] not in GOOD_ENDS:
            raise LineError("the request was aborted", "aborted", status=500)


def batch_fields(request: LineRequest, results: Sequence[Any]) -> dict[str, Any]:
    """An answer in the batch form."""
    body = embedding_body if request.kind == "embed" else completion_body
    return in_batch(request.number, request.custom_id, 200, body(request, results))


def in_batch(number: int, custom_id: str | None, status: int, body: Any) -> dict[str, Any]:
    """What surrounds a body in OpenAI's output files. `answered` reads the beginning of it."""
    return {
        "id": f"batch_req_{number}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{number}", "body": body},
        "error": None,
    }


def plain_fields(request: LineRequest, results: Sequence[Any]) -> dict[str, Any]:
    """An answer in the plain form: the fields of the line that go on to it, then ours.

    With several prompts, which only a line of the batch form can have, all that belongs to one of
    them is in a list, "results".
    """
    each = [plain_result(request, result, index) for index, result in enumerate(results)]
    ours: dict[str, Any] = each[0] if len(each) == 1 else {"results": each}
    ours["prompt_tokens"] = num_prompt_tokens(results)
    if request.kind != "embed":
        ours["completion_tokens"] = num_completion_tokens(results)
    return {"line": request.number, **renamed(request.carried, ours), **ours}


def plain_result(request: LineRequest, result: Any, index: int) -> dict[str, Any]:
    """What a plain answer says of prompt number `index`: "completions" is there with n above 1."""
    if request.kind == "embed":
        return {"embedding": vector(request, result)}
    each = [plain_completion(request, part, index) for part in result.outputs]
    shown = dict(each[0])
    if len(each) > 1:
        shown["completions"] = each
    return shown | prompt_items(request, result)


def plain_completion(
    request: LineRequest, completion: CompletionOutput, index: int
) -> dict[str, Any]:
    """What a plain answer says of a completion. Log-probabilities are in the form of chats."""
    shown = {"text": echoed(request, index) + completion["text"], **ends(request, completion)}
    logprobs = logprobs_content(request, completion)
    if logprobs is not None:
        shown["logprobs"] = logprobs
    return shown


def renamed(carried: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line under names that an answer has not taken: "text" as "input_text"."""
    free: dict[str, Any] = {}
    for name, value in carried.items():
        while name in ours or name in free or name in RESERVED:
            name = f"input_{name}"
        free[name] = value
    return free


# --- errors ---------------------------------------------------------------------------------------


def batch_error(number: int, custom_id: str | None, wrong: LineError) -> dict[str, Any]:
    """An error in the batch form, as OpenAI's files have it."""
    error = {
        "message": str(wrong),
        "type": "invalid_request_error" if wrong.status < 500 else "server_error",
        "param": wrong.param,
        "code": wrong.code,
    }
    return in_batch(number, custom_id, wrong.status, {"error": error})


def plain_error(number: int, carried: dict[str, Any], wrong: LineError) -> dict[str, Any]:
    """An error in the plain form. `answered` reads the beginning of it."""
    error = {"code": wrong.code, "message": str(wrong), "param": wrong.param}
    return {"line": number, "error": error, **renamed(carried, {})}


def carried_by_error(fields: dict[str, Any], options: LineOptions) -> dict[str, Any]:
    """The fields of a line that a plain error repeats: all but those that an answer leaves out."""
    if is_batch(fields):
        return {"custom_id": fields.get("custom_id")}
    if options.keep_prompt:
        return fields
    return {name: value for name, value in fields.items() if name not in SUBJECTS}


def looks_like_batch(data: bytes) -> bool:
    """Whether an error about a line that cannot be read is to be in the batch form.

    It is unless the line was to be a plain one, as those of tables are: who reads the batch form
    looks for its fields in every line, who reads the plain one can do without.
    """
    mark = fields_of(data)
    if mark:
        return mark["custom_id"] is not None
    return custom_id_in(data) is not None or not names_subject(data)


def readable_fields(data: bytes) -> dict[str, Any] | None:
    """The object that a line holds, if it does."""
    if len(data) > MAX_LINE_BYTES:
        return None
    try:
        fields = json_text.load(data)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def find_custom_id(number: int, data: bytes, fields: dict[str, Any] | None) -> str | None:
    """The custom_id of a line, searched for in its text if it is no JSON."""
    if fields is not None:
        if not is_batch(fields):
            return plain_custom_id(number, fields)
        custom_id = fields.get("custom_id")
        return custom_id if isinstance(custom_id, str) else None
    return fields_of(data).get("custom_id") or custom_id_in(data)
