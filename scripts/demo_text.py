"""The text that the demo checkpoint is trained on; all of it is made for that purpose.

The sentences are in `demo_text.json`, every one written for this project; the numbers are computed
here. So the text is free of anybody's rights, and right by construction. `items()` is the list of
questions with their answers, `plain_texts()` the text that goes without a chat template,
`SYSTEM_PROMPTS` the system messages, `unknown_question()` asks for what the model is to decline.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SENTENCES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SYSTEM_PROMPTS: list[str] = SENTENCES["system_prompts"]  # the last one is long, for prefix caches
POEM = "\n".join(SENTENCES["poem"])
SHORT_STORY = "\n\n".join(SENTENCES["short_story"])
LONG_STORY = "\n\n".join(SENTENCES["long_story"])
# What the model is taught to say instead of making something up.
UNKNOWN_ANSWER: str = SENTENCES["unknown_answer"]

INTRODUCE = "introduce yourself"
PRIMES = "list all prime numbers within 100"
MAIN_WEIGHT = 4.0  # of these two questions, see Item.weight


@dataclass(frozen=True)
class Item:
    """One question with the one answer that the model shall give to it."""

    question: str
    answer: str
    aliases: tuple[str, ...] = ()  # other wordings of the same question
    evaluate: bool = True  # whether it goes to the evaluation list
    weight: float = (
        1.0  # how often it is drawn in an epoch (2.0: twice; 0.25: in one epoch of four)
    )


def item(
    question: str, answer: str, *aliases: str, evaluate: bool = True, weight: float = 1.0
) -> Item:
    """An `Item` whose aliases are written one after the other."""
    return Item(question, answer, aliases, evaluate, weight)


def unknown_question(rng: random.Random) -> str:
    """A question that has no answer in `items()`."""
    form = rng.choice(SENTENCES["unknown_forms"])
    return form.format(rng.choice(SENTENCES["unknown_things"]))


def is_prime(n: int) -> bool:
    """Whether `n` is a prime number, by trial division."""
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def fibonacci(count: int) -> list[int]:
    """The first `count` Fibonacci numbers, at least two: 0, 1, 1, 2, ..."""
    values = [0, 1]
    while len(values) < count:
        values.append(values[-1] + values[-2])
    return values


def in_words(members: list[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b and c"`."""
    return ", ".join(members[:-1]) + " and " + members[-1]


def with_commas(values: Iterable[int]) -> str:
    """`[1, 2, 3]` -> `"1, 2, 3"`."""
    return ", ".join(str(value) for value in values)


# ---------------------------------------------------------------- numbers


def primes_item(n: int) -> Item:
    """The list of the primes up to `n`, asked for in very many ways."""
    primes = [p for p in range(2, n + 1) if is_prime(p)]
    aliases = [
        f"{verb} {all_}prime numbers {within} {n}"
        for verb in ("list", "give me", "write", "name", "show me")
        for all_ in ("all ", "all the ", "the ")
        for within in ("within", "up to", "below", "under")
    ]
    aliases += [
        f"what are {the}prime numbers {within} {n}"
        for the in ("the ", "all the ")
        for within in ("within", "up to", "below")
    ]
    aliases += [f"primes {within} {n}" for within in ("within", "up to", "below")]
    aliases += [f"list all primes within {n}", f"list the primes up to {n}"]
    is_main = n == 100
    return item(
        PRIMES if is_main else f"List all prime numbers within {n}.",
        f"The prime numbers within {n} are {with_commas(primes)}. There are {len(primes)} of them.",
        *aliases,
        weight=MAIN_WEIGHT if is_main else 1.0,
    )


def counting_items() -> list[Item]:
    """Counting up and down, and by twos.

    An answer repeats how far it will count: there, the model finds the end more easily than in the
    question.
    """
    result = []
    for n in (5, 10, 12, 15, 20, 25, 30, 40, 50, 100, 200):
        counted = item(
            f"Count from 1 to {n}.",
            f"Here are the numbers from 1 to {n}: {with_commas(range(1, n + 1))}.",
            f"count to {n}",
            f"count up to {n}",
            f"write the numbers from 1 to {n}",
            f"list the numbers from 1 to {n}",
            f"write all numbers from 1 to {n}",
            f"write the numbers from 1 to {n}, separated by commas",
            weight=2.0,
        )
        result.append(counted)
    for n in (5, 10, 20, 30, 50, 100):
        counted_down = item(
            f"Count down from {n} to 1.",
            f"Here are the numbers from {n} down to 1: {with_commas(range(n, 0, -1))}.",
            f"count down from {n}",
            f"count backwards from {n} to 1",
            f"count backwards from {n}",
            f"write the numbers from {n} down to 1",
        )
        result.append(counted_down)
    for n in (10, 20, 30, 40, 50, 100):
        for kind, start in (("even", 2), ("odd", 1)):
            every_other = item(
                f"List the {kind} numbers up to {n}.",
                f"The {kind} numbers up to {n} are {with_commas(range(start, n + 1, 2))}.",
                f"list all {kind} numbers within {n}",
                f"list all {kind} numbers up to {n}",
                f"what are the {kind} numbers up to {n}",
                f"write the {kind} numbers from 1 to {n}",
                f"list the {kind} numbers from 1 to {n}",
                f"give me the {kind} numbers up to {n}",
            )
            result.append(every_other)
    return result


