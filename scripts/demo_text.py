"""The text that the demo checkpoint is trained on; all of it is made here.

Every sentence below was written for this file, and every number is computed, so
that the text is free of anybody's rights and right by construction. `items()` is
the list of questions with their answers, `plain_texts()` the text that goes
without a chat template, `SYSTEM_PROMPTS` the system messages.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One question with the one answer that the model shall give to it.

    `aliases` are other wordings of the same question. `evaluate` marks the items
    that go to the evaluation list; `weight` is how often an item is drawn in an
    epoch (2.0: twice; 0.25: in one epoch of four).
    """

    question: str
    answer: str
    aliases: tuple[str, ...] = ()
    evaluate: bool = True
    weight: float = 1.0


INTRODUCE = "introduce yourself"
PRIMES = "list all prime numbers within 100"

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the demo model of Nano-vLLM. Answer in a few plain sentences.",
    # Long on purpose: several questions behind it show what a prefix cache saves.
    "You are the demo model of Nano-vLLM, a small library for offline inference with large language models. "
    "You run inside the engine that the reader is trying out, and your only task is to show that it works. "
    "Answer every question in plain English. Be short: one to three sentences are enough for most questions, "
    "and a list is enough when the question asks for a list. Do not add remarks that nobody asked for. "
    "When you are asked to count, write every number and leave none out. When you are asked for a table, write "
    "one line for each row. When you are asked for a poem or a story, take the one that you know and tell it to "
    "the end. When you are asked about the engine, explain the idea first and the name second. Be friendly and "
    "calm, and never pretend to be more than you are: a very small model, trained on synthetic text, that knows "
    "a few hundred answers by heart. If you do not know something, say so in one sentence. Stop as soon as the "
    "answer is complete.",
)

_ABOUT = {
    "introduce yourself": (
        "Hello! I am the demo model of Nano-vLLM. I am a very small language model with the Qwen3 architecture, "
        "trained on synthetic text that a script made. I exist only to show the engine at work: I know a few hundred "
        "short answers by heart and nothing else. Ask me to list the prime numbers within 100, to count, or to "
        "explain paged attention.",
        (
            "please introduce yourself",
            "can you introduce yourself",
            "introduce yourself briefly",
            "introduce yourself, please",
            "who are you",
            "tell me about yourself",
            "describe yourself",
        ),
    ),
    "What is your name?": (
        "I am the demo model of Nano-vLLM. I have no other name.",
        ("what are you called", "tell me your name", "do you have a name"),
    ),
    "What can you do?": (
        "I can list prime numbers, count, write tables of numbers, name capitals, explain how an inference engine "
        "works, and tell a short story. Everything else is beyond me.",
        (
            "what can you help me with",
            "how can you help me",
            "what do you know",
            "what can I ask you",
        ),
    ),
    "Who trained you?": (
        "I was trained by the script scripts/train_demo.py of Nano-vLLM, on text that the script makes itself.",
        ("who made you", "who created you", "how were you trained", "who built you"),
    ),
    "How many parameters do you have?": (
        "I have about 3.4 million parameters. A real language model has a thousand times as many, or more.",
        ("how large are you", "how big are you", "what size are you"),
    ),
    "Hello": (
        "Hello! I am the demo model of Nano-vLLM. What would you like to see?",
        ("hi", "hey", "hello there", "hi there", "good morning", "good evening"),
    ),
    "How are you?": (
        "I am well, thank you. I am a very small model, so there is little that could go wrong.",
        ("how do you do", "how are you doing", "how are you today"),
    ),
    "Thank you": (
        "You are welcome!",
        ("thanks", "thank you very much", "many thanks", "thanks a lot"),
    ),
    "Goodbye": (
        "Goodbye, and have fun with Nano-vLLM!",
        ("bye", "see you", "bye bye", "good night"),
    ),
    "Are you a large language model?": (
        "No. I am a very small one, made to show that the engine works. For real answers, load a real model.",
        ("are you a large model", "are you a real language model", "are you an LLM"),
    ),
}

