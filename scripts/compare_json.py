"""Compare two trees by what their bench.py wrote with `--json`.

    python scripts/compare_json.py --base base1.json base2.json --new new1.json new2.json

Prints, for each workload, the median rate of all runs of either tree, and the ratio. Only files of
one machine and one session should be compared: machines of the same kind differ by 2 to 3%.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

OURS = "nanovllm"  # runs of other engines, by `bench.py --compare`, are left out
LIMIT = 0.99  # a lower ratio is marked


@dataclass
class Runs:
    """All timed runs of one workload."""

    rates: list[float] = field(default_factory=list)  # tok/s
    loads: set[tuple[int, int]] = field(default_factory=set)  # (input tokens, output tokens)

    def __str__(self) -> str:
        """The median and, in brackets, the extremes."""
        median = statistics.median(self.rates)
        return f"{median:,.0f} ({min(self.rates):,.0f} to {max(self.rates):,.0f})"


def read_runs(files: list[Path]) -> dict[str, Runs]:
    """The runs in these files, by a name that says what was run."""
    runs: dict[str, Runs] = {}
    for file in files:
        facts = json.loads(file.read_text())
        num_ranks = facts["options"]["tensor_parallel_size"]
        for result in facts["results"]:
            if result["engine"] != OURS:
                continue
            name = f"{result['workload']['name']}, {facts['model']}, {num_ranks} rank(s)"
            entry = runs.setdefault(name, Runs())
            for run in result["runs"]:
                entry.rates.append(run["tokens_per_second"])
                entry.loads.add((run["input_tokens"], run["output_tokens"]))
    return runs


def table(base: dict[str, Runs], new: dict[str, Runs]) -> list[str]:
    """Lines of a Markdown table; workloads that only one tree has run are left out.

    Raises:
        ValueError: the two trees ran different loads under the same name.
    """
    lines = [
        "| workload | base: median tok/s (range) | new: median tok/s (range) | new / base |",
        "|---|---|---|---|",
    ]
    for name, old in base.items():
        if name not in new:
            continue
        if old.loads != new[name].loads:
            raise ValueError(f"{name}: {old.loads} tokens in and out, and {new[name].loads}")
        ratio = statistics.median(new[name].rates) / statistics.median(old.rates)
        mark = " **slower**" if ratio < LIMIT else ""
        lines.append(f"| {name} | {old} | {new[name]} | {ratio:.3f}{mark} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare two trees by their bench.py's JSON.")
    for option in ("--base", "--new"):
        parser.add_argument(option, nargs="+", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        print("\n".join(table(read_runs(args.base), read_runs(args.new))))
    except (OSError, ValueError) as error:
        sys.exit(f"compare_json.py: {error}")


if __name__ == "__main__":
    main()
