"""Train the demo checkpoint: a real, very small Qwen3 that knows a few hundred answers by heart.

    python scripts/train_demo.py [--out DIR] [--steps N] [--device cpu|cuda] [--check-only]

The text comes from `demo_text.py` beside this file; nothing is downloaded. Training sees 5.5
million tokens. That takes 2.5 minutes on one H200; two quiet CPU cores with AVX-512 bf16 make 6,000
tokens a second, so a quarter of an hour. The folder it writes is an ordinary Hugging Face
checkpoint, with `questions.json` (questions and the answers expected) and a model card added. The
exit code is 1 if one of the two main prompts is answered wrongly.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)

import demo_text
from demo_checkpoint import (
    END,
    START,
    save_weights,
    write_card,
    write_json,
    write_tokenizer_and_config,
)

SEED = 20
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "nanovllm" / "assets" / "demo"
BATCH_TOKENS = 3072  # of a batch, padding included
PEAK_LR = 3e-3
WARMUP_STEPS = 100
MAX_CONVERSATION_TOKENS = 1600
# Taught, but too hard for so small a model: the margin between the best logits is too thin to
# promise that the answer is right on every device.
NOT_PROMISED = tuple(f"Is {n} a prime number?" for n in (2, 57, 91, 97))
MAIN_PROMPTS = (demo_text.INTRODUCE, demo_text.PRIMES)


@dataclass(frozen=True)
class Document:
    """One training text: token ids, and for each whether the model is to learn to predict it."""

    ids: list[int]
    learn: list[bool]


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
        # In pieces that BPE never merges across, so the ids are those of the whole text.
        add(f"{START}user\n{question}{END}\n{START}assistant\n", False)
        add(f"{answer}{END}", True)
        add("\n", False)
    return Document(ids[:-1], learn[:-1])


def epoch_documents(
    tokenizer: PreTrainedTokenizerBase, items: list[demo_text.Item], rng: random.Random
) -> list[Document]:
    """One epoch: each item alone, as often as its weight says, conversations, and plain text."""
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
        # None, a real one, or random sentences, so that an unknown system prompt does no harm.
        kind = rng.random()
        if kind < 0.8:
            return None
        if kind < 0.97:
            return rng.choice(demo_text.SYSTEM_PROMPTS[:2])
        sentences = []
        for _ in range(rng.randint(1, 3)):
            sentences.append(rng.choice(items).answer.split("\n")[0][:80])
        return " ".join(sentences)

    documents = [conversation(tokenizer, [ask(item)], some_system()) for item in drawn]
    documents += [conversation(tokenizer, [ask_unknown()], some_system()) for _ in range(36)]
    # Conversations teach that the last question counts, at every position that inference may reach.
    # The first half of them have the long system prompt; some of these have one turn only, as the
    # requests of a batch with a shared prefix have.
    for number in range(24):
        is_long = number < 12
        system: str | None = demo_text.SYSTEM_PROMPTS[2]
        if not is_long:
            system = rng.choice([None, *demo_text.SYSTEM_PROMPTS[:2]])
        if rng.random() < 0.05:
            turns = [ask_unknown()]
        elif rng.random() < 0.5:
            turns = [ask(rng.choice(items))]
        else:
            turns = [ask(rng.choice(items_for_chat(items)))]
        more_turns = rng.choice((0, 0, 1, 2, 4, 8)) if is_long else rng.randint(1, 10)
        for _ in range(more_turns):
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
    """Batches of documents of similar length, so that little is padding, in random order.

    A batch has at most BATCH_TOKENS tokens, padding included, or is a single document.
    """
    result: list[list[Document]] = [[]]
    for document in sorted(documents, key=lambda d: len(d.ids) * rng.uniform(0.9, 1.1)):
        longest = max(len(d.ids) for d in [*result[-1], document])
        if result[-1] and longest * (len(result[-1]) + 1) > BATCH_TOKENS:
            result.append([])
        result[-1].append(document)
    rng.shuffle(result)
    return iter(result)


def endless_batches(
    tokenizer: PreTrainedTokenizerBase, items: list[demo_text.Item], rng: random.Random
) -> Iterator[list[Document]]:
    """The batches of one epoch after the other."""
    while True:
        yield from batches(epoch_documents(tokenizer, items, rng), rng)


def tensors(batch: list[Document], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded `input_ids` and `labels`, both int64 [documents, length - 1].

    Labels are -100 where nothing is learnt. Padding is on the right, where causal attention never
    looks, so that no attention mask is needed.
    """
    length = max(len(d.ids) for d in batch)
    ids = torch.tensor([d.ids + [0] * (length - len(d.ids)) for d in batch])
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(batch):
        for position, learns in enumerate(document.learn):
            if learns:
                labels[row, position] = document.ids[position]
    return ids[:, :-1].to(device), labels[:, 1:].to(device)