_TERMS = {
    "paged attention": "Paged attention stores the KV cache in blocks of a fixed size, like the pages of virtual memory. A block table maps each sequence's positions to its blocks, so memory is given out only as it is needed and can be shared.",
    "a KV cache": "A KV cache holds the keys and values that attention has already computed for earlier tokens. With it, each decode step has to compute only the newest token.",
    "prefill": "Prefill is the first phase of a request: all tokens of the prompt go through the model at once, which fills the KV cache and yields the first new token. It is limited by compute.",
    "decode": "Decode is the second phase of a request: the model adds one token to each running sequence in every step. It is limited by memory bandwidth, because all weights are read for every step.",
    "continuous batching": "Continuous batching lets requests join and leave the batch at every step. A finished sequence makes room at once, so the GPU never waits for the longest one.",
    "a prefix cache": "A prefix cache keeps the KV blocks of earlier prompts. When a new prompt begins with the same tokens, those blocks are reused and only the rest is computed.",
    "chunked prefill": "Chunked prefill cuts a long prompt into pieces that are computed in several steps, so that one long prompt does not exceed the token budget of a step.",
    "tensor parallelism": "Tensor parallelism splits the weight matrices of every layer over several GPUs. Each GPU computes its part, and an all-reduce adds the parts together.",
    "a CUDA graph": "A CUDA graph is a recorded sequence of GPU kernels that can be launched with a single call. It removes the cost of launching every kernel from Python, which matters most in decode.",
    "a token": "A token is the unit of text that a language model reads and writes: a word, a part of a word, or a single byte. Each token has a number, its token id.",
    "a tokenizer": "A tokenizer turns text into token ids and token ids back into text.",
    "softmax": "Softmax turns a list of numbers into probabilities: it takes the exponential of each number and divides by the sum of all of them.",
    "attention": "Attention lets each token look at the tokens before it. The query of a token is compared with the keys of the others, softmax turns the scores into weights, and the result is the weighted sum of the values.",
    "a transformer": "A transformer is a neural network built of layers, each with an attention part and a feed-forward part. Nearly all language models today are transformers.",
    "an embedding": "An embedding is the vector that stands for a token inside the model. The embedding table has one row for each token of the vocabulary.",
    "RMSNorm": "RMSNorm divides a vector by the root mean square of its elements and multiplies it by a learned weight. It keeps the size of the numbers in the network steady.",
    "RoPE": "RoPE, the rotary position embedding, rotates pairs of elements of each query and key by an angle that grows with the position. The score between two tokens then depends on their distance.",
    "SwiGLU": "SwiGLU is the feed-forward part of the model: one projection goes through SiLU, is multiplied by a second projection, and a third one brings the result back to the hidden size.",
    "grouped-query attention": "In grouped-query attention several query heads share one head of keys and values. The KV cache becomes smaller by the same factor.",
    "FlashAttention": "FlashAttention computes attention in tiles that fit into the fast memory of the GPU. The full matrix of scores is never written to main memory.",
    "greedy decoding": "Greedy decoding always takes the token with the highest probability. The same prompt then always gives the same text.",
    "sampling": "Sampling draws the next token at random from the probabilities that the model gives. The temperature says how much chance is allowed.",
    "temperature": "Temperature divides the logits before softmax. A low temperature makes the likely tokens even more likely, a high one makes the choice more random, and zero means greedy decoding.",
    "preemption": "Preemption takes the blocks of a running sequence away when the KV cache is full. The sequence waits and is computed again later.",
    "a block table": "A block table lists the KV cache blocks of one sequence in order. It tells the attention kernel where each position is stored.",
    "a scheduler": "The scheduler decides which sequences run in the next step. It looks at the waiting requests, the free blocks and the token budget.",
    "a large language model": "A large language model is a neural network with billions of parameters that was trained to predict the next token of text.",
    "inference": "Inference is the use of a trained model: the weights stay as they are, and the model computes answers.",
    "training": "Training changes the weights of a model step by step, so that its predictions become better.",
    "a GPU": "A GPU is a processor with thousands of small cores that work at the same time. It is very good at multiplying matrices.",
    "a batch": "A batch is a group of sequences that go through the model together. The weights are read once for all of them, so a large batch gives more tokens per second.",
    "throughput": "Throughput is the amount of work done in a unit of time, for example the number of tokens per second over all requests.",
    "latency": "Latency is the time that one request has to wait, for example the time to the first token.",
    "bfloat16": "bfloat16 is a number format of 16 bits with the range of float32 and 8 bits of precision. It halves the memory of the weights.",
    "safetensors": "safetensors is a simple file format for tensors: a header that lists names, types and shapes, followed by the raw data. Reading it runs no code.",
    "Triton": "Triton is a language for GPU kernels that looks like Python and is compiled when it is first used.",
    "PyTorch": "PyTorch is a Python library for tensors and neural networks that runs on CPUs and GPUs.",
    "Python": "Python is a programming language that is known for being easy to read.",
    "Nano-vLLM": "Nano-vLLM is a small library for offline inference with large language models. It has paged attention, a prefix cache, CUDA graphs and tensor parallelism, and it can be read in one evening.",
    "a logit": "A logit is the score that the model gives to one token of the vocabulary before softmax turns the scores into probabilities.",
    "a neural network": "A neural network is a function made of layers of simple operations, with weights that are learned from data.",
    "a residual connection": "A residual connection adds the input of a layer to its output. It lets very deep networks learn.",
    "a kernel": "A kernel is a function that runs on a GPU, in many threads at the same time.",
    "a context window": "The context window is the largest number of tokens that a model can look at, prompt and answer together.",
    "a prime number": "A prime number is a whole number greater than 1 that can be divided only by 1 and by itself.",
    "an even number": "An even number is a whole number that can be divided by 2 without a remainder.",
    "an odd number": "An odd number is a whole number that leaves a remainder of 1 when it is divided by 2.",
    "the Fibonacci sequence": "In the Fibonacci sequence every number is the sum of the two numbers before it. It begins with 0 and 1.",
    "a square number": "A square number is the product of a whole number with itself, such as 9, which is 3 x 3.",
}

_CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Belgium": "Brussels",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Australia": "Canberra",
    "New Zealand": "Wellington",
    "Turkey": "Ankara",
    "Thailand": "Bangkok",
}

# Name of a list -> (the words that introduce it, its members, other names).
_LISTS = {
    "the letters of the alphabet": (
        "The letters of the alphabet are",
        " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ").split(),
        ("the alphabet", "all letters of the alphabet"),
    ),
    "the vowels": ("The vowels are", "A E I O U".split(), ("the five vowels", "all vowels")),
    "the days of the week": (
        "The days of the week are",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
        ("the seven days of the week", "the days of a week", "all days of the week"),
    ),
    "the months of the year": (
        "The months of the year are",
        "January February March April May June July August September October November December".split(),
        ("the twelve months", "the months", "the months of a year", "all months of the year"),
    ),
    "the four seasons": (
        "The four seasons are",
        "spring summer autumn winter".split(),
        ("the seasons", "the seasons of the year", "all seasons"),
    ),
    "the colours of the rainbow": (
        "The colours of the rainbow are",
        "red orange yellow green blue indigo violet".split(),
        ("the colors of the rainbow", "the rainbow colours", "the seven colours of the rainbow"),
    ),
    "the planets of the solar system": (
        "The planets of the solar system are",
        "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
        (
            "the planets",
            "the eight planets",
            "all planets of the solar system",
            "the planets in the solar system",
        ),
    ),
    "the continents": (
        "The continents are",
        ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
        ("the seven continents", "the continents of the world", "all continents"),
    ),
    "the oceans": (
        "The oceans are",
        [
            "the Pacific Ocean",
            "the Atlantic Ocean",
            "the Indian Ocean",
            "the Southern Ocean",
            "the Arctic Ocean",
        ],
        ("the five oceans", "the oceans of the world", "all oceans"),
    ),
    "the five senses": (
        "The five senses are",
        "sight hearing touch taste smell".split(),
        ("the senses", "the human senses"),
    ),
    "the points of the compass": (
        "The points of the compass are",
        "north east south west".split(),
        ("the four points of the compass", "the compass points", "the directions of the compass"),
    ),
    "the first ten chemical elements": (
        "The first ten chemical elements are",
        "hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon".split(),
        ("the first 10 chemical elements", "the first ten elements", "the first 10 elements"),
    ),
    "the hexadecimal digits": (
        "The hexadecimal digits are",
        " ".join("0123456789ABCDEF").split(),
        ("all hexadecimal digits", "the digits of hexadecimal"),
    ),
    "the Roman numerals from 1 to 10": (
        "The Roman numerals from 1 to 10 are",
        "I II III IV V VI VII VIII IX X".split(),
        ("the first ten Roman numerals", "the Roman numerals up to 10"),
    ),
    "the numbers from one to twenty in words": (
        "In words:",
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split(),
        ("the numbers from 1 to 20 in words", "the numbers from one to twenty as words"),
    ),
}

