"""One conversation, then many at once, with a template's options and one that is passed."""

from nanovllm import DEMO_MODEL, LLM, SamplingParams

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


def print_outputs(outputs) -> None:
    print("\nGenerated outputs:\n" + "-" * 80)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}\n")
        print(f"Generated text: {output.outputs[0].text!r}")
        print("-" * 80)


def main() -> None:
    llm = LLM(model=DEMO_MODEL, enable_prefix_caching=True)
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = 24

    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I assist you today?"},
        {"role": "user", "content": "introduce yourself"},
    ]
    print_outputs(llm.chat(conversation, sampling_params, use_tqdm=False))

    # A list of them is a batch. Contents may come in parts, too.
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "list all prime numbers"}]}]
    print_outputs(llm.chat([conversation, in_parts], sampling_params=sampling_params))

    print_outputs(
        llm.chat(
            conversation,
            SamplingParams(temperature=0, max_tokens=8),
            use_tqdm=False,
            chat_template=TEMPLATE,
            chat_template_content_format="auto",
            add_generation_prompt=True,
            chat_template_kwargs={"enable_thinking": False},
        )
    )

    begun = [*conversation, {"role": "assistant", "content": "I am"}]
    print_outputs(
        llm.chat(
            begun,
            SamplingParams(temperature=0, max_tokens=8),
            add_generation_prompt=False,
            continue_final_message=True,
            tools=None,
        )
    )


if __name__ == "__main__":
    main()