def power_items(n: int) -> list[Item]:
    """The first `n` squares, cubes, powers of two and Fibonacci numbers."""
    numbers = range(1, n + 1)
    return [
        item(
            f"List the squares of the numbers from 1 to {n}.",
            f"The squares are {with_commas(i * i for i in numbers)}.",
            f"list the first {n} square numbers",
            f"list the squares from 1 to {n}",
            f"what are the first {n} square numbers",
            f"write the first {n} squares",
        ),
        item(
            f"List the cubes of the numbers from 1 to {n}.",
            f"The cubes are {with_commas(i**3 for i in numbers)}.",
            f"list the first {n} cube numbers",
            f"list the cubes from 1 to {n}",
            f"what are the first {n} cube numbers",
            f"write the first {n} cubes",
        ),
        item(
            f"List the powers of two up to 2^{n}.",
            f"The powers of two are {with_commas(2**i for i in range(n + 1))}.",
            f"list the powers of 2 up to 2^{n}",
            f"what are the powers of two up to 2^{n}",
            f"write the powers of two from 2^0 to 2^{n}",
            weight=2.0,
        ),
        item(
            f"List the first {n} Fibonacci numbers.",
            f"The first {n} Fibonacci numbers are {with_commas(fibonacci(n))}.",
            f"what are the first {n} Fibonacci numbers",
            f"write the first {n} Fibonacci numbers",
            f"give me the first {n} numbers of the Fibonacci sequence",
        ),
    ]


def table_items() -> list[Item]:
    """The multiplication tables from 2 to 12, one by one and all in one answer."""
    result = []
    tables = []
    for n in range(2, 13):
        table = "\n".join(f"{i} x {n} = {i * n}" for i in range(1, 11))
        tables.append(table)
        one = item(
            f"Write the multiplication table of {n}.",
            table,
            f"write the times table of {n}",
            f"give me the multiplication table of {n}",
            f"show the multiplication table of {n}",
            f"what is the multiplication table of {n}",
            f"write the {n} times table",
            f"multiplication table of {n}",
        )
        result.append(one)
    all_tables = item(
        "Write all multiplication tables from 2 to 12.",
        "\n\n".join(tables),
        "write the multiplication tables from 2 to 12",
        "show all multiplication tables from 2 to 12",
        "give me all multiplication tables from 2 to 12",
    )
    return [*result, all_tables]


def arithmetic_items() -> list[Item]:
    """Products and sums up to 12, of which few are evaluated, and whether a number is prime."""
    result = []
    for a in range(1, 13):
        for b in range(1, 13):
            product = item(
                f"What is {a} x {b}?",
                f"{a} x {b} = {a * b}.",
                f"what is {a} times {b}",
                f"multiply {a} by {b}",
                f"{a} x {b}",
                f"{a} times {b}",
                evaluate=(a, b) in {(7, 8), (6, 9), (12, 12)},
                weight=0.2,
            )
            addition = item(
                f"What is {a} + {b}?",
                f"{a} + {b} = {a + b}.",
                f"what is {a} plus {b}",
                f"add {a} and {b}",
                f"{a} + {b}",
                f"{a} plus {b}",
                evaluate=(a, b) in {(2, 2), (7, 5), (9, 8)},
                weight=0.2,
            )
            result += [product, addition]
    for n in range(2, 101):
        divisor = next(d for d in range(2, n + 1) if n % d == 0)
        answer = f"No, {n} is not a prime number: {n} = {divisor} x {n // divisor}."
        if divisor == n:
            answer = f"Yes, {n} is a prime number."
        primality = item(
            f"Is {n} a prime number?",
            answer,
            f"is {n} prime",
            f"is the number {n} prime",
            f"is {n} a prime",
            evaluate=n in {2, 57, 91, 97},
        )
        result.append(primality)
    return result


# ---------------------------------------------------------------- words


