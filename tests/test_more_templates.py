"""Chat templates in the manner of Phi, OLMo, Granite and SmolLM3, whose rules differ from those in
test_family_text.py: what ends a text, which options there are, where tools and documents go.
"""

from typing import Any

import pytest
from family_tokenizers import set_vocabulary
from test_family_text import (
    ANSWER,
    CALL,
    CONVERSATIONS,
    RESULT,
    SYSTEM,
    TOOL,
    USER,
    by_transformers,
    by_us,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovllm.text.encoder import encode, find_bos

# No BOS; without a generation prompt EOS ends the text; a system message has its tools itself.
PHI_TEMPLATE = """
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] }}
    {%- if message['role'] == 'system' and message['tools'] %}
        {{- '<|tool|>' + message['tools'] + '<|/tool|>' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt else eos_token }}
"""

# The template has a BOS, which the tokenizer does not add; EOS behind an answer is followed by a
# newline unless the text ends there.
OLMO_TEMPLATE = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] }}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token + ('' if loop.last else '\\n') }}
    {%- else %}
        {{- '\\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}
{%- endfor %}
"""

# Tools and documents are turns of their own; there is a system message if nobody has written one.
GRANITE_TEMPLATE = """
{%- macro turn(role, text) %}
    {{- '<|start_of_role|>' + role + '<|end_of_role|>' + text + '<|end_of_text|>\\n' }}
{%- endmacro %}
{%- if messages[0]['role'] != 'system' %}
    {{- turn('system', 'Knowledge ends in 2024.' + (' Think first.' if thinking else '')) }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.index0 == (1 if messages[0]['role'] == 'system' else 0) %}
        {%- if tools %}{{ turn('available_tools', tools | tojson(indent=4)) }}{%- endif %}
        {%- for document in documents or [] %}
            {{- turn('document ' + document['doc_id'] | string, document['text']) }}
        {%- endfor %}
    {%- endif %}
    {%- if message.tool_calls %}
        {{- turn(message['role'], '<|tool_call|>' + message.tool_calls | tojson) }}
    {%- else %}
        {{- turn(message['role'], message['content']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}
"""

# It thinks unless told otherwise, by an option or in the system message; tools come in two kinds.
SMOLLM3_TEMPLATE = """
{%- set enable_thinking = enable_thinking | default(true) %}
{%- set system = 'Be helpful.' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- if '/no_think' in system %}{%- set enable_thinking = false %}{%- endif %}
    {%- set system = system.replace('/no_think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n' + (custom_instructions | default(system)) + '\\n' }}
{{- 'Mode: ' + ('/think' if enable_thinking else '/no_think') + '\\n' }}
{%- for tool in xml_tools or tools or [] %}{{ tool | string + '\\n' }}{%- endfor %}
{%- for tool in python_tools or [] %}{{ 'def ' + tool | string + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + message['content'].lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message['role'] != 'system' %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n') }}
{%- endif %}
"""


def without_bos(template: str) -> PreTrainedTokenizerFast:
    """Byte-level; BOS is no more than a name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    special = ["<|endoftext|>", "<|end|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    set_vocabulary(tokenizer, special, has_bytes=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template=template,
    )


TOKENIZERS = {
    "phi": without_bos(PHI_TEMPLATE),
    "olmo": without_bos(OLMO_TEMPLATE),
    "granite": without_bos(GRANITE_TEMPLATE),
    "smollm3": without_bos(SMOLLM3_TEMPLATE),
}
families = pytest.mark.parametrize("family", TOKENIZERS)


@families
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_gives_the_ids_of_transformers(family: str, name: str) -> None:
    tokenizer = TOKENIZERS[family]
    messages = CONVERSATIONS[name]
    ids = by_us(tokenizer, messages)
    assert ids == by_transformers(tokenizer, messages, add_generation_prompt=True)
    without = by_us(tokenizer, messages, add_generation_prompt=False)
    assert without == by_transformers(tokenizer, messages, add_generation_prompt=False)
    assert without != ids
    # The templated text is the same prompt, and nothing is put before it.
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert find_bos(tokenizer) == []
    assert encode(tokenizer, text, []) == ids


@families
def test_chat_continues_a_message(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    messages = [USER, {"role": "assistant", "content": "Cold; bring a"}]
    ids = by_us(tokenizer, messages, continue_final_message=True)
    assert ids == by_transformers(tokenizer, messages, continue_final_message=True)
    assert tokenizer.decode(ids).endswith("Cold; bring a")


OPTIONS: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("granite", [USER, CALL, RESULT, ANSWER, USER], dict(tools=[TOOL])),
    ("granite", [SYSTEM, USER], dict(tools=[TOOL], thinking=True)),
    ("granite", [USER], dict(documents=[dict(doc_id=1, text="Oslo is cold.")])),
    ("granite", [USER], dict(thinking=True)),
    ("smollm3", [USER, ANSWER, USER], dict(enable_thinking=False)),
    ("smollm3", [USER], dict(tools=[TOOL])),
    ("smollm3", [USER], dict(xml_tools=[TOOL], python_tools=[TOOL])),
    ("smollm3", [SYSTEM, USER], dict(custom_instructions="Rhyme.")),
]


@pytest.mark.parametrize("family, messages, options", OPTIONS)
def test_options(family: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[family]
    ids = by_us(tokenizer, messages, **options)
    assert ids == by_transformers(tokenizer, messages, add_generation_prompt=True, **options)
    assert ids != by_us(tokenizer, messages)


@pytest.mark.parametrize("option", ["tools", "documents"])
@pytest.mark.parametrize("family", ["phi", "olmo"])
def test_what_a_template_would_ignore_is_refused(family: str, option: str) -> None:
    with pytest.raises(TypeError, match=f"has an option '{option}'"):
        by_us(TOKENIZERS[family], [USER], **{option: [TOOL]})


def test_what_a_message_holds_besides_its_content_reaches_the_template() -> None:
    """Phi's tools, and SmolLM3's flag."""
    tokenizer = TOKENIZERS["phi"]
    messages = [{**SYSTEM, "tools": '[{"name": "weather"}]'}, USER]
    ids = by_us(tokenizer, messages)
    assert ids == by_transformers(tokenizer, messages, add_generation_prompt=True)
    assert '<|tool|>[{"name": "weather"}]<|/tool|>' in tokenizer.decode(ids)
    tokenizer = TOKENIZERS["smollm3"]
    quick = by_us(tokenizer, [{**SYSTEM, "content": "Be brief. /no_think"}, USER])
    assert tokenizer.decode(quick).endswith("</think>\n")
