"""Run a long job with the command `nanovllm run-batch`, and show that its memory does not grow.

    python scripts/job_load.py --lines 100000 --replicas 2

Makes an input for the demo checkpoint (on a GPU pass another model), runs the job, and every few
seconds notes the memory of each of its processes. At the end it checks that every line is answered
once, and that those and only those that are wrong have an error. Linux only: memory is read from
/proc.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanovllm import DEMO_MODEL

WORDS = [
    "the",
    "cat",
    "dog",
    "a",
    "small",
    "old",
    "house",
    "ran",
    "saw",
    "and",
    "then",
    "she",
    "he",
]
NUM_HEADERS = 50  # so many beginnings the prompts have in common, each of 300 words
WRONG_EVERY = 1000  # lines, of which one has a temperature that is refused


@dataclass(frozen=True)
class Sample:
    """The job at one moment."""

    seconds: float
    num_answers: int
    megabytes: list[int]  # of the main process, then of those below it, as they were started


def write_input(path: Path, num_lines: int, max_tokens: int) -> None:
    r = random.Random(0)
    headers = [" ".join(r.choices(WORDS, k=300)) for _ in range(NUM_HEADERS)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, num_lines + 1):
            prompt = " ".join(r.choices(WORDS, k=r.randrange(5, 60)))
            if r.random() < 0.2:
                prompt = f"{r.choice(headers)} {prompt}"
            body = {"prompt": prompt, "max_tokens": r.randrange(1, 2 * max_tokens)}
            if number % WRONG_EVERY == 0:
                body["temperature"] = -1
            line = {"custom_id": f"line-{number}", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def processes_below(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(file.parent.name))
    found = [pid]
    for parent in found:
        found.extend(sorted(children.get(parent, [])))
    return found


def megabytes_of(pid: int) -> int:
    """The memory of a process, with its share of what it shares with others; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) // 1024
    except OSError:
        pass
    return 0


class LineCounter:
    """Counts the lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.count = 0

    def update(self) -> int:
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.position)
                while chunk := file.read(1 << 20):
                    self.count += chunk.count(b"\n")
                self.position = file.tell()
        return self.count


def watch(process: subprocess.Popen[bytes], output: Path, interval: float) -> list[Sample]:
    begin = time.monotonic()
    counter = LineCounter(output)
    samples = []
    while process.poll() is None:
        memory = [megabytes_of(pid) for pid in processes_below(process.pid)]
        sample = Sample(time.monotonic() - begin, counter.update(), memory)
        samples.append(sample)
        text = " ".join(f"{size:6}" for size in sample.megabytes)
        print(f"{sample.seconds:7.0f} s {sample.num_answers:9} lines   MB: {text}", flush=True)
        time.sleep(interval)
    samples.append(Sample(time.monotonic() - begin, counter.update(), []))
    return samples


def check_output(path: Path, num_lines: int) -> list[str]:
    """What is wrong with an output; nothing, if it is as it should be."""
    answers: Counter[str] = Counter()
    wrong_status = []
    with path.open("rb") as file:
        for line in file:
            answer = json.loads(line)
            name = answer["custom_id"]
            answers[name] += 1
            is_wrong = int(name.rpartition("-")[2]) % WRONG_EVERY == 0
            if (answer["response"]["status_code"] != 200) != is_wrong:
                wrong_status.append(name)
    problems = []
    missing = num_lines - len(answers)
    if missing:
        problems.append(f"{missing} lines have no answer")
    repeated = [name for name, count in answers.items() if count > 1]
    if repeated:
        problems.append(f"{len(repeated)} lines have several answers, {repeated[0]} for one")
    if wrong_status:
        problems.append(f"{len(wrong_status)} answers have a wrong status, {wrong_status[0]}")
    return problems


def summarize(samples: list[Sample], num_lines: int) -> None:
    """Print a table: memory after each tenth of the lines."""
    running = [sample for sample in samples if 0 < sample.num_answers < num_lines]
    print("\n| lines | seconds | main process, MB | other processes, MB |\n|---|---|---|---|")
    for tenth in range(1, 11):
        later = [sample for sample in running if sample.num_answers >= num_lines * tenth // 10]
        sample = later[0] if later else running[-1]
        others = ", ".join(map(str, sample.megabytes[1:]))
        print(f"| {sample.num_answers} | {sample.seconds:.0f} | {sample.megabytes[0]} | {others} |")
    first, last = running[0], samples[-1]
    speed = (last.num_answers - first.num_answers) / (last.seconds - first.seconds)
    print(f"\n{speed:.0f} lines/s after the first {first.num_answers}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--replicas", default="2")
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--max-tokens", type=int, default=8, help="on average")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument(
        "--directory", help="where input and output are kept; else they are removed"
    )
    arguments, engine_options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(arguments.directory or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        output = directory / "output.jsonl"
        write_input(directory / "input.jsonl", arguments.lines, arguments.max_tokens)
        command = [sys.executable, "-m", "nanovllm", "run-batch", "--overwrite", "--no-progress"]
        command += ["-i", str(directory / "input.jsonl"), "-o", str(output)]
        command += ["--model", arguments.model, "--replicas", arguments.replicas, *engine_options]
        print(" ".join(command))
        process = subprocess.Popen(command)
        try:
            samples = watch(process, output, arguments.interval)
        finally:
            process.terminate()
            process.wait()
        summarize(samples, arguments.lines)
        problems = check_output(output, arguments.lines)
        print("every line is answered once" if not problems else "\n".join(problems))
        print(f"exit status {process.returncode}")  # 1: some lines have errors
        return int(bool(problems) or process.returncode not in (0, 1))


if __name__ == "__main__":
    sys.exit(main())