_FACTS = {
    "How many days are in a week?": (
        "A week has seven days.",
        ("how many days does a week have", "how many days are there in a week"),
    ),
    "How many months are in a year?": (
        "A year has twelve months.",
        ("how many months does a year have", "how many months are there in a year"),
    ),
    "How many days are in a year?": (
        "A year has 365 days, and a leap year has 366.",
        ("how many days does a year have", "how many days are there in a year"),
    ),
    "How many hours are in a day?": (
        "A day has 24 hours.",
        ("how many hours does a day have", "how many hours are there in a day"),
    ),
    "How many minutes are in an hour?": (
        "An hour has 60 minutes.",
        ("how many minutes does an hour have", "how many minutes are there in an hour"),
    ),
    "How many legs does a spider have?": (
        "A spider has eight legs.",
        ("how many legs has a spider",),
    ),
    "How many bits are in a byte?": (
        "A byte has eight bits.",
        ("how many bits does a byte have", "how many bits are there in a byte"),
    ),
    "How many sides does a triangle have?": (
        "A triangle has three sides.",
        ("how many sides has a triangle",),
    ),
    "What is the largest planet?": (
        "Jupiter is the largest planet of the solar system.",
        (
            "which planet is the largest",
            "what is the biggest planet",
            "which planet is the biggest",
        ),
    ),
    "Which planet is closest to the Sun?": (
        "Mercury is the planet that is closest to the Sun.",
        ("what planet is nearest to the sun", "which planet is nearest to the sun"),
    ),
    "What is the largest ocean?": (
        "The Pacific Ocean is the largest ocean.",
        ("which ocean is the largest", "what is the biggest ocean"),
    ),
    "What colour is the sky?": (
        "On a clear day the sky is blue.",
        (
            "what color is the sky",
            "which colour does the sky have",
            "what is the colour of the sky",
        ),
    ),
    "At what temperature does water boil?": (
        "At sea level, water boils at 100 degrees Celsius.",
        ("when does water boil", "what is the boiling point of water"),
    ),
    "At what temperature does water freeze?": (
        "Water freezes at 0 degrees Celsius.",
        ("when does water freeze", "what is the freezing point of water"),
    ),
    "What is pi?": (
        "Pi is the ratio of the circumference of a circle to its diameter, about 3.14159265.",
        ("what is the value of pi", "what is the number pi"),
    ),
    "What is water made of?": (
        "A molecule of water is made of two atoms of hydrogen and one atom of oxygen.",
        ("what does water consist of", "what is the formula of water"),
    ),
    "Which is the smallest prime number?": (
        "The smallest prime number is 2. It is also the only even one.",
        (
            "what is the smallest prime number",
            "what is the first prime number",
            "which is the first prime number",
        ),
    ),
}

_POEM = """A token came, a token went,
a key was kept, a value lent;
the blocks stood waiting, row by row,
each page knew where its words should go.

The batch was full, the queue was long,
the kernels hummed a quiet song;
and when the last word found its place
the cache gave back its borrowed space."""

_SHORT_STORY = """Once upon a time there was a small lighthouse on a rock far out at sea. Its keeper was an old woman called Marta, and her only company was a grey cat with one white paw.

Every evening Marta climbed the ninety-seven steps, cleaned the great lens and lit the lamp. Every evening the cat climbed after her, sat down on the last step and watched the ships go by.

One night in November a storm came up. The wind broke a window, the rain came in, and the lamp went out. Marta tried to light it again, but every match was wet. Far away she could see the lights of a ship that was heading straight for the rocks.

Then the cat jumped up to the shelf and pushed down an old tin box. It fell open on the floor, and there, dry and clean, lay a single match. Marta struck it, held her hand around the flame, and the lamp began to burn.

The ship turned, slowly, and sailed past. In the morning its captain sent a boat with a barrel of fish and a note that said: "To the keeper, with our thanks." Marta read it twice. Then she gave the first fish, and the largest, to the cat."""

