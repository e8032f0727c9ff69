"""Complete a few texts, and print what was passed beside what came out."""

from nanovllm import DEMO_MODEL, LLM, SamplingParams

PROMPTS = [
    "introduce yourself",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]


def main() -> None:
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    llm = LLM(model=DEMO_MODEL)
    outputs = llm.generate(PROMPTS, sampling_params)
    print("\nGenerated outputs:\n" + "-" * 60)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt:    {prompt!r}")
        print(f"Output:    {generated_text!r}")
        print("-" * 60)


if __name__ == "__main__":
    main()
