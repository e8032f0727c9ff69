"""lm-evaluation-harness on this engine: its `lm_eval` command, with a model named `nanovllm`.

    pip install -e '.[lm-eval]'
    python examples/lm_eval_adapter.py --model nanovllm \
        --model_args pretrained=Qwen/Qwen3-0.6B,max_model_len=4096 --tasks arc_easy,gsm8k

The harness makes three kinds of requests. Two are log-probabilities of a given text, which are
those of a prompt's tokens; the third is a completion. Each kind is one `generate` call for all
requests of a task, and the engine makes batches of them.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanovllm import LLM, SamplingParams

Pair = tuple[Any, list[int], list[int]]  # what it is of, token ids of a context, of what follows
# Of the harness's options for a completion, those that SamplingParams has under the same names.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@register_model("nanovllm")
class NanoVLLM(TemplateLM):
    """An engine as the harness wants it."""

    def __init__(
        self, pretrained: str, batch_size: Any = None, max_batch_size: Any = None, **options: Any
    ) -> None:
        """pretrained: as `model` of LLM. options: those of LLM. Batch sizes do not matter here."""
        super().__init__()
        options.setdefault("max_num_batched_tokens", 4096)
        self.llm = LLM(pretrained, **options)
        self.tokenizer = self.llm.get_tokenizer()
        if self.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer, and the harness's tasks are texts")
        # A text to be scored is a prompt of one token more than the harness counts, for which the
        # last token is no input; and a prompt leaves room for one token that is drawn.
        self.max_length = self.llm.config.max_model_len - 2
        self.max_gen_toks = min(256, self.max_length // 2)

    # --- what the harness asks about a model ------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self.tokenizer.bos_token_id is None:
            return self.eot_token_id
        return self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness caches requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, with BOS if the tokenizer adds one and the text has none yet."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Make a text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- log-probabilities of a given text --------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each pair: the log-probability of what follows, and whether it is the greedy choice.

        A context that is too long loses its beginning.
        """
        prompts = [(context + rest)[-(self.max_length + 1) :] for _, context, rest in requests]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        results = []
        for (_, _, rest), output in zip(requests, outputs, strict=True):
            scored = [
                entry[token_id]
                for entry, token_id in zip(output.prompt_logprobs[-len(rest) :], rest, strict=True)
            ]
            is_greedy = all(logprob.rank == 1 for logprob in scored)
            results.append((sum(logprob.logprob for logprob in scored), is_greedy))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """For each text: the log-probability of all of it. A long one is cut into windows."""
        pairs: list[Pair] = []
        owners: list[int] = []  # whose window each pair is
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(pairs, disable_tqdm)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            totals[owner] += logprob
        return totals

    # --- completions ------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete each context, up to one of its stop strings."""
        prompts = []
        params = []
        for request in requests:
            context, asked = request.args
            options = normalize_gen_kwargs(asked, self.max_gen_toks)
            max_tokens = options["max_gen_toks"]
            prompts.append(self.tok_encode(context)[-(self.max_length - max_tokens) :])
            sampling = {name: options[name] for name in SAMPLING if name in options}
            params.append(SamplingParams(max_tokens=max_tokens, stop=options["until"], **sampling))
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    cli_evaluate()
