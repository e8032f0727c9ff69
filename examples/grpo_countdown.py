"""Reinforcement learning in a page: GRPO teaches a tiny model to count down, on a CPU.

    python examples/grpo_countdown.py [--steps 240] [--plot reward.png]

The model begins with random weights, and nobody shows it a right answer. Each step asks for several
answers to the same questions (the rollouts, by this engine), and rewards an answer by how much of
it is right. The model, in PyTorch and by `transformers`, then learns to make likelier those answers
that were better than the others to the same question: group relative policy optimization (Shao et
al., DeepSeekMath, 2024). At the end of the step the engine gets the new weights, in place.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams

# A token for each number; one that ends an answer; one that asks: [ASK, 3] -> [2, 1, 0, END].
END, ASK = 10, 11
QUESTIONS = [[ASK, number] for number in range(2, 10)]


def expected_answer(question: list[int]) -> list[int]:
    """What would be right."""
    return [*reversed(range(question[1])), END]


def reward_of(question: list[int], answer: list[int]) -> float:
    """The share of an answer that is right, up to its first mistake."""
    expected = expected_answer(question)
    num_right = 0
    while num_right < min(len(answer), len(expected)) and answer[num_right] == expected[num_right]:
        num_right += 1
    return num_right / len(expected)


def make_model() -> Qwen3ForCausalLM:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=12,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).float()


def token_logprobs(model: torch.nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """`[rows, longest answer]`: the log-probability of each token of answers padded on the right,
    where a causal model cannot see it while it reads what is before.
    """
    ids = torch.cat((prompts, answers), dim=1)
    logits = model(ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
    return logits.log_softmax(-1).gather(2, answers[..., None]).squeeze(2)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Train; returns of each step the mean reward, and how far engine and trainer are apart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--answers", type=int, default=32, help="to each question, in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--plot", help="a file for a picture of the reward")
    args = parser.parse_args(argv)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        llm = LLM(directory, max_model_len=64, kvcache_block_size=16, device="cpu")
    params = SamplingParams(n=args.answers, temperature=1.0, max_tokens=12, logprobs=0)
    history: dict[str, list[float]] = {"reward": [], "difference": []}

    for step in range(args.steps):
        start = time.perf_counter()
        # 1. Rollouts.
        outputs = llm.generate(QUESTIONS, params, use_tqdm=False)
        rolled_out = time.perf_counter()

        # 2. Rewards. An answer's advantage is over the other answers to its question.
        prompts = [output.prompt_token_ids for output in outputs for _ in output.outputs]
        answers = [answer for output in outputs for answer in output.outputs]
        rewards = torch.tensor(
            [reward_of(*pair) for pair in zip(prompts, [a.token_ids for a in answers], strict=True)]
        )
        groups = rewards.view(len(QUESTIONS), args.answers)
        spread = groups.std(dim=1, keepdim=True) + 1e-3
        advantages = ((groups - groups.mean(dim=1, keepdim=True)) / spread).view(-1, 1)

        # 3. One step of the optimizer.
        ids = pad_sequence([torch.tensor(a.token_ids) for a in answers], batch_first=True)
        drawn = [[next(iter(top.values())) for top in answer.logprobs] for answer in answers]
        old = pad_sequence([torch.tensor(row) for row in drawn], batch_first=True)
        is_token = pad_sequence([torch.ones(len(row)) for row in drawn], batch_first=True)
        change = (token_logprobs(model, torch.tensor(prompts), ids) - old) * is_token
        # The ratio is 1, as engine and trainer have the same weights; its gradient is the policy's.
        loss = -(change.exp() * advantages * is_token).sum() / is_token.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trained = time.perf_counter()

        # 4. The engine goes on with the new weights.
        llm.load_weights(model.state_dict())
        history["reward"].append(rewards.mean().item())
        history["difference"].append(change.abs().max().item())
        if step % 10 == 0 or step == args.steps - 1:
            print(
                f"step {step:3}: reward {history['reward'][-1]:.3f}; rollouts "
                f"{rolled_out - start:.2f} s, training {trained - rolled_out:.2f} s, new weights "
                f"{time.perf_counter() - trained:.3f} s"
            )

    answer = llm.generate([[ASK, 9]], SamplingParams(temperature=0), use_tqdm=False)[0]
    print("counting down from 9:", answer.outputs[0].token_ids[:-1])
    llm.exit()
    if args.plot:
        draw(history["reward"], args.plot)
    return history


def draw(rewards: list[float], file: str) -> None:
    """Draw the mean reward of each step."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(rewards)
    axes.set(xlabel="step", ylabel="mean reward of the answers", ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.savefig(Path(file), dpi=110)


if __name__ == "__main__":
    main()
