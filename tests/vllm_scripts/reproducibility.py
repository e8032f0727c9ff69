"""The same seed, the same texts: of the engine, and of single requests."""

import os
import random

from nanovllm import DEMO_MODEL, LLM, SamplingParams

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what a script may set for vLLM harms nothing

SEED = 42
PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]


def run(sampling_params: SamplingParams) -> list[str]:
    llm = LLM(model=DEMO_MODEL, seed=SEED)
    outputs = llm.generate(PROMPTS, sampling_params)
    return [output.outputs[0].text for output in outputs]


def main() -> None:
    unseeded = SamplingParams(temperature=1.5, top_p=0.95, max_tokens=12)
    first = run(unseeded)
    for prompt, text in zip(PROMPTS, first, strict=True):
        print(f"Prompt: {prompt!r}\nGenerated text: {text!r}")
    print(f"Runs with one engine seed agree: {first == run(unseeded)}")

    seeded = SamplingParams(temperature=1.5, max_tokens=12, seed=SEED)
    llm = LLM(model=DEMO_MODEL, seed=random.randrange(1000))
    texts = [llm.generate(PROMPTS[0], seeded)[0].outputs[0].text for _ in range(2)]
    print(f"Requests with one seed agree: {texts[0] == texts[1]}")


if __name__ == "__main__":
    main()
