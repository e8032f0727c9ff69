"""Search for the likeliest completions of a few texts."""

from nanovllm import DEMO_MODEL, LLM
from nanovllm.sampling_params import BeamSearchParams

PROMPTS = [
    {"prompt": "introduce yourself"},
    {"prompt": "The capital of France is"},
]


def main() -> None:
    llm = LLM(model=DEMO_MODEL)
    params = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    outputs = llm.beam_search(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"Prompt: {prompt['prompt']!r}")
        for sequence in output.sequences:
            num_tokens = len(sequence.tokens)
            print(f"  {sequence.cum_logprob:.3f}, {num_tokens} tokens: {sequence.text!r}")


if __name__ == "__main__":
    main()
