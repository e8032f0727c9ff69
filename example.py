"""Chat with a model, once: apply its chat template to some prompts, generate, print.

With no argument it runs the demo checkpoint that comes with the package, on any machine:

    python example.py
    python example.py --model /path/to/Qwen3-0.6B --prompt "Why is the sky blue?" --max-tokens 512
"""

import argparse
import sys
import textwrap

from nanovllm import DEMO_MODEL, LLM, SamplingParams

PROMPTS = ["introduce yourself", "list all prime numbers within 100"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Generate completions for a few chat prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=DEMO_MODEL, help="local directory in Hugging Face format, or a hub id")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help=f"a user message; give it several times for several (default: {PROMPTS})",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        default=argparse.SUPPRESS,
        help="0 is greedy: always the likeliest token "
        "(default: 0 for the demo checkpoint, 0.6 for others)",
    )
    add("--max-tokens", type=int, default=256, metavar="N", help="longest completion, in tokens")
    ranks = "GPUs to split the model over"
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help=ranks)
    devices = ["auto", "cuda", "cpu"]
    add("--device", choices=devices, default="auto", help="auto: cuda if there is a GPU")
    add("--enforce-eager", action="store_true", help="run decode without CUDA graphs")
    return parser.parse_args(argv)


def show(label: str, text: str) -> None:
    """Print `text`, wrapped, with `label` in a left margin of its own."""
    lines = []
    for paragraph in text.strip().splitlines():
        lines += textwrap.wrap(paragraph, 96) or [""]
    for line in lines or ["(nothing)"]:
        print(f"{label:<12}{line}".rstrip())
        label = ""  # it stands beside the first line only


def main(argv: list[str] | None = None) -> None:
    """Ask the model what the command line says."""
    args = parse_args(argv)
    messages: list[str] = getattr(args, "prompt", PROMPTS)
    temperature: float = getattr(args, "temperature", 0.0 if args.model == DEMO_MODEL else 0.6)
    try:
        params = SamplingParams(temperature=temperature, max_tokens=args.max_tokens)
        llm = LLM(
            args.model,
            tensor_parallel_size=args.tensor_parallel_size,
            enforce_eager=args.enforce_eager,
            device=args.device,
        )
        if getattr(llm.tokenizer, "chat_template", None):
            chats = [[{"role": "user", "content": message}] for message in messages]
            outputs = llm.chat(chats, params)
        else:  # a base model continues the text
            outputs = llm.generate(messages, params)
    except ValueError as error:  # the message says what to change; a traceback would only hide it
        sys.exit(f"example.py: {error}")

    for message, output in zip(messages, outputs, strict=True):
        print()
        show("Prompt:", message)
        show("Completion:", output["text"])
        show("", f"[{len(output['token_ids'])} tokens, finish reason: {output['finish_reason']}]")
    llm.exit()


# Worker processes import this file: without the guard, each would start all over again.
if __name__ == "__main__":
    main()
