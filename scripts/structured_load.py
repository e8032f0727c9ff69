"""What `bench.py --structured` needs: a tokenizer of a real one's size, and a schema a request."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUM_SPECIAL = 26
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "an", "er")]
# What stands before and after the letters of tokens, about as often as in Qwen3's vocabulary. A
# token with a quotation mark may end a string of JSON, one with a line break may not be in it.
BEFORE = [""] * 40 + ["Ġ"] * 50 + ['"', "_", ".", "ĊĊ", "Ċĉ"]
AFTER = [""] * 95 + ['"', '":', '",', "(", "Ċ"]


def write_tokenizer(directory: str, vocab_size: int) -> None:
    """Write a byte-level BPE tokenizer of pseudo-words, for a checkpoint with random weights.

    It has a few hundred tokens less than `vocab_size`, as those of real models do.
    """
    r = random.Random(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(letters)  # a set that keeps the order
    num_tokens = max(vocab_size - 293, len(letters))
    while len(tokens) < num_tokens:
        word = "".join(r.choices(SYLLABLES, k=r.randint(1, 5)))
        tokens[r.choice(BEFORE) + word + r.choice(AFTER)] = None
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", *(f"<|{i}|>" for i in range(NUM_SPECIAL - 2))]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.save_pretrained(directory)


def make_schema(number: int) -> dict[str, object]:
    """A schema of some depth, which no other number has. What fits it does not end too soon."""
    person = {
        "type": "object",
        "properties": {
            f"name{number}": {"type": "string"},
            "age": {"type": "integer"},
            "role": {"enum": ["admin", "guest", "owner"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "address": {
                "type": "object",
                "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
                "required": ["street", "zip"],
                "additionalProperties": False,
            },
        },
        "required": [f"name{number}", "age", "role", "tags", "address"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": person, "minItems": 100}
