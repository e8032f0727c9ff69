"""Make questions about passages of text, and their answers: to train a model, or to test one.

    python examples/qa_pairs.py docs/JOBS.md pairs.jsonl Qwen/Qwen3-4B

Passages are parted by blank lines. Each line of the result is a chat of two messages.
"""

import json
import sys
from pathlib import Path

from nanovllm import LLM, SamplingParams

# The passage comes first: what prompts begin with in common is computed once for all of them.
ASK = "{}\n\nWrite one question that this text answers, and nothing else."
ANSWER = "{}\n\nAnswer in a sentence or two, from this text alone: {}"
MAX_TOKENS = 1024  # some models think for long
QUESTIONS = SamplingParams(n=4, temperature=1.0, max_tokens=MAX_TOKENS)  # four for each passage
ANSWERS = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


def ask(llm: LLM, prompts: list[str], params: SamplingParams) -> list[list[str]]:
    """What each prompt is answered with; without repetitions, and without what was cut off."""
    answers = []
    for output in llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params):
        texts = [each.text for each in output.outputs if each.finish_reason == "stop"]
        spoken = [text.rpartition("</think>")[2].strip() for text in texts]
        answers.append(list(dict.fromkeys(spoken)))
    return answers


def main(source: str, target: str, model: str) -> None:
    """Make pairs about the passages of a file."""
    llm = LLM(model)
    longest = llm.config.max_model_len - 2 * MAX_TOKENS  # a question may be in the prompt, too
    passages = []
    for passage in filter(str.strip, Path(source).read_text().split("\n\n")):
        if len(llm.tokenizer.encode(passage, verbose=False)) <= longest:
            passages.append(passage)
        else:  # a single prompt that is too long would be an error of the whole call
            print("left out, since it is too long:", repr(passage[:60]), file=sys.stderr)

    questions = ask(llm, [ASK.format(passage) for passage in passages], QUESTIONS)
    pairs = [(passages[i], question) for i in range(len(passages)) for question in questions[i]]
    answers = ask(llm, [ANSWER.format(*pair) for pair in pairs], ANSWERS)
    with open(target, "w") as file:
        for (passage, question), answer in zip(pairs, answers, strict=True):
            if answer:  # else it was cut off
                user = {"role": "user", "content": question}
                assistant = {"role": "assistant", "content": answer[0]}
                row = {"messages": [user, assistant], "passage": passage}
                print(json.dumps(row, ensure_ascii=False), file=file)
    print(f"{len(passages)} passages, {len(pairs)} questions, {sum(map(bool, answers))} answers")


if __name__ == "__main__":
    main(*sys.argv[1:])