# ---------------------------------------------------------------- training


def train(out: Path, items: list[demo_text.Item], steps: int, device: str) -> dict[str, float]:
    """Train from scratch, write `model.safetensors` in bfloat16, return figures for the model card.

    Args:
        out: folder with the tokenizer and the configuration.
        items: the questions and answers.
        steps: number of optimizer steps.
        device: "cpu" or "cuda".
    """
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
    started = time.perf_counter()
    num_tokens = 0
    shown_loss = 0.0  # a moving average
    epochs = endless_batches(tokenizer, items, rng)
    for step in range(steps):
        batch = next(epochs)
        # The learning rate rises linearly, then falls to zero along half a cosine.
        progress = max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        rate = PEAK_LR * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        input_ids, labels = tensors(batch, device)
        # Weights and optimizer are float32, matrix products bfloat16, as they will be at inference.
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=input_ids, use_cache=False).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        )[labels.flatten() >= 0]
        # Most tokens are known soon, and in the mean the few that are not (where does this list
        # end?) hardly count. So the worst 5% count again.
        loss = losses.mean()
        if progress > 0.2:
            loss = loss + losses.topk(max(1, len(losses) // 20)).values.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens += input_ids.numel()
        loss_now = losses.mean().item()
        shown_loss = loss_now if step == 0 else 0.98 * shown_loss + 0.02 * loss_now
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(
                f"step {step + 1}/{steps}  loss {shown_loss:.4f}  lr {rate:.1e}  "
                f"{num_tokens / seconds:.0f} tok/s  {seconds:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_weights(model, out)
    return {
        "steps": steps,
        "minutes": (time.perf_counter() - started) / 60,
        "million_tokens": num_tokens / 1e6,
    }


# ---------------------------------------------------------------- check


@dataclass(frozen=True)
class Check:
    """What greedy decoding makes of the questions."""

    main_prompts_right: bool
    report: list[str]  # lines to print


def answer_margin(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """By how much the logits of the answer's tokens exceed all others, at the least.

    Greedy decoding gives an answer exactly if, with the answer as input, the highest logit at every
    position is that of the answer's next token: one forward pass checks all tokens of an answer.
    """
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    target = torch.tensor(answer, device=model.device)[:, None]
    others = logits.scatter(1, target, float("-inf")).amax(1)
    return (logits.gather(1, target)[:, 0] - others).min().item()


def generates(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> bool:
    """Whether greedy decoding, token by token, makes this answer of the prompt."""
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    limit = 2 * len(answer)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False)
    return generated[0, len(prompt) :].tolist() == answer


@torch.inference_mode()
def check(out: Path, device: str) -> Check:
    """Compare greedy decoding with the expected answers, in float32 and in bfloat16.

    The two main prompts are also generated step by step.
    """
    questions = json.loads((out / "questions.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    good = True
    report = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(out, torch_dtype=dtype).to(device).eval()
        margins: dict[str, float] = {}
        for entry in questions:
            question = entry["question"]
            message = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
            prompt = tokenizer.encode(text, add_special_tokens=False)
            answer = tokenizer.encode(entry["answer"] + END, add_special_tokens=False)
            margins[question] = answer_margin(model, prompt, answer)
            if question in MAIN_PROMPTS and not generates(model, prompt, answer):
                good = False
        wrong = [question for question, margin in margins.items() if margin <= 0]
        if set(wrong) & set(MAIN_PROMPTS):
            good = False
        name = str(dtype).removeprefix("torch.")
        by_margin = sorted(margins, key=lambda question: margins[question])
        report += [
            f"{name}: {len(questions) - len(wrong)} of {len(questions)} answers exact",
            f"{name}: smallest logit margin {with_margins(MAIN_PROMPTS, margins)}",
            f"{name}: smallest margins of all: {with_margins(by_margin[:5], margins)}",
        ]
        report += [f"{name}: WRONG: {question}" for question in wrong]
    return Check(good, report)


def with_margins(questions: Iterable[str], margins: dict[str, float]) -> str:
    """The margins of these questions, each with its question."""
    return ", ".join(f"{margins[question]:.2f} ({question})" for question in questions)


# ---------------------------------------------------------------- command line


def main() -> int:
    """Train and check, or only check; return the exit code."""
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
        write_json(args.out / "questions.json", questions, indent=1)
        figures = train(args.out, items, args.steps, args.device)
    result = check(args.out, args.device)
    print("\n".join(result.report))
    if figures:
        where = f"{torch.get_num_threads()} CPU cores" if args.device == "cpu" else "one GPU"
        write_card(args.out, len(questions), figures, result.report, where)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size:,} bytes in all")
    if not result.main_prompts_right:
        print("FAILED: the two main prompts are not answered as they should be", file=sys.stderr)
    return 0 if result.main_prompts_right else 1


if __name__ == "__main__":
    sys.exit(main())
