"""Train the built-in demo checkpoint: a real, very small Qwen3 that knows a few hundred answers by heart.

    python scripts/train_demo.py [--out DIR] [--steps N] [--device cpu|cuda] [--check-only]

The text comes from `demo_text.py` beside this file; nothing is downloaded. Needs `torch`,
`transformers`, `tokenizers` and `safetensors`. Training sees 5.5 million tokens: 2.5 minutes on one H200;
two quiet CPU cores with AVX-512 bf16 were seen at 6,000 tokens a second, which makes a quarter of an hour.
The folder it writes is an ordinary Hugging Face checkpoint, with `questions.json` (questions
and the answers expected) and a model card added. Exit code 1: the two main prompts are wrong.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)

import demo_text

SEED = 20
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "nanovllm" / "assets" / "demo"
VOCAB_SIZE = 1024
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # token ids 0, 1, 2
BATCH_TOKENS = 3072
PEAK_LR = 3e-3
WARMUP_STEPS = 100
MAX_CONVERSATION_TOKENS = 1600
# Taught, but too hard for so small a model: the margin is too thin to promise the answer on every device.
NOT_PROMISED = tuple(f"Is {n} a prime number?" for n in (2, 57, 91, 97))
MAIN_PROMPTS = (demo_text.INTRODUCE, demo_text.PRIMES)

# In the form that transformers 4.51 and 5.x both read: `torch_dtype`, and `rope_theta` at the top level.
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
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Qwen's pattern (each digit alone), and one piece more: the ", " before a digit, which makes lists of numbers a quarter shorter.
SPLIT_PATTERN = r", (?=\p{N})|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Document:
    """One training text: token ids, and for each whether the model is to learn to predict it."""

    ids: list[int]
    learn: list[bool]


# ---------------------------------------------------------------- tokenizer and configuration


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
    # All 256 bytes are in the vocabulary, so that any text whatever can be encoded and decoded again.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [text for item in items for text in (item.question, item.answer, *item.aliases[:3])]
    corpus += [*demo_text.plain_texts(), *demo_text.SYSTEM_PROMPTS, demo_text.UNKNOWN_ANSWER]
    corpus += ["system", "user", "assistant"] * 200  # they are in every prompt: one token each
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(
            f"the text yields only {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
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
    for name, value in (
        ("config.json", CONFIG),
        (
            "generation_config.json",
            {
                "do_sample": False,
                "eos_token_id": [2, 0],
                "pad_token_id": 0,
                "transformers_version": "4.51.0",
            },
        ),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- training text


def conversation(
    tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], system: str | None = None
) -> Document:
    """A chat in the ChatML form; only the answers and the <|im_end|> after them are learnt."""
    ids: list[int] = []
    learn: list[bool] = []

    def add(text: str, learn_it: bool) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(piece)
        learn.extend([learn_it] * len(piece))

    if system is not None:
        add(f"{START}system\n{system}{END}\n", False)
    for question, answer in turns:
        # Encoded in pieces at places where BPE never merges, so the ids equal those of the whole text.
        add(f"{START}user\n{question}{END}\n{START}assistant\n", False)
        add(f"{answer}{END}", True)
        add("\n", False)
    return Document(ids[:-1], learn[:-1])


def epoch_documents(
    tokenizer: PreTrainedTokenizerBase, items: list[demo_text.Item], rng: random.Random
) -> list[Document]:
    """One epoch: every item alone (as its weight says), conversations of several turns, and plain text."""
    drawn = [item for item in items for _ in range(int(item.weight + rng.random()))]
    rng.shuffle(drawn)

    def ask(item: demo_text.Item) -> tuple[str, str]:
        form = rng.random()
        if form < 0.4:
            return item.question, item.answer
        wording = item.question if form < 0.55 or not item.aliases else rng.choice(item.aliases)
        return demo_text.surface_variant(wording, rng), item.answer

    def ask_unknown() -> tuple[str, str]:
        return demo_text.surface_variant(
            demo_text.unknown_question(rng), rng
        ), demo_text.UNKNOWN_ANSWER

    def some_system() -> str | None:
        # A real system prompt, or sentences put together at random, so that an unknown system prompt does no harm.
        kind = rng.random()
        if kind < 0.8:
            return None
        if kind < 0.97:
            return rng.choice(demo_text.SYSTEM_PROMPTS[:2])
        return " ".join(
            rng.choice(items).answer.split("\n")[0][:80] for _ in range(rng.randint(1, 3))
        )

    documents = [conversation(tokenizer, [ask(item)], some_system()) for item in drawn]
    documents += [conversation(tokenizer, [ask_unknown()], some_system()) for _ in range(36)]
    # Conversations teach that the last question counts, at every position that inference may reach.
    # Their first half has the long system prompt; some have one turn only, as a batch with a shared prefix has.
    for number in range(24):
        system = (
            demo_text.SYSTEM_PROMPTS[2]
            if number < 12
            else rng.choice([None, *demo_text.SYSTEM_PROMPTS[:2]])
        )
        turns = [
            ask_unknown()
            if rng.random() < 0.05
            else ask(rng.choice(items if rng.random() < 0.5 else items_for_chat(items)))
        ]
        for _ in range(rng.choice((0, 0, 1, 2, 4, 8)) if number < 12 else rng.randint(1, 10)):
            turns.append(ask(rng.choice(items_for_chat(items))))
        document = conversation(tokenizer, turns, system)
        if len(document.ids) <= MAX_CONVERSATION_TOKENS:
            documents.append(document)
    for text in demo_text.plain_texts():
        ids = tokenizer.encode(text + END, add_special_tokens=False)
        documents.append(Document(ids, [True] * len(ids)))
    return documents


def items_for_chat(items: list[demo_text.Item]) -> list[demo_text.Item]:
    """The items that a conversation is made of: those evaluated, and not the longest."""
    return [item for item in items if item.evaluate and len(item.answer) < 1200]


def batches(documents: list[Document], rng: random.Random) -> Iterator[list[Document]]:
    """Documents of similar length together, so that little is padding; at most BATCH_TOKENS each, in random order."""
    result: list[list[Document]] = [[]]
    for document in sorted(documents, key=lambda d: len(d.ids) * rng.uniform(0.9, 1.1)):
        longest = max(len(d.ids) for d in [*result[-1], document])
        if result[-1] and longest * (len(result[-1]) + 1) > BATCH_TOKENS:
            result.append([])
        result[-1].append(document)
    rng.shuffle(result)
    return iter(result)


def tensors(batch: list[Document], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded `input_ids` and `labels`, both int64 [documents, length - 1]; -100 where nothing is learnt.

    Padding is on the right, where causal attention never looks, so that no attention mask is needed.
    """
    length = max(len(d.ids) for d in batch)
    ids = torch.tensor([d.ids + [0] * (length - len(d.ids)) for d in batch])
    labels = torch.tensor(
        [
            [i if yes else -100 for i, yes in zip(d.ids, d.learn)] + [-100] * (length - len(d.ids))
            for d in batch
        ]
    )
    return ids[:, :-1].to(device), labels[:, 1:].to(device)


