"""Small tokenizers and chat templates in the manner of those that model families have.

The tokenizers know the words of a few sentences; the templates follow the rules of their
families (who begins, what is trimmed, where tools and the system message go) in words of their own.
"""

import re
from typing import Any

from real_prompts import KNOWLEDGE, LANGUAGES
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Other characters are bytes to tokenizers that have such tokens.
CHARACTERS = [*map(chr, range(0x21, 0x7F)), *"▁\nÄÖÜäöüßéèçñкшоеня中国日本のはا"]
WORDS = sorted(
    {word for text in LANGUAGES[:8] + KNOWLEDGE for word in re.findall(" ?[A-Za-zäöüé]+", text)}
)


# --- chat templates -------------------------------------------------------------------------------

# BOS is the template's; contents are trimmed; the date and the tools are in the system message, or
# the tools in the first user message; results of tools have the role ipython.
LLAMA3_TEMPLATE = """
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "1 Jan 2025" %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- set system = "" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- head('system') }}
{%- if tools is not none %}{{ 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today is ' + date_string + '.\\n\\n' }}
{%- if tools is not none and not tools_in_user_message %}
    {{- 'Functions:\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n' }}{%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- if tools is not none and tools_in_user_message %}
    {%- if not messages %}{{ raise_exception('no first user message for the tools') }}{%- endif %}
    {{- head('user') + 'Functions:\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n' }}{%- endfor %}
    {{- messages[0]['content'] | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- head('ipython') }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('one tool call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- head('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- head(message['role']) + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{%- endif %}
"""

# The system message goes before the first user message; user and model take turns; contents may be
# lists of parts, each of which is trimmed.
GEMMA_TEMPLATE = """
{{- bos_token }}
{%- set prefix = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set prefix = messages[0]['content'] + '\\n\\n' %}
    {%- else %}
        {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' %}
    {%- endif %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 is even) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- elif message['content'] is iterable %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}<image>
            {%- elif part['type'] == 'text' %}{{ part['text'] | trim }}{%- endif %}
        {%- endfor %}
    {%- else %}
        {{- raise_exception('what content is that?') }}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}
"""

# Tools and system message stand before and in the last user message; an assistant's message has a
# content or calls, whose ids have nine characters, and ends with EOS.
MISTRAL_TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') }}
        {{- message['content'] + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {%- if message.content is defined and message.content is not none %}
            {{- raise_exception('a content or calls, not both') }}
        {%- endif %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception('ids of tool calls have 9 characters') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}
            {{- raise_exception('ids of tool calls have 9 characters') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
{%- endfor %}
"""


# --- tokenizers -----------------------------------------------------------------------------------


def set_vocabulary(tokenizer: Tokenizer, special: list[str], has_bytes: bool) -> None:
    """Give a tokenizer of a family's parts its vocabulary: special tokens, bytes, pieces of words.

    Training would leave ties among pairs to chance.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = CHARACTERS if has_bytes else sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*special, *(BYTES if has_bytes else []), *alphabet]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        if has_bytes:
            letters = word.replace(" ", "▁")
        else:
            ((letters, _),) = byte_level.pre_tokenize_str(word)
        # Letter after letter, so that each beginning of the word is a piece.
        merges += [(letters[:end], letters[end]) for end in range(1, len(letters))]
    pieces += [first + second for first, second in merges]
    tokenizer.model = models.BPE(
        vocab={piece: token_id for token_id, piece in enumerate(dict.fromkeys(pieces))},
        merges=list(dict.fromkeys(merges)),
        unk_token="<unk>" if has_bytes else None,
        fuse_unk=has_bytes,
        byte_fallback=has_bytes,
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])


def with_bos(tokenizer: Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def sentence_piece_decoder(drops_first_space: bool) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if drops_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def llama2(is_legacy: bool = False, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A space is put before a text; in the legacy form behind each special token, too."""
    tokenizer = Tokenizer(models.BPE())
    if is_legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    set_vocabulary(tokenizer, ["<unk>", "<s>", "</s>", *more], has_bytes=True)
    tokenizer.decoder = sentence_piece_decoder(drops_first_space=True)
    with_bos(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def mistral() -> PreTrainedTokenizerFast:
    names = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
    controls = [f"[{slash}{name}]" for name in names for slash in ("", "/")]
    tokenizer = llama2(is_legacy=True, more=(*controls, "[TOOL_CALLS]"))
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    """No space is put before a text, and the first one is kept. Two tokens end a completion."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    set_vocabulary(tokenizer, special, has_bytes=True)
    tokenizer.decoder = sentence_piece_decoder(drops_first_space=False)
    with_bos(tokenizer, "<bos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=GEMMA_TEMPLATE,
    )


def llama3() -> PreTrainedTokenizerFast:
    """Byte-level, with BOS from the post-processor. Three tokens end a completion."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    names = ["begin_of_text", "end_of_text", "eot_id", "eom_id", "start_header_id", "end_header_id"]
    set_vocabulary(tokenizer, [f"<|{name}|>" for name in names], has_bytes=False)
    tokenizer.decoder = decoders.ByteLevel()
    with_bos(tokenizer, "<|begin_of_text|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_TEMPLATE,
    )


FAMILIES: dict[str, PreTrainedTokenizerFast] = {
    "llama2": llama2(),
    "llama2-legacy": llama2(is_legacy=True),
    "mistral": mistral(),
    "gemma": gemma(),
    "llama3": llama3(),
}
