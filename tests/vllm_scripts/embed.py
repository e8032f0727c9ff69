"""Embed a few texts, and find for each question the text that is nearest."""

from nanovllm import DEMO_MODEL, LLM, PoolingParams

texts = ["introduce yourself", "What is two plus two?", "The sky is blue.", "list prime numbers"]
questions = ["introduce yourself", "The sky is blue"]


def dot(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def main() -> None:
    llm = LLM(model=DEMO_MODEL, runner="pooling", enforce_eager=True)
    outputs = llm.embed(texts)
    for text, output in zip(texts, outputs, strict=True):
        embedding = output.outputs.embedding
        print(f"Prompt: {text!r}")
        print(f"Embedding: {embedding[:4]} ... of {len(embedding)}, {output.finished}")

    for question, output in zip(questions, llm.embed(questions), strict=True):
        scores = [dot(output.outputs.embedding, other.outputs.embedding) for other in outputs]
        nearest = max(range(len(texts)), key=scores.__getitem__)
        print(f"Nearest to {question!r}: {texts[nearest]!r} ({scores[nearest]:.3f})")

    (short,) = llm.embed(texts[0], pooling_params=PoolingParams(dimensions=32))
    print(
        f"Cut to {len(short.outputs.embedding)}, length {dot(*[short.outputs.embedding] * 2):.3f}"
    )


if __name__ == "__main__":
    main()
