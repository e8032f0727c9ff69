"""Texts of tokenizers of all kinds, whole and streamed, their ends, and what one request may not do
to others.
"""

import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_idle, greedy, make_checkpoint, make_llm
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.progress import progress_bar
from nanovllm.text.decoder import decoder_of
from nanovllm.text.detokenizer import Detokenizer

NO_CHARACTER = "\ufffd"
PIECES = ("▁", "a", "b", "▁a", "▁hello", "é", "中", "\n", "▁▁", "hello", "END")


def byte_fallback(drops_first_space: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer with byte tokens, of Llama 2's kind or of Gemma's."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = 3 + byte
    for piece in PIECES:
        vocabulary[piece] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if drops_first_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.BPE(vocab={"<unk>": 0, "▁": 1, "a": 2, "▁b": 3, "▁▁": 4}, merges=[])
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """Words are joined by spaces, which `clean_up_tokenization_spaces` takes out here and there."""
    vocabulary = {"[UNK]": 0, "a": 1, "##b": 2, "n't": 3, "'": 4, ".": 5, "do": 6}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True
    )


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "byte-level": AutoTokenizer.from_pretrained(DEMO_MODEL),
    "llama": byte_fallback(drops_first_space=True),
    "gemma": byte_fallback(drops_first_space=False),
    "metaspace": metaspace(),
    "wordpiece": word_piece(),
    "python": ByT5Tokenizer(),
}
LLAMA = TOKENIZERS["llama"]
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def run(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    params: SamplingParams,
    prompt: list[int],
) -> tuple[str, int, str | None]:
    """What a reader of a stream gets in all, the number of tokens, and the stop string found."""
    detokenizer = Detokenizer(tokenizer, params, prompt)
    pieces: list[str] = []
    for number, token_id in enumerate(token_ids, start=1):
        is_last = number == len(token_ids)
        stop = detokenizer.append(token_id, is_last, may_stop=True)
        pieces.append(detokenizer.take(is_last or stop is not None))
        if stop is not None:
            break
    assert "".join(pieces) == detokenizer.text
    return detokenizer.text, number, stop


def random_cases(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int], bool]]:
    """Prompts, completions (of all tokens, or of many bytes), whether special ones are left out."""
    r = random.Random(0)
    byte_ids = list(decoder_of(tokenizer).byte_ids)
    for _ in range(150):
        prompt = [r.randrange(len(tokenizer)) for _ in range(r.randrange(3))]
        pool = byte_ids if byte_ids and r.random() < 0.5 else range(len(tokenizer))
        text = "".join(r.choice("ab é中😀\n") for _ in range(9))
        encoded = tokenizer.encode(text, add_special_tokens=False)
        drawn = [r.choice((r.choice(pool), r.randrange(len(tokenizer)))) for _ in range(30)]
        token_ids = r.choice((drawn, encoded, drawn[:4] + encoded))[: r.randrange(1, 40)]
        yield prompt, token_ids or drawn, r.random() < 0.5


