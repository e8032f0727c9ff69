"""Label the rows of a CSV file: an answer is JSON that fits a schema, and becomes columns.

    python examples/label_csv.py examples/data/messages.csv labels.csv Qwen/Qwen3-4B

The file may have any length. Rows are written as they are ready; `error` says what went wrong.
"""

import asyncio
import csv
import sys
from typing import Any, Literal

from pydantic import BaseModel, Field  # pip install -e '.[structured]' pydantic
from tqdm import tqdm

from nanovllm import AsyncLLM, EngineError, SamplingParams, StructuredOutputsParams


class Labels(BaseModel, extra="forbid"):
    """The model writes them in this order, so that the others can follow from the reason."""

    reason: str = Field(max_length=120)  # without a limit, a model may never come to the rest
    topic: Literal["delivery", "payment", "product", "other"]
    is_urgent: bool


FORM = StructuredOutputsParams(json=Labels)
PARAMS = SamplingParams(temperature=0, max_tokens=256, structured_outputs=FORM)


async def label(llm: AsyncLLM, text: str) -> dict[str, Any]:
    """The labels of a text, or what is wrong with it: it is too long, say."""
    question = f"What is this message of a customer about, and is it urgent? Why?\n\n{text}"
    try:
        output = await llm.chat([{"role": "user", "content": question}], PARAMS)
        return Labels.model_validate_json(output["text"]).model_dump()
    except (ValueError, EngineError) as error:
        return {"error": str(error)}


async def main(source: str, target: str, model: str) -> None:
    """Label the column `text` of a file."""
    with open(source, newline="") as file, open(target, "w", newline="") as labelled, tqdm() as bar:
        rows = csv.DictReader(file, restkey="error", restval="")  # of too many fields, too few
        writer = csv.DictWriter(labelled, [*rows.fieldnames, *Labels.model_fields, "error"])
        writer.writeheader()

        async def work(llm: AsyncLLM) -> None:
            for row in rows:  # all who work take theirs from the same iterator
                writer.writerow(row | await label(llm, row["text"]))
                bar.update()

        async with AsyncLLM(model) as llm:
            # Twice as many as run at once: when one ends, another is there to take its place.
            await asyncio.gather(*(work(llm) for _ in range(2 * llm.config.max_num_seqs)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
