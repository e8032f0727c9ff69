"""What quantisation costs: perplexity, and how far the predictions move, for each format.

    python scripts/quality.py                                  # the demo checkpoint
    python scripts/quality.py --model DIRECTORY --formats fp8 int4-64 --tokens 4096

The engine itself reads a text and predicts each of its tokens; nothing is sampled. Perplexity says
how well it does: e to the mean of -log p(token). The Kullback-Leibler divergence (KL) says how far
the predicted distributions are from those of the weights in 16 bits, whatever the text goes on
with. It is 0 for equal ones, and notices what perplexity averages out.

The text is Python's own language reference (`pydoc_data.topics`), so it depends on the Python that
runs this; --text takes another. INT4 weights are rounded to the nearest here, see
int4_checkpoint.py. Checkpoints of AWQ and GPTQ lose less.
"""

import argparse
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from int4_checkpoint import write_int4
from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.layers.linear import LinearBase
from nanovllm.models import head_size, model_class
from nanovllm.models.quantized_experts import ExpertMatrices
from nanovllm.models.sparse_moe import Experts
from nanovllm.models.weight_formats import choose_formats
from nanovllm.quantization.construction import formats_postponed
from nanovllm.quantization.read_scheme import read_scheme
from nanovllm.quantization.scheme import Scheme

CHARACTERS = 20  # more than any text has a token, on average
# Prompts are computed whole, and their last token is followed by one that nobody wants.
READ_ONLY = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)


@dataclass(frozen=True)
class Format:
    """One way to run the model."""

    name: str  # as printed
    options: dict[str, Any] = field(default_factory=dict)  # of the engine
    group_size: int | None = None  # of INT4 weights, which are made first