@kinds
def test_a_stream_gives_what_generate_gives(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    decoder = decoder_of(tokenizer)
    for prompt, token_ids, skips in random_cases(tokenizer):
        whole = decoder.completion_text(token_ids, skips, decoder.context_of(prompt))
        params = SamplingParams(skip_special_tokens=skips)
        assert run(tokenizer, token_ids, params, prompt) == (whole, len(token_ids), None)


@kinds
@pytest.mark.parametrize("stop", ["a", " ", "é\n", NO_CHARACTER])
def test_a_completion_ends_as_soon_as_its_text_has_a_stop_string(kind: str, stop: str) -> None:
    """Its text is what it would be if it ended there, for example within a run of byte tokens."""
    tokenizer = TOKENIZERS[kind]
    decoder = decoder_of(tokenizer)
    for prompt, token_ids, skips in random_cases(tokenizer):
        context = decoder.context_of(prompt)
        expected = (decoder.completion_text(token_ids, skips, context), len(token_ids), None)
        for number in range(1, len(token_ids) + 1):
            text = decoder.completion_text(token_ids[:number], skips, context)
            if stop in text:
                expected = (text[: text.index(stop)], number, stop)  # type: ignore[assignment]
                break
        params = SamplingParams(skip_special_tokens=skips, stop=stop)
        assert run(tokenizer, token_ids, params, prompt) == expected


def ids_of(tokenizer: PreTrainedTokenizerBase, *pieces: str | int) -> list[int]:
    """Token ids of pieces of the vocabulary and, as numbers, of bytes."""
    names = [f"<0x{piece:02X}>" if isinstance(piece, int) else piece for piece in pieces]
    return tokenizer.convert_tokens_to_ids(names)


@pytest.mark.parametrize(
    "pieces, text",
    [
        (("a", 0xF0, 0x9F, 0x98), "a"),
        (("a", 0xC3, 0xA9, 0xE4, 0xB8), "aé"),  # a whole character before it in one run
        (("a", 0xFF), "a" + NO_CHARACTER),  # no other byte could make a character of it
        (("a", 0xC3, 0xFF, 0xE4), "a" + 2 * NO_CHARACTER),
        (("a", 0xE4, "</s>", 0xB8), "a"),  # a token that is not shown ends no run
        (("a", 0xE4, "b"), "a" + NO_CHARACTER + "b"),
        ((0xEF, 0xBF, 0xBD), NO_CHARACTER),  # the model's own
        ((0xE4,), ""),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_character_that_the_end_cuts_off_is_left_out(
    kind: str, pieces: tuple[str | int, ...], text: str
) -> None:
    tokenizer = TOKENIZERS[kind]
    token_ids = ids_of(tokenizer, *pieces)
    assert decoder_of(tokenizer).completion_text(token_ids, True, []) == text
    assert run(tokenizer, token_ids, SamplingParams(stop="zz"), [])[0] == text


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
def test_the_bytes_of_tokens_are_those_of_the_text(kind: str) -> None:
    text = "é中😀ab\n" + NO_CHARACTER
    token_ids = TOKENIZERS[kind].encode(text, add_special_tokens=False)
    parts = [decoder_of(TOKENIZERS[kind]).token_bytes(token_id) for token_id in token_ids]
    assert b"".join(parts) == text.encode()
    assert NO_CHARACTER in parts[-1].decode(errors="replace")
    assert len(parts) > len(text)  # some are part of a character


def test_the_space_between_prompt_and_completion_is_kept() -> None:
    decoder = decoder_of(LLAMA)
    hello = ids_of(LLAMA, "▁hello", "▁a")
    for prompt, text in (
        (["<s>"], "hello a"),  # nothing that shows is before it
        (["<s>", "▁"], "hello a"),
        (["<s>", "▁hello"], " hello a"),
        (["<s>", "a", "</s>", 0x0A], " hello a"),
    ):
        prompt_ids = ids_of(LLAMA, *prompt)
        assert decoder.completion_text(hello, True, decoder.context_of(prompt_ids)) == text
        assert run(LLAMA, hello, SamplingParams(), prompt_ids)[0] == text


@pytest.mark.parametrize("includes", [False, True])
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    "stop, before",
    [("</s>", "hello"), ("lo</s>", "hel"), ("</s>\n", "hello"), ("lo</s>\n", "hel")],
)
def test_special_tokens_in_stop_strings(
    stop: str, before: str, skips: bool, includes: bool
) -> None:
    token_ids = ids_of(LLAMA, "<s>", "hello", "</s>", "\n", "a")
    params = SamplingParams(
        stop=[stop], skip_special_tokens=skips, include_stop_str_in_output=includes
    )
    text, num_tokens, found = run(LLAMA, token_ids, params, [])
    assert (num_tokens, found) == (3 + ("\n" in stop), stop)
    assert text == ("" if skips else "<s>") + before + (stop if includes else "")


# --- through the engine -----------------------------------------------------------------------


def engine_with(path: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> LLM:
    make_checkpoint(path, vocab_size=vocab_size, std=0.05)
    tokenizer.save_pretrained(path)
    return make_llm(str(path))


@pytest.mark.parametrize("kind", ["llama", "gemma", "python"])
def test_generate_and_stream_with_random_tokens(kind: str, tmp_path: Path) -> None:
    llm = engine_with(tmp_path, TOKENIZERS[kind], vocab_size=384 if kind == "python" else 275)
    prompts = [[5, 6, 70 + i] for i in range(12)]
    params = [SamplingParams(max_tokens=30, seed=i, ignore_eos=True) for i in range(12)]
    texts = [output["text"] for output in llm.generate(prompts, params, use_tqdm=False)]
    assert any(texts)
    stopped = [SamplingParams(max_tokens=30, seed=i, ignore_eos=True, stop="zz") for i in range(12)]
    assert [o["text"] for o in llm.generate(prompts, stopped, use_tqdm=False)] == texts
    streamed = [""] * len(prompts)
    for part in llm.stream(prompts, params):
        streamed[part["index"]] += part["text"]
    assert streamed == texts
    assert_idle(llm)


def test_a_text_that_cannot_be_decoded_ends_its_request_only(tmp_path: Path) -> None:
    """ByT5's decoder, in Python, raises for ids that it does not have and the model does."""
    llm = engine_with(tmp_path, TOKENIZERS["python"], vocab_size=400)
    bad = dict(max_tokens=3, temperature=0, logit_bias={395: 100}, ignore_eos=True)
    good = dict(max_tokens=3, temperature=0, logit_bias={100: 100}, ignore_eos=True)
    for more in ({}, {"stop": "zz"}):
        params = [SamplingParams(**o, **more) for o in (good, bad)]
        fine, failed = llm.generate([[5], [5]], params, use_tqdm=False)
        assert (fine["text"], fine["finish_reason"]) == ("aaa", "length")
        assert failed["finish_reason"] == "error" and "cannot decode" in failed["stop_reason"]
        assert failed["text"] == ""
        ends = [part["finish_reason"] for part in llm.stream([[5], [5]], params)]
        assert sorted(filter(None, ends)) == ["error", "length"]
        with pytest.raises(RuntimeError, match="no request could be completed"):
            llm.generate([[5]], params[1], use_tqdm=False)
        assert_idle(llm)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"logprobs": 1}, {"top_k": 3}, {"repetition_penalty": 1.1}, {"temperature": 0}]
)
def test_logits_that_are_no_numbers_end_their_request_only(
    tmp_path: Path, options: dict[str, Any], depth: int
) -> None:
    make_checkpoint(tmp_path, seed=3)
    file = tmp_path / "model.safetensors"
    clean = make_llm(str(tmp_path))
    params = SamplingParams(**{"max_tokens": 6, "seed": 1, **options})
    want = clean.generate([[1, 2], [3]], params, use_tqdm=False)
    # A token that no completion here has: it is in the prompt of one request.
    bad = next(i for i in range(4, 127) if all(i not in output["token_ids"] for output in want))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][bad, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    llm = make_llm(str(tmp_path), depth=depth)
    with llm.trace() as trace:
        outputs = llm.generate([[1, 2], [bad, 2], [3]], params, use_tqdm=False)
    assert trace.summary()
    got = [outputs[0]["token_ids"], outputs[2]["token_ids"]]
    assert got == [output["token_ids"] for output in want]
    assert outputs[1]["finish_reason"] == "error" and outputs[1]["token_ids"] == []
    assert "NaN" in outputs[1]["stop_reason"]
    (part,) = llm.stream([[bad]], params)
    assert part["finish_reason"] == "error" and part["token_ids"] == []
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        llm.generate([[bad], [2, bad]], params, use_tqdm=False)
    assert_idle(llm)


class BrokenPipe(io.StringIO):
    def __init__(self, writes: int) -> None:
        super().__init__()
        self.writes = writes

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)