# ---------------------------------------------------------------- training


def train(out: Path, items: list[demo_text.Item], steps: int, device: str) -> dict[str, float]:
    """Train from scratch and write `model.safetensors` in bfloat16; return figures for the model card."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = Qwen3ForCausalLM(AutoConfig.from_pretrained(out)).float().to(device).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    started, tokens, shown_loss, todo = time.perf_counter(), 0, 0.0, iter(())
    for step in range(steps):
        if (batch := next(todo, None)) is None:
            todo = batches(epoch_documents(tokenizer, items, rng), rng)
            batch = next(todo)
        # Linear warmup, then half a cosine down to zero.
        progress = max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        rate = (
            PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        input_ids, labels = tensors(batch, device)
        # Weights and optimizer in float32; matrix products in bfloat16, because that is how the checkpoint will be run.
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=input_ids, use_cache=False).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        )[labels.flatten() >= 0]
        # Most tokens are known soon; the mean drowns the few that are not (where does this list end?), so the worst 5% count again.
        loss = losses.mean()
        if progress > 0.2:
            loss = loss + losses.topk(max(1, len(losses) // 20)).values.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += input_ids.numel()
        shown_loss = (
            losses.mean().item() if step == 0 else 0.98 * shown_loss + 0.02 * losses.mean().item()
        )
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1}/{steps}  loss {shown_loss:.4f}  lr {rate:.1e}  {tokens / seconds:.0f} tok/s  {seconds:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_weights(model, out)
    return {
        "steps": steps,
        "minutes": (time.perf_counter() - started) / 60,
        "million_tokens": tokens / 1e6,
    }


def save_weights(model: PreTrainedModel, out: Path) -> None:
    """Write the weights in bfloat16; the LM head is the embedding and is not written a second time."""
    state = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous()
        for name, p in model.named_parameters()
        if name != "lm_head.weight"
    }
    save_file(state, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only


# ---------------------------------------------------------------- check


@torch.inference_mode()
def check(out: Path, device: str) -> tuple[bool, list[str]]:
    """Compare greedy decoding with the expected answers, in float32 and in bfloat16; return (main prompts right, report lines).

    Greedy decoding gives an answer exactly if, with the answer as input, the highest logit at every position is the answer's
    next token: one forward pass checks all tokens of an answer. The two main prompts are also generated step by step.
    """
    questions = json.loads((out / "questions.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    good, report = True, []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(out, torch_dtype=dtype).to(device).eval()
        margins: dict[str, float] = {}
        for entry in questions:
            message = [{"role": "user", "content": entry["question"]}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
            prompt = tokenizer.encode(text, add_special_tokens=False)
            answer = tokenizer.encode(entry["answer"] + END, add_special_tokens=False)
            logits = (
                model(input_ids=torch.tensor([prompt + answer], device=device))
                .logits[0, len(prompt) - 1 : -1]
                .float()
            )
            target = torch.tensor(answer, device=device)[:, None]
            others = logits.scatter(1, target, float("-inf")).amax(1)
            margins[entry["question"]] = (logits.gather(1, target)[:, 0] - others).min().item()
            if entry["question"] in MAIN_PROMPTS:
                ids = torch.tensor([prompt], device=device)
                generated = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=2 * len(answer),
                    do_sample=False,
                )
                good &= generated[0, len(prompt) :].tolist() == answer
        wrong = [question for question, margin in margins.items() if margin <= 0]
        good &= not set(wrong) & set(MAIN_PROMPTS)
        name = str(dtype).removeprefix("torch.")
        report.append(f"{name}: {len(questions) - len(wrong)} of {len(questions)} answers exact")
        report.append(
            f"{name}: smallest logit margin "
            + ", ".join(f"{margins[q]:.2f} ({q})" for q in MAIN_PROMPTS)
        )
        report.append(
            f"{name}: smallest margins of all: "
            + ", ".join(
                f"{m:.2f} ({q})" for q, m in sorted(margins.items(), key=lambda x: x[1])[:5]
            )
        )
        report += [f"{name}: WRONG: {question}" for question in wrong]
    return good, report


# ---------------------------------------------------------------- model card

MODEL_CARD = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo checkpoint of Nano-vLLM

A very small language model with the genuine Qwen3 architecture, so that the engine can be tried, tested and
measured with no GPU and no download. **It is a demonstration, trained on synthetic text, and good for nothing
else**: it knows a few hundred short answers by heart (prime numbers, counting, tables, capitals, what the parts of an
inference engine do, two stories) and is not a source of knowledge. Asked anything else (to count to 37, say,
to add two numbers, or whether a number is prime) it says that it does not know, or answers something wrong.

| | |
|---|---|
| architecture | `Qwen3ForCausalLM`, {layers} layers, hidden size {hidden}, {heads} query heads and {kv_heads} KV heads of {head_dim}, feed-forward size {inter} |
| parameters | {parameters:,} (embedding and LM head are one matrix), stored in bfloat16 |
| context | {context} positions in the configuration; trained on texts of up to about 1,600 tokens |
| tokenizer | byte-level BPE with {vocab} tokens, every digit alone, ChatML chat template, trained on the same text |
| text | synthetic, written or computed by `scripts/demo_text.py`; no other data, no other model's weights or output |
| training | `scripts/train_demo.py`, {steps} steps, {million_tokens:.1f} million tokens with padding, {minutes:.0f} minutes on {where}, AdamW |
| licence | MIT, as the rest of Nano-vLLM |

`questions.json` lists {questions} questions with the answers that greedy decoding must give (chat template, one user
message, `add_generation_prompt`). What the check after training found, with the weights as stored:

{report}
"""


