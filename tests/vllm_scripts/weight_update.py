"""Reinforcement learning from feedback, in outline: rollouts, a step of training, new weights."""

import torch
from transformers import AutoModelForCausalLM

from nanovllm import DEMO_MODEL, LLM, SamplingParams

PROMPTS = ["The capital of France is", "What is paged attention?", "introduce yourself"]


def main() -> None:
    train_model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).float()
    llm = LLM(model=DEMO_MODEL, enable_sleep_mode=True, gpu_memory_utilization=0.4, seed=0)
    sampling_params = SamplingParams(temperature=0, max_tokens=8)

    def rollout(title: str) -> list[list[int]]:
        print("-" * 50)
        outputs = llm.generate(PROMPTS, sampling_params)
        for output in outputs:
            print(f"{title}\nPrompt: {output.prompt!r}\nGenerated: {output.outputs[0].text!r}")
        return [output.outputs[0].token_ids for output in outputs]

    before = rollout("Before training")
    llm.sleep(level=2)  # the trainer needs the memory
    with torch.no_grad():  # this stands for a step of the optimizer
        train_model.model.layers[-1].mlp.down_proj.weight.mul_(-3)

    llm.wake_up(tags=["weights"])
    llm.load_weights(train_model.named_parameters())
    llm.wake_up(tags=["kv_cache"])
    after = rollout("After training")
    print(f"Tokens have changed: {before != after}")

    # The other way round: all weights stay, and the cache of what they computed is dropped.
    llm.sleep(level=1)
    llm.wake_up()
    llm.reset_prefix_cache()
    print(f"Tokens are kept by a sleep: {rollout('After a sleep') == after}")

    # Only what is named changes, as trainers send one tensor after the other.
    original = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).float()
    name = "model.layers.3.mlp.down_proj.weight"
    llm.load_weights([(name, original.get_parameter(name))])
    print(f"Tokens are back: {rollout('With the old weights') == before}")


if __name__ == "__main__":
    main()
