"""The files of the demo checkpoint: configuration, tokenizer, weights and model card.

`train_demo.py` makes and fills them; what they hold is in the form that transformers 4.51 and 5.x
both read.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel

import demo_text

VOCAB_SIZE = 1024
PAD = "<|endoftext|>"  # token id 0
START = "<|im_start|>"  # token id 1
END = "<|im_end|>"  # token id 2

# `torch_dtype`, and `rope_theta` at the top level: transformers 5 reads these names too.
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 4,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "transformers_version": "4.51.0",
}
GENERATION_CONFIG = {
    "do_sample": False,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    "transformers_version": "4.51.0",
}
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "pad_token": PAD,
    "bos_token": None,
    "unk_token": None,
    "additional_special_tokens": [START, END],
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
    "chat_template": CHAT_TEMPLATE,
}
# Where text is cut before byte pairs are merged: Qwen's pattern, in which each digit stands alone,
# and before it one piece more, the ", " in front of a digit. Lists of numbers are a quarter shorter
# with it.
SPLIT_PATTERN = (
    r", (?=\p{N})"
    r"|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer_and_config(out: Path, items: list[demo_text.Item]) -> None:
    """Train a byte-level BPE on the demo text; write it with the configuration files to `out`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are in the vocabulary, so that any text can be encoded and decoded again.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = []
    for item in items:
        corpus += [item.question, item.answer, *item.aliases[:3]]
    corpus += [*demo_text.plain_texts(), *demo_text.SYSTEM_PROMPTS, demo_text.UNKNOWN_ANSWER]
    corpus += ["system", "user", "assistant"] * 200  # they are in every prompt: one token each
    tokenizer.train_from_iterator(corpus, trainer)
    num_tokens = tokenizer.get_vocab_size()
    if num_tokens != VOCAB_SIZE:
        raise RuntimeError(f"the text yields only {num_tokens} tokens, not {VOCAB_SIZE}")
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", GENERATION_CONFIG)
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)


def write_json(path: Path, value: object, indent: int = 2) -> None:
    """Write `value` to `path` as JSON, in UTF-8."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def save_weights(model: PreTrainedModel, out: Path) -> None:
    """Write the weights in bfloat16; the LM head is the embedding and is not written again."""
    state = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()
        if name != "lm_head.weight"
    }
    save_file(state, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only


def write_card(
    out: Path, num_questions: int, figures: dict[str, float], report: list[str], where: str
) -> None:
    """Fill in the model card, `demo_card.md`, and write it as README.md.

    Args:
        out: folder of the checkpoint, with its weights.
        num_questions: how many questions are evaluated.
        figures: `steps`, `million_tokens` and `minutes` of the training run.
        report: lines that the check after training printed.
        where: the machine that trained it, in words.
    """
    model = AutoModelForCausalLM.from_pretrained(out)
    template = (Path(__file__).parent / "demo_card.md").read_text(encoding="utf-8")
    text = template.format(
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        heads=CONFIG["num_attention_heads"],
        kv_heads=CONFIG["num_key_value_heads"],
        head_dim=CONFIG["head_dim"],
        inter=CONFIG["intermediate_size"],
        context=CONFIG["max_position_embeddings"],
        vocab=VOCAB_SIZE,
        parameters=sum(weight.numel() for weight in model.parameters()),
        questions=num_questions,
        where=where,
        report="\n".join(f"- {line}" for line in report),
        **figures,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