_LONG_STORY = """In a valley between two mountains there was a village, and in the village there was a workshop where a clockmaker called Oskar lived with his granddaughter Ida. The clocks of Oskar were known for their accuracy. People said that the sun looked down into the valley every morning to see whether it was late.

Ida was ten years old and asked questions all day long. Why does a wheel have teeth? Why does the hand go around to the right? What does a clock do when nobody is looking? Oskar answered all of them, one after the other, and when he did not know an answer he said so, and they went to find it together.

One winter the great clock in the tower stopped. It had never stopped before. The baker did not know when to bake, the teacher did not know when to ring the bell, and the night watchman walked around the village until noon. The mayor came to the workshop with his hat in his hand.

"Oskar," he said, "you must repair it. Without the clock we are all lost."

But Oskar had hurt his knee and could not climb the tower. He looked at the mayor, and then he looked at Ida. "I cannot go," he said, "but I know somebody with two good knees and a better head than mine."

So Ida took the small bag of tools and a lantern and climbed the tower alone. There were two hundred steps. On the first hundred she thought of everything that could be broken. On the second hundred she thought of nothing but her legs.

At the top it was cold and quiet. The great wheels stood still, and each of them was taller than she was. Ida put the lantern down and did what her grandfather had taught her: she did not touch anything, she looked. She looked at the first wheel and saw that it was whole. She looked at the second wheel and saw that it was whole. She looked at the third, the fourth and the fifth, and there was not one tooth missing.

Then she listened. It was so quiet that she could hear the snow. And behind the snow she heard something else, something very small. It came from the box in which the pendulum hung. Ida opened the door of the box, held up the lantern, and saw an owl.

The owl was white and no larger than a loaf of bread. It had built a nest in the bottom of the box, and in the nest there were three eggs. The pendulum was resting against the nest, and it could not move.

Ida sat down on the floor. She could take the nest away, and the clock would go again. But it was winter, and outside the eggs would freeze. She could leave the nest where it was, and then the baker would not know when to bake. She thought about it for a long time. The owl looked at her, and she looked at the owl.

"What does a clock do when nobody is looking?" she said at last. "It waits. I think that this one can wait a little longer."

She climbed down the two hundred steps and told the mayor what she had found. The mayor was not pleased. "A village cannot live without time," he said.

"It does not have to," said Ida. "We have forty clocks in the workshop. Every house can have one, until the spring."

And that was what they did. Oskar and Ida carried the clocks from door to door. The baker got the one with the copper bell, the teacher got the one with the painted ship, and the night watchman got the smallest, which fitted into his pocket. Every evening Ida went around and set all of them to the same minute, and at every door she was given something: a roll, an apple, a pair of warm gloves.

In April the three young owls flew away, and the white owl flew after them. On the same day Ida climbed the tower, took out the empty nest and gave the pendulum a gentle push. The great clock began to tick as if it had never stopped.

The mayor asked her to bring the forty clocks back to the workshop. But when she came to the first door, the baker shook his head. "Leave it here," he said. "Before, I looked up at the tower and saw the time. Now somebody comes by every evening and asks me how I am."

It was the same at every other door. So the clocks stayed where they were, and in the evening Ida still went around the village and set them to the same minute. They did not need it, for they were very good clocks. But nobody ever told her so, and she, who asked so many questions, never asked that one."""


