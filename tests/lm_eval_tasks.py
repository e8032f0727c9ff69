"""Small tasks of our own for lm-evaluation-harness, one for each kind of request that it makes."""

from typing import Any

import datasets

FACTS = [
    ("The capital of France is", ["Paris", "Berlin", "Madrid", "Rome"]),
    ("The capital of Japan is", ["Tokyo", "Beijing", "Seoul", "Bangkok"]),
    ("The largest planet of the solar system is", ["Jupiter", "Mars", "Venus", "Mercury"]),
    ("Water is made of hydrogen and", ["oxygen", "iron", "helium", "carbon"]),
    ("The opposite of hot is", ["cold", "warm", "red", "fast"]),
    ("A week has seven", ["days", "hours", "months", "years"]),
    ("Bees make", ["honey", "milk", "paper", "cheese"]),
    ("The sun rises in the", ["east", "west", "north", "south"]),
    ("A triangle has three", ["sides", "circles", "wheels", "colours"]),
    ("The language spoken in Brazil is", ["Portuguese", "French", "German", "Dutch"]),
    ("Snow is usually the colour", ["white", "green", "purple", "black"]),
    ("A person who treats teeth is a", ["dentist", "pilot", "baker", "farmer"]),
]
TEXTS = [
    "The lighthouse stood at the end of the pier. Every evening the keeper climbed its stairs, lit "
    "the lamp, and wrote in a book what the wind was doing.",
    "A recipe for pancakes: mix two eggs with a cup of milk, add flour until the batter runs "
    "slowly from the spoon, and let it rest while the pan gets hot.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
    "Dear Anna, thank you for your letter. The garden has grown well this year; only the tomatoes "
    "did not like the rain. Come and see it before the leaves fall.",
    "One two three four five six seven eight nine ten. " * 12,  # longer than a window
]


def facts(**_: Any) -> dict[str, Any]:
    """Which of four words goes on: the right one is elsewhere in each question."""
    documents = []
    for number, (question, words) in enumerate(FACTS):
        place = number % 4
        choices = words[1 : place + 1] + words[:1] + words[place + 1 :]
        documents.append({"question": question, "choices": choices, "answer": place})
    return {"test": datasets.Dataset.from_list(documents)}


def texts(**_: Any) -> dict[str, Any]:
    """Texts whose perplexity is asked for."""
    return {"test": datasets.Dataset.from_list([{"text": text} for text in TEXTS])}


COMMON = {"test_split": "test", "output_type": "multiple_choice", "metadata": {}}
TASKS: list[dict[str, Any]] = [
    {
        **COMMON,
        "task": "small_facts",
        "custom_dataset": facts,
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    {
        **COMMON,
        "task": "small_texts",
        "custom_dataset": texts,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
    {
        **COMMON,
        "task": "small_answers",
        "custom_dataset": facts,
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[answer]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
]
