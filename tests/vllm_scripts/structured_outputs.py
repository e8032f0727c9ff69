"""Answers of four forms: one of some words, a pattern, JSON of a pydantic model, a grammar."""

from enum import Enum

from pydantic import BaseModel, Field

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.sampling_params import StructuredOutputsParams


class Mood(str, Enum):
    good = "good"
    bad = "bad"
    mixed = "mixed"


class Review(BaseModel):
    title: str = Field(max_length=12)
    stars: int = Field(ge=1, le=5)
    mood: Mood


ARITHMETIC = """
root ::= sum
sum ::= term (("+" | "-") term)?
term ::= [0-9] | "(" sum ")"
"""


def main() -> None:
    llm = LLM(model=DEMO_MODEL, max_model_len=512)
    choice = StructuredOutputsParams(choice=["positive", "negative"])
    regex = StructuredOutputsParams(regex=r"[a-z]{2,8}@[a-z]{2,8}\.com")
    json = StructuredOutputsParams(
        json=Review.model_json_schema(), disable_additional_properties=True
    )
    grammar = StructuredOutputsParams(grammar=ARITHMETIC)
    questions = {
        "choice": ("Is this review positive? 'A good read.'", choice),
        "regex": ("Make up an e-mail address.", regex),
        "json": ("Review a book, as JSON.", json),
        "grammar": ("Write a sum of small numbers.", grammar),
    }
    prompts = [prompt for prompt, _ in questions.values()]
    params = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=200, structured_outputs=form)
        for _, form in questions.values()
    ]
    outputs = llm.generate(prompts, params)
    for name, output in zip(questions, outputs, strict=True):
        print(f"{name}: {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")


if __name__ == "__main__":
    main()