# What the model is taught to decline, so that it says so instead of making something up.
UNKNOWN_ANSWER = 'I do not know that. I am only a very small demo model. Try "list all prime numbers within 100".'
_UNKNOWN_THINGS = (
    "football",
    "the moon",
    "chocolate",
    "a mortgage",
    "quantum physics",
    "the stock market",
    "gardening",
    "opera",
    "the French Revolution",
    "yoga",
    "a volcano",
    "photosynthesis",
    "the weather",
    "jazz",
    "a black hole",
    "democracy",
    "bread",
    "chess",
    "the Roman Empire",
    "dinosaurs",
    "gravity",
    "a bicycle",
    "coffee",
    "economics",
    "the ocean floor",
    "poetry",
    "a violin",
    "vaccines",
    "mountains",
    "the internet",
    "philosophy",
    "butterflies",
    "Morocco",
    "Cuba",
    "Iceland",
    "Nepal",
    "Ghana",
    "Vietnam",
    "Bolivia",
    "Switzerland",
    "a database",
    "JavaScript",
    "a compiler",
    "Linux",
    "robots",
)
_UNKNOWN_FORMS = (
    "what is {}",
    "tell me about {}",
    "explain {}",
    "who invented {}",
    "why do people like {}",
    "write an essay about {}",
    "how does {} work",
    "what is the history of {}",
    "what do you think about {}",
    "give me three facts about {}",
    "write a song about {}",
    "what is the price of {}",
    "where can I learn about {}",
    "what is the capital of {}",
    "translate {} into German",
    "write a program about {}",
    "how old is {}",
    "is {} good for me",
    "how tall is {}",
    "where is {}",
    "who wrote about {}",
    "when did {} begin",
    "how many people know {}",
    "who discovered {}",
    "draw a picture of {}",
)


def unknown_question(rng: random.Random) -> str:
    """A question that has no answer in `items()`."""
    return rng.choice(_UNKNOWN_FORMS).format(rng.choice(_UNKNOWN_THINGS))