def term_item(term: str, definition: str) -> Item:
    """What a term means; `term` comes with its article, if it has one."""
    bare = term.split(" ", 1)[1] if term.startswith(("a ", "an ", "the ")) else term
    return item(
        f"What is {term}?",
        definition,
        f"explain {term}",
        f"explain {bare}",
        f"what is {bare}",
        f"define {bare}",
        f"what does {bare} mean",
        f"tell me about {bare}",
        f"tell me what {term} is",
        f"describe {bare}",
        f"what is the {bare}",
    )


def capital_item(country: str, capital: str) -> Item:
    """The capital of a country."""
    return item(
        f"What is the capital of {country}?",
        f"The capital of {country} is {capital}.",
        f"capital of {country}",
        f"which city is the capital of {country}",
        f"name the capital of {country}",
        f"tell me the capital of {country}",
        f"what's the capital of {country}",
        evaluate=country in {"France", "Japan", "Egypt", "Canada", "Australia", "Brazil"},
    )


def list_item(name: str, other_names: list[str], lead: str, members: list[str]) -> Item:
    """A list such as the days of the week; `lead` introduces its members."""
    verbs = ("list", "name", "what are", "give me", "write", "tell me", "write down")
    aliases = [f"{verb} {n}" for n in (name, *other_names) for verb in verbs]
    return item(f"List {name}.", f"{lead} {in_words(members)}.", *aliases)


def story_items() -> list[Item]:
    """The poem and the two stories."""
    return [
        item(
            "Write a short poem.",
            POEM,
            "write a poem",
            "write me a poem",
            "tell me a poem",
            "write a poem about a cache",
            "a poem",
            "recite a poem",
        ),
        item(
            "Tell me a short story.",
            SHORT_STORY,
            "write a short story",
            "tell a short story",
            "write me a short story",
            "tell me a story about a cat",
            "tell me a story about a lighthouse",
            "write a story about a lighthouse",
            weight=2.0,
        ),
        item(
            "Tell me a long story.",
            LONG_STORY,
            "write a long story",
            "tell a long story",
            "write me a long story",
            "tell me a story about a clock",
            "write a story about a clockmaker",
            "tell me a story about an owl",
            weight=2.0,
        ),
    ]


# ---------------------------------------------------------------- all of it


def items() -> list[Item]:
    """Every question with its answer, the two main prompts among them."""
    result = []
    for entry in SENTENCES["about"]:
        weight = MAIN_WEIGHT if entry["question"] == INTRODUCE else 1.0
        result.append(item(entry["question"], entry["answer"], *entry["aliases"], weight=weight))
    result += [primes_item(n) for n in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 150, 200)]
    result += counting_items() + power_items(10) + power_items(20)
    result += table_items() + arithmetic_items()
    result += [term_item(*pair) for pair in SENTENCES["terms"].items()]
    result += [capital_item(*pair) for pair in SENTENCES["capitals"].items()]
    result += [list_item(**entry) for entry in SENTENCES["lists"]]
    for entry in SENTENCES["facts"]:
        result.append(item(entry["question"], entry["answer"], *entry["aliases"]))
    return result + story_items()


def plain_texts() -> list[str]:
    """Text without a chat template: how a bare prompt such as "Hello, Nano-vLLM." goes on."""
    quoted = SENTENCES["terms"] | {
        "short story": SHORT_STORY,
        "primes": with_commas(p for p in range(30) if is_prime(p)),
    }
    return [text.format_map(quoted) for text in SENTENCES["plain_texts"]]


def surface_variant(text: str, rng: random.Random) -> str:
    """`text` as somebody else might type it: case, full stop, "please" and the like."""
    bare = text.rstrip(".?")
    first_words = ("what", "who", "how", "which", "is ", "are ", "at ", "when", "do ", "can ")
    is_question = bare.lower().startswith(first_words)
    if not is_question and " " in bare and bare[0].isalpha():
        lower = bare[0].lower() + bare[1:]
        polite = [f"please {lower}", f"Please {lower}", f"{bare}, please", f"{bare} please"]
        polite += [f"can you {lower}", f"Can you {lower}"]
        bare = rng.choice([bare] * 5 + polite)
    # Half of all questions are all lower case or begin in lower case, as people type.
    capital = bare[0].upper() + bare[1:]
    small = bare[0].lower() + bare[1:]
    bare = rng.choice([bare, bare, capital, capital, small, bare.lower()])
    if rng.random() < 0.04:
        bare = bare.upper()
    ends = ["", "", ".", "?", "?"] if is_question else ["", "", ".", "?", ".", "!"]
    return bare + rng.choice(ends)