FORMATS = {
    "fp8-kv": Format("FP8 KV cache", {"kv_cache_dtype": "fp8"}),
    "fp8": Format("FP8 weights", {"quantization": "fp8"}),
    "fp8+kv": Format("FP8 weights, FP8 KV cache", {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
    "int4-32": Format("INT4 weights, groups of 32", group_size=32),
    "int4-64": Format("INT4 weights, groups of 64", group_size=64),
    "int4-128": Format("INT4 weights, groups of 128", group_size=128),
}


@dataclass(frozen=True)
class Sizes:
    """What a GPU holds, where the model runs in bfloat16."""

    bytes_per_weight: float  # of the linear layers, scales included
    model_bytes: int  # all parameters
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Quality:
    """What is printed of a format."""

    name: str
    sizes: Sizes
    perplexity: float
    divergences: Tensor  # [tokens]: KL from the reference's distributions
    agreement: float  # the share of tokens whose likeliest token is the reference's


# --- the text -------------------------------------------------------------------------------------


def read_text(file: str | None) -> str:
    """The file, or the chapters of Python's language reference by name."""
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
    return "\n".join(topics[name] for name in sorted(topics))


def make_prompts(llm: LLM, text: str, num_tokens: int, window: int) -> list[list[int]]:
    """Cut the first tokens of a text into prompts of so many tokens.

    Raises:
        ValueError: the text is shorter than one window.
    """
    tokenizer = llm.get_tokenizer()
    enough = text[: CHARACTERS * num_tokens]
    token_ids = tokenizer.encode(enough, add_special_tokens=False)[:num_tokens]
    if len(token_ids) < window:
        raise ValueError(
            f"the text has {len(token_ids)} tokens, and a window is {window}; "
            "pass a longer --text, or a smaller --window"
        )
    first = tokenizer.encode("")  # the token that texts begin with, if the model has one
    starts = range(0, len(token_ids) - window + 1, window)
    return [first + token_ids[start : start + window] for start in starts]


# --- reading it -----------------------------------------------------------------------------------


def predictions(llm: LLM, prompts: list[list[int]]) -> Iterator[Tensor]:
    """For each prompt, the log-probabilities `[tokens - 1, vocab]` of what follows each token but
    the last: float32, on the CPU.

    The engine has no such output: as dicts they would take minutes. So we listen where it computes
    its logits.
    """
    model = llm.model_runner.model
    compute_logits = model.compute_logits
    logits: list[Tensor] = []

    def listening(normed: Any) -> Tensor:
        logits.append(compute_logits(normed))
        return logits[-1]

    model.compute_logits = listening  # type: ignore[method-assign]
    for prompt in prompts:
        logits.clear()
        llm.generate([prompt], READ_ONLY, use_tqdm=False)
        rows = torch.cat(logits)
        # The last row is of the token that is drawn; a prompt in chunks would have several such.
        assert len(rows) == len(prompt), "a prompt was computed in more than one step"
        yield rows[:-1].float().log_softmax(-1).cpu()
    model.compute_logits = compute_logits  # type: ignore[method-assign]


@dataclass(frozen=True)
class Reading:
    """How a format predicts the text."""

    sizes: Sizes
    losses: Tensor  # [tokens]: -log p of the text's own tokens
    log_probs: list[Tensor]  # of each prompt, see `predictions`


def read_prompts(llm: LLM, prompts: list[list[int]]) -> Reading:
    """Have the engine predict all tokens of the prompts but each first one."""
    log_probs = list(predictions(llm, prompts))
    losses = [
        -rows.gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
        for rows, prompt in zip(log_probs, prompts, strict=True)
    ]
    return Reading(sizes_of(llm.config), torch.cat(losses), log_probs)


def compare(name: str, reading: Reading, reference: Reading) -> Quality:
    """Hold a format's distributions against those of the reference."""
    divergences = []
    num_same = 0
    for ours, theirs in zip(reading.log_probs, reference.log_probs, strict=True):
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
        num_same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return Quality(
        name=name,
        sizes=reading.sizes,
        perplexity=reading.losses.mean().exp().item(),
        divergences=torch.cat(divergences),
        agreement=num_same / len(reading.losses),
    )


# --- sizes ----------------------------------------------------------------------------------------


def sizes_of(config: Config) -> Sizes:
    """Count what a GPU would hold of a model. On a CPU, which computes in float32, that differs."""
    with default_dtype(torch.bfloat16), torch.device("meta"):
        model = make_model(config, read_scheme(config.hf_config, config.quantization))
        in_16_bits = make_model(config, None)
    hf_config = config.hf_config
    numbers_per_token = 2 * hf_config.num_hidden_layers * hf_config.num_key_value_heads
    numbers_per_token *= head_size(hf_config)
    itemsize = 1 if config.kv_cache_dtype.itemsize == 1 else 2
    return Sizes(
        bytes_per_weight=nbytes(matrices(model)) / nbytes(matrices(in_16_bits)) * 2,
        model_bytes=nbytes(model.parameters()),
        kv_bytes_per_token=numbers_per_token * itemsize,
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have tensors be made in `dtype`."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def make_model(config: Config, scheme: Scheme | None) -> nn.Module:
    """The model, with parameters but no values in them."""
    with nullcontext() if scheme is None else formats_postponed():
        model = model_class(config.hf_config)(config.hf_config, config.max_model_len)
        if scheme is not None:
            choose_formats(model, scheme)
    return model


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of what is quantised, if anything is: linear layers and experts."""
    for module in model.modules():
        if isinstance(module, (LinearBase, Experts, ExpertMatrices)):
            for name, parameter in module.named_parameters(recurse=False):
                if name != "bias":
                    yield parameter


def nbytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors)


# --- all formats ----------------------------------------------------------------------------------


def read_formats(args: argparse.Namespace) -> Iterator[Quality]:
    """Read the text in 16 bits, then in each format that the command line names."""
    options = {
        "device": args.device,
        "dtype": args.dtype,
        "max_model_len": args.window + 2,  # a first token of the tokenizer's, and one more behind
        "max_num_seqs": 1,
    }
    llm = LLM(args.model, **options)
    prompts = make_prompts(llm, read_text(args.text), args.tokens, args.window)
    reference = read_prompts(llm, prompts)
    print(describe(llm, args, prompts), flush=True)
    llm.exit()
    yield compare("16 bits", reference, reference)
    for name in args.formats:
        how = FORMATS[name]
        with tempfile.TemporaryDirectory() as scratch:
            model = args.model
            if how.group_size is not None:
                model = str(write_int4(model, Path(scratch), how.group_size))
            llm = LLM(model, **options, **how.options)
        reading = read_prompts(llm, prompts)
        llm.exit()
        yield compare(how.name, reading, reference)


def describe(llm: LLM, args: argparse.Namespace, prompts: list[list[int]]) -> str:
    """What somebody would need to know to repeat it."""
    source = args.text
    if source is None:
        source = f"the language reference of Python {platform.python_version()}"
    dtype = str(llm.config.dtype).removeprefix("torch.")
    num_tokens = sum(len(prompt) - 1 for prompt in prompts)
    return (
        f"{Path(args.model).name} on {llm.config.device}, computed in {dtype}; {num_tokens} tokens "
        f"predicted, of {len(prompts)} pieces of {source}\n"
    )


COLUMNS = (
    "format",
    "bytes a weight",
    "model",
    "K and V of a token",
    "perplexity",
    "KL, mean",
    "KL, 99th percentile",
    "same likeliest token",
)


def row(quality: Quality) -> str:
    """A row of the table, in Markdown."""
    sizes = quality.sizes
    cells = (
        quality.name,
        f"{sizes.bytes_per_weight:.2f}",
        f"{sizes.model_bytes / 1e6:.1f} MB",
        f"{sizes.kv_bytes_per_token:,} bytes",
        f"{quality.perplexity:.3f}",
        f"{quality.divergences.mean():.5f}",
        f"{quality.divergences.quantile(0.99):.5f}",
        f"{quality.agreement:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what quantisation costs.")
    add = parser.add_argument
    add("--model", default=DEMO_MODEL, help="directory or hub id of a checkpoint in 16 bits")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME")
    add("--text", metavar="FILE", help="default: the language reference of this Python")
    add("--tokens", type=int, default=4096, help="read so many at most (default: 4096)")
    add("--window", type=int, default=512, help="tokens of a piece of the text (default: 512)")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--dtype", default="auto", help="auto: the checkpoint's, on a CPU float32")
    args = parser.parse_args(argv)
    if args.window < 2:
        parser.error(f"--window is {args.window}; it must be at least 2")
    return args


def main(argv: list[str] | None = None) -> list[Quality]:
    """Print the table, a row at a time; return what it shows."""
    args = parse_args(argv)
    qualities = []
    for quality in read_formats(args):
        if not qualities:
            print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        qualities.append(quality)
        print(row(quality), flush=True)
    return qualities


if __name__ == "__main__":
    main()
