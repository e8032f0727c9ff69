"""Each prompt with parameters of its own, in every form that a prompt has; log-probabilities."""

import argparse
import json

from nanovllm import DEMO_MODEL, LLM, SamplingParams, TextPrompt, TokensPrompt
from nanovllm.outputs import CompletionOutput, RequestOutput


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    return parser.parse_known_args()[0]


def main(args: argparse.Namespace) -> None:
    llm = LLM(
        model=args.model,
        tokenizer=args.model,
        tokenizer_mode="auto",
        trust_remote_code=False,
        tensor_parallel_size=1,
        dtype="auto",
        max_model_len=256,
        max_num_seqs=8,
        block_size=16,
        swap_space=0,
        enforce_eager=True,
        disable_log_stats=True,
        enable_chunked_prefill=True,
        max_logprobs=8,
    )
    tokenizer = llm.get_tokenizer()

    defaults = llm.get_default_sampling_params()
    defaults.max_tokens = args.max_tokens
    if args.temperature is not None:
        defaults.temperature = args.temperature
    if args.top_k is not None:
        defaults.top_k = args.top_k

    prompts = [
        "introduce yourself",
        TextPrompt(prompt="Write a haiku."),
        {"prompt": "What is 2 + 2?"},
        TokensPrompt(prompt_token_ids=tokenizer.encode("Say hello.")),
        {"prompt_token_ids": tokenizer.encode("Say goodbye.")},
    ]
    params = [
        defaults,
        SamplingParams(n=3, temperature=1.2, seed=7, max_tokens=10),
        SamplingParams(temperature=0.0, max_tokens=args.max_tokens, logprobs=3),
        SamplingParams(temperature=0.7, top_k=20, min_p=0.05, stop=["."], max_tokens=16),
        SamplingParams(max_tokens=5, min_tokens=5, ignore_eos=True, detokenize=False),
    ]
    outputs: list[RequestOutput] = llm.generate(prompts=prompts, sampling_params=params)

    for request in outputs:
        print(f"Request {request.request_id}: {request.prompt!r}, finished: {request.finished}")
        print(
            f"  {len(request.prompt_token_ids)} prompt tokens, {request.num_cached_tokens} cached"
        )
        for completion in request.outputs:
            show(completion)


def show(completion: CompletionOutput) -> None:
    print(f"  [{completion.index}] {completion.text!r}")
    print(f"      {len(completion.token_ids)} tokens, ended by {completion.finish_reason}", end="")
    print(f" ({completion.stop_reason})" if completion.stop_reason is not None else "")
    if completion.logprobs is None:
        return
    print(f"      cumulative log-probability {completion.cumulative_logprob:.3f}")
    for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        best = sorted(entry.items(), key=lambda item: item[1].rank)
        table = {each.decoded_token: round(each.logprob, 3) for _, each in best}
        print(f"      token {token_id} (rank {entry[token_id].rank}): {json.dumps(table)}")


if __name__ == "__main__":
    main(parse_args())