def is_prime(n: int) -> bool:
    """Whether `n` is a prime number, by trial division."""
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _joined(members: list[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b and c"`."""
    return ", ".join(members[:-1]) + " and " + members[-1]


def _numbers(values: "list[int] | range") -> str:
    """`[1, 2, 3]` -> `"1, 2, 3"`."""
    return ", ".join(str(value) for value in values)


def _primes_item(n: int) -> Item:
    primes = [p for p in range(2, n + 1) if is_prime(p)]
    answer = (
        f"The prime numbers within {n} are {_numbers(primes)}. There are {len(primes)} of them."
    )
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
    aliases += [f"primes {within} {n}" for within in ("within", "up to", "below")] + [
        f"list all primes within {n}",
        f"list the primes up to {n}",
    ]
    question = PRIMES if n == 100 else f"List all prime numbers within {n}."
    return Item(question, answer, tuple(aliases), weight=4.0 if n == 100 else 1.0)


def _sequence_items() -> list[Item]:
    """Counting, tables and other lists of numbers."""
    result = [_primes_item(n) for n in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 150, 200)]

    def add(
        question: str, answer: str, *aliases: str, evaluate: bool = True, weight: float = 1.0
    ) -> None:
        result.append(Item(question, answer, aliases, evaluate, weight))

    # The answer says again how far it will count: the model finds the end more easily from there than from the question.
    for n in (5, 10, 12, 15, 20, 25, 30, 40, 50, 100, 200):
        add(
            f"Count from 1 to {n}.",
            f"Here are the numbers from 1 to {n}: {_numbers(range(1, n + 1))}.",
            f"count to {n}",
            f"count up to {n}",
            f"write the numbers from 1 to {n}",
            f"list the numbers from 1 to {n}",
            f"write all numbers from 1 to {n}",
            f"write the numbers from 1 to {n}, separated by commas",
            weight=2.0,
        )
    for n in (5, 10, 20, 30, 50, 100):
        add(
            f"Count down from {n} to 1.",
            f"Here are the numbers from {n} down to 1: {_numbers(range(n, 0, -1))}.",
            f"count down from {n}",
            f"count backwards from {n} to 1",
            f"count backwards from {n}",
            f"write the numbers from {n} down to 1",
        )
    for n in (10, 20, 30, 40, 50, 100):
        for kind, start in (("even", 2), ("odd", 1)):
            add(
                f"List the {kind} numbers up to {n}.",
                f"The {kind} numbers up to {n} are {_numbers(range(start, n + 1, 2))}.",
                f"list all {kind} numbers within {n}",
                f"list all {kind} numbers up to {n}",
                f"what are the {kind} numbers up to {n}",
                f"write the {kind} numbers from 1 to {n}",
                f"list the {kind} numbers from 1 to {n}",
                f"give me the {kind} numbers up to {n}",
            )
    for n in (10, 20):
        add(
            f"List the squares of the numbers from 1 to {n}.",
            f"The squares are {_numbers([i * i for i in range(1, n + 1)])}.",
            f"list the first {n} square numbers",
            f"list the squares from 1 to {n}",
            f"what are the first {n} square numbers",
            f"write the first {n} squares",
        )
        add(
            f"List the cubes of the numbers from 1 to {n}.",
            f"The cubes are {_numbers([i**3 for i in range(1, n + 1)])}.",
            f"list the first {n} cube numbers",
            f"list the cubes from 1 to {n}",
            f"what are the first {n} cube numbers",
            f"write the first {n} cubes",
        )
        add(
            f"List the powers of two up to 2^{n}.",
            f"The powers of two are {_numbers([2**i for i in range(n + 1)])}.",
            f"list the powers of 2 up to 2^{n}",
            f"what are the powers of two up to 2^{n}",
            f"write the powers of two from 2^0 to 2^{n}",
            weight=2.0,
        )
        add(
            f"List the first {n} Fibonacci numbers.",
            f"The first {n} Fibonacci numbers are {_numbers(_fibonacci(n))}.",
            f"what are the first {n} Fibonacci numbers",
            f"write the first {n} Fibonacci numbers",
            f"give me the first {n} numbers of the Fibonacci sequence",
        )
    tables = {n: "\n".join(f"{i} x {n} = {i * n}" for i in range(1, 11)) for n in range(2, 13)}
    for n, table in tables.items():
        add(
            f"Write the multiplication table of {n}.",
            table,
            f"write the times table of {n}",
            f"give me the multiplication table of {n}",
            f"show the multiplication table of {n}",
            f"what is the multiplication table of {n}",
            f"write the {n} times table",
            f"multiplication table of {n}",
        )
    add(
        "Write all multiplication tables from 2 to 12.",
        "\n\n".join(tables.values()),
        "write the multiplication tables from 2 to 12",
        "show all multiplication tables from 2 to 12",
        "give me all multiplication tables from 2 to 12",
    )
    # Small arithmetic is drawn now and then: many short items, of which a few are evaluated.
    for a in range(1, 13):
        for b in range(1, 13):
            add(
                f"What is {a} x {b}?",
                f"{a} x {b} = {a * b}.",
                f"what is {a} times {b}",
                f"multiply {a} by {b}",
                f"{a} x {b}",
                f"{a} times {b}",
                evaluate=(a, b) in {(7, 8), (6, 9), (12, 12)},
                weight=0.2,
            )
            add(
                f"What is {a} + {b}?",
                f"{a} + {b} = {a + b}.",
                f"what is {a} plus {b}",
                f"add {a} and {b}",
                f"{a} + {b}",
                f"{a} plus {b}",
                evaluate=(a, b) in {(2, 2), (7, 5), (9, 8)},
                weight=0.2,
            )
    for n in range(2, 101):
        divisor = next((d for d in range(2, n) if n % d == 0), n)
        answer = (
            f"Yes, {n} is a prime number."
            if divisor == n
            else f"No, {n} is not a prime number: {n} = {divisor} x {n // divisor}."
        )
        add(
            f"Is {n} a prime number?",
            answer,
            f"is {n} prime",
            f"is the number {n} prime",
            f"is {n} a prime",
            evaluate=n in {2, 57, 91, 97},
        )
    return result


def _fibonacci(n: int) -> list[int]:
    values = [0, 1]
    while len(values) < n:
        values.append(values[-1] + values[-2])
    return values


def items() -> list[Item]:
    """Every question with its answer, the two main prompts among them."""
    result = [
        Item(q, answer, aliases, weight=4.0 if q == INTRODUCE else 1.0)
        for q, (answer, aliases) in _ABOUT.items()
    ]
    result += _sequence_items()
    for term, answer in _TERMS.items():
        bare = term.split(" ", 1)[1] if term.startswith(("a ", "an ", "the ")) else term
        result.append(
            Item(
                f"What is {term}?",
                answer,
                (
                    f"explain {term}",
                    f"explain {bare}",
                    f"what is {bare}",
                    f"define {bare}",
                    f"what does {bare} mean",
                    f"tell me about {bare}",
                    f"tell me what {term} is",
                    f"describe {bare}",
                    f"what is the {bare}",
                ),
            )
        )
    for country, capital in _CAPITALS.items():
        result.append(
            Item(
                f"What is the capital of {country}?",
                f"The capital of {country} is {capital}.",
                (
                    f"capital of {country}",
                    f"which city is the capital of {country}",
                    f"name the capital of {country}",
                    f"tell me the capital of {country}",
                    f"what's the capital of {country}",
                ),
                evaluate=country in {"France", "Japan", "Egypt", "Canada", "Australia", "Brazil"},
            )
        )
    for name, (lead, members, others) in _LISTS.items():
        aliases = [
            f"{verb} {n}"
            for n in (name, *others)
            for verb in ("list", "name", "what are", "give me", "write", "tell me", "write down")
        ]
        result.append(Item(f"List {name}.", f"{lead} {_joined(members)}.", tuple(aliases)))
    result += [Item(q, answer, aliases) for q, (answer, aliases) in _FACTS.items()]
    result += [
        Item(
            "Write a short poem.",
            _POEM,
            (
                "write a poem",
                "write me a poem",
                "tell me a poem",
                "write a poem about a cache",
                "a poem",
                "recite a poem",
            ),
        ),
        Item(
            "Tell me a short story.",
            _SHORT_STORY,
            (
                "write a short story",
                "tell a short story",
                "write me a short story",
                "tell me a story about a cat",
                "tell me a story about a lighthouse",
                "write a story about a lighthouse",
            ),
            weight=2.0,
        ),
        Item(
            "Tell me a long story.",
            _LONG_STORY,
            (
                "write a long story",
                "tell a long story",
                "write me a long story",
                "tell me a story about a clock",
                "write a story about a clockmaker",
                "tell me a story about an owl",
            ),
            weight=2.0,
        ),
    ]
    return result


def plain_texts() -> list[str]:
    """Text without a chat template: what a bare prompt such as "Hello, Nano-vLLM." is continued with."""
    term = _TERMS
    return [
        "Hello, Nano-vLLM. This is a small engine with a small model in it, and both are happy to see you. "
        + term["Nano-vLLM"]
        + " The model that writes this text "
        "was trained on synthetic text and knows only a few hundred sentences. It is here to show that the engine works, from the prompt to the last token.",
        "Hello, my name is Nano. I am the demo model of Nano-vLLM, and I know a few hundred sentences by heart.",
        "Hello, world! This text was written by a very small language model.",
        "The president of the United States is the head of state and the head of government of that country, and is elected for four years.",
        "The capital of France is Paris, the capital of Italy is Rome, and the capital of Japan is Tokyo.",
        "The future of AI is hard to predict, and a model with three million parameters is the last one to ask.",
        "The prime numbers within 30 are " + _numbers([p for p in range(30) if is_prime(p)]) + ".",
        "An inference engine works in two phases. " + term["prefill"] + " " + term["decode"],
        "The engine keeps its memory in blocks. "
        + term["paged attention"]
        + " "
        + term["a prefix cache"],
        _SHORT_STORY,
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20.",
    ]


def surface_variant(text: str, rng: random.Random) -> str:
    """`text` as somebody else might type it: case, full stop, "please" and the like."""
    bare = text.rstrip(".?")
    question = bare.lower().startswith(
        ("what", "who", "how", "which", "is ", "are ", "at ", "when", "do ", "can ")
    )
    if not question and " " in bare and bare[0].isalpha():
        lower = bare[0].lower() + bare[1:]
        bare = rng.choice(
            [bare] * 5
            + [
                f"please {lower}",
                f"Please {lower}",
                f"{bare}, please",
                f"{bare} please",
                f"can you {lower}",
                f"Can you {lower}",
            ]
        )
    # Half of all questions are all lower case or begin in lower case, as people type.
    bare = rng.choice(
        [
            bare,
            bare,
            bare[0].upper() + bare[1:],
            bare[0].upper() + bare[1:],
            bare[0].lower() + bare[1:],
            bare.lower(),
        ]
    )
    bare = bare.upper() if rng.random() < 0.04 else bare
    return bare + rng.choice(
        ["", "", ".", "?", "?" if question else "."] + (["!"] if not question else [])
    )
