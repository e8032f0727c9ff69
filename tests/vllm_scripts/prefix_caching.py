"""The same prompts behind a long common text, without a prefix cache and with one."""

from nanovllm import DEMO_MODEL, LLM, SamplingParams

PREFIX = (
    "You are an expert school principal, skilled in effectively managing faculty and staff. Draft "
    "questions for a potential first grade teacher of an independent school, whose answers show "
    "what the lessons are like, how the children are encouraged, and how parents are informed. "
) * 2
PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is"]


def texts(outputs) -> list[str]:
    print("-" * 50)
    for output in outputs:
        print(f"Prompt: ...{output.prompt[-40:]!r}\nGenerated text: {output.outputs[0].text!r}")
        print(f"Cached: {output.num_cached_tokens} of {len(output.prompt_token_ids)} tokens")
    return [output.outputs[0].text for output in outputs]


def main() -> None:
    prompts = [PREFIX + prompt for prompt in PROMPTS]
    sampling_params = SamplingParams(temperature=0.0, max_tokens=16)

    regular_llm = LLM(model=DEMO_MODEL, gpu_memory_utilization=0.4, enable_prefix_caching=False)
    regular = texts(regular_llm.generate(prompts, sampling_params))
    del regular_llm

    prefix_cached_llm = LLM(
        model=DEMO_MODEL, enable_prefix_caching=True, gpu_memory_utilization=0.4, block_size=16
    )
    prefix_cached_llm.generate(prompts[0], sampling_params)  # to fill the cache
    outputs = prefix_cached_llm.generate(prompts, sampling_params)
    print(f"All hit: {all(output.num_cached_tokens > 0 for output in outputs)}")
    print(f"Generated answers are the same: {regular == texts(outputs)}")
    prefix_cached_llm.reset_prefix_cache()
    again = prefix_cached_llm.generate(prompts[0], sampling_params)[0]
    print(f"Cached after a reset: {again.num_cached_tokens}")


if __name__ == "__main__":
    main()