@pytest.mark.parametrize("writes", [0, 1, 2, 5, None])
def test_a_bar_that_cannot_be_drawn_ends_nothing(
    writes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO() if writes is None else BrokenPipe(writes)
    if writes is None:
        stream.close()  # then it raises a ValueError
    monkeypatch.setattr(sys, "stderr", stream)
    llm = LLM(DEMO_MODEL, device="cpu")
    assert len(llm.generate(["Hello"] * 8, greedy(8))) == 8
    with progress_bar(total=3, desc="Loading", delay=0) as update:
        update()
    with pytest.raises(KeyError), progress_bar(total=3):
        raise KeyError


# --- ends and draws -----------------------------------------------------------------------------


def test_min_tokens_hold_off_an_end_that_is_ignored(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, eos_token_id=7)
    llm = make_llm(checkpoint.path)
    for min_tokens, is_drawn in ((0, True), (3, False), (6, False)):
        params = SamplingParams(
            logit_bias={7: 100}, ignore_eos=True, min_tokens=min_tokens, max_tokens=6
        )
        (output,) = llm.generate([[1, 2]], params, use_tqdm=False)
        assert 7 not in output["token_ids"][:min_tokens]
        assert output["token_ids"][min_tokens:] == [7] * (6 - min_tokens)
        assert (7 in output["token_ids"][:1]) is is_drawn


def test_top_k_of_one_is_greedy_among_ties(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=5)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][:] = torch.randn(1, 48)  # all logits are equal
    save_file(tensors, file, {"format": "pt"})
    llm = make_llm(str(tmp_path))
    for options in ({}, {"presence_penalty": 0.0, "logprobs": 2}, {"temperature": 2.0}):
        params = [SamplingParams(top_k=1, seed=seed, max_tokens=4, **options) for seed in range(3)]
        outputs = llm.generate([[1]] * 3, params, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [[0] * 4] * 3
    assert SamplingParams(top_k=1, n=2).is_greedy