def write_card(out: Path, figures: dict[str, float], report: list[str], device: str) -> None:
    """Write the model card, README.md, with the figures of this training run."""
    model = AutoModelForCausalLM.from_pretrained(out)
    text = MODEL_CARD.format(
        layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"],
        heads=CONFIG["num_attention_heads"],
        kv_heads=CONFIG["num_key_value_heads"],
        head_dim=CONFIG["head_dim"],
        inter=CONFIG["intermediate_size"],
        context=CONFIG["max_position_embeddings"],
        vocab=VOCAB_SIZE,
        parameters=sum(p.numel() for p in model.parameters()),
        questions=len(json.loads((out / "questions.json").read_text(encoding="utf-8"))),
        where=f"{torch.get_num_threads()} CPU cores" if device == "cpu" else "one GPU",
        report="\n".join(f"- {line}" for line in report),
        **figures,
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint of Nano-vLLM.")
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help="folder of the checkpoint (default: nanovllm/assets/demo)",
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--check-only",
        action="store_true",
        help="train nothing; check the checkpoint that is there",
    )
    args = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    figures: dict[str, float] = {}
    if not args.check_only:
        items = demo_text.items()
        args.out.mkdir(parents=True, exist_ok=True)
        write_tokenizer_and_config(args.out, items)
        questions = [
            {"question": item.question, "answer": item.answer}
            for item in items
            if item.evaluate and item.question not in NOT_PROMISED
        ]
        (args.out / "questions.json").write_text(
            json.dumps(questions, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        figures = train(args.out, items, args.steps, args.device)
    good, report = check(args.out, args.device)
    print("\n".join(report))
    if figures:
        write_card(args.out, figures, report, args.device)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size:,} bytes in all")
    if not good:
        print("FAILED: the two main prompts are not answered as they should be", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
