"""Jobs on a Ray cluster: one of this machine, with small engines on the CPU.

NANOVLLM_KILL_MOMENTS=20 kills at that many moments; without it, at two.
"""

import asyncio
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

import nanovllm.jobs.ray
from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.jobs.command.cli import LINES_FAILED, main
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.ray import RowWorker, run_on_ray, worker_arguments
from nanovllm.jobs.ray.job import read_blocks, reason
from nanovllm.jobs.ray.parts import checkpoint_of, drop_errors, forget_lost_parts, read_parts

ROOT = Path(__file__).resolve().parent.parent
ENGINE = dict(device="cpu", max_model_len=256, max_num_seqs=8, num_kvcache_blocks=16)
GREEDY = dict(temperature=0, max_tokens=40, ignore_eos=True)
KINDS = (("actor", "job"), ("engine", "actor"), ("job", "engine"))  # what is killed in a job
KILLS = int(os.environ.get("NANOVLLM_KILL_MOMENTS", "2"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with logical resources of its own, whatever else runs here."""
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets must be short
    environment = {
        # Of Ray's processes, which are to find this file, and all that this process finds.
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Jobs share the cluster, and Ray leaves one that was killed its share for three minutes:
        # the next one could not write before it has answered everything. So jobs say every second
        # that they are there.
        "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1",
        "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "3",
    }
    # So that they need not import this file, and PyTorch with it, for the class that is here.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield start_cluster(directory)
        ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def start_cluster(directory: str) -> str:
    """Start Ray; returns its address."""
    context = ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=directory,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    return context.address_info["address"]


@pytest.fixture(scope="module")
def expected() -> Iterator[Callable[[list[str]], list[str]]]:
    """A function: what the demo model says to prompts."""
    llm = LLM(DEMO_MODEL, device="cpu", max_model_len=256, max_num_seqs=64)

    def complete(prompts: list[str]) -> list[str]:
        outputs = llm.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)
        return [output["text"] for output in outputs]

    yield complete
    llm.exit()


# --- datasets -------------------------------------------------------------------------------------


class GatedWorker(RowWorker):
    """Hands no row to its engine before three batches are there: Ray must give it so many at once.

    Says in a column whether they came.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_batches = 0

    async def __call__(self, batch: Any) -> Any:
        self.num_batches += 1
        for _ in range(2000):
            if self.num_batches >= 3:
                break
            await asyncio.sleep(0.01)
        came = self.num_batches >= 3
        async for table in super().__call__(batch):
            yield table.append_column("came", pa.array([came] * table.num_rows))


def many_forms(number: int) -> dict[str, Any]:
    """A row: mostly a plain prompt, sometimes one of another form, sometimes a wrong one."""
    messages = [{"role": "user", "content": f"Say {number}"}]
    row: dict[str, Any] = {
        "id": number,
        "prompt": f"Number {number} is",
        "messages": None,
        "temperature": None,
        "url": None,
        "body": None,
        "when": datetime(2026, 1, 2, 3, 4, number % 60),
        "picture": np.full((2, 2), number, np.uint8),
    }
    match number % 8:
        case 1:
            row.update(prompt=None, messages=json.dumps(messages))
        case 2:
            row.update(prompt="much too long " * 200)
        case 3:
            row.update(temperature=-1.0)
        case 4:
            row.update(prompt=None)
        case 5:
            body = json.dumps({"input": "cat", "encoding_format": "base64"})
            row.update(prompt=None, url="/v1/embeddings", body=body)
    return row


def test_rows_keep_their_columns_and_get_answers_or_errors(
    cluster: str, tmp_path: Path, expected: Callable[[list[str]], list[str]]
) -> None:
    dataset = ray.data.from_items([many_forms(number) for number in range(200)])
    options = dict(model=DEMO_MODEL, sampling_params=GREEDY, **ENGINE)
    answers = dataset.repartition(target_num_rows_per_block=10).map_batches(
        GatedWorker, fn_constructor_kwargs=options, **worker_arguments(batch_size=10, **ENGINE)
    )
    answers.write_parquet(str(tmp_path / "answers"))
    files = sorted((tmp_path / "answers").glob("*.parquet"))
    assert len(files) > 1 and len({pq.read_schema(file) for file in files}) == 1
    rows = {row["id"]: row for file in files for row in pq.read_table(file).to_pylist()}
    assert sorted(rows) == list(range(200))

    codes = Counter((number % 8, row["error_code"]) for number, row in rows.items())
    assert codes == {
        **{(kind, None): 25 for kind in (0, 1, 5, 6, 7)},
        (2, "context_length_exceeded"): 25,
        (3, "invalid_value"): 25,
        (4, "missing_required_parameter"): 25,
    }
    for number, row in rows.items():
        assert row["when"] == datetime(2026, 1, 2, 3, 4, number % 60)
        assert row["picture"].tolist() == [[number] * 2] * 2
        assert (row["error"] is None) == (row["error_code"] is None)
        assert row["came"]
    plain = [number for number in rows if number % 8 in (0, 6, 7)]
    texts = expected([f"Number {number} is" for number in plain])
    assert [rows[number]["generated_text"] for number in plain] == texts
    assert {rows[number]["completion_tokens"] for number in plain} == {40}
    assert all(rows[number]["generated_text"] for number in rows if number % 8 == 1)
    embeddings = [row["embedding"] for number, row in rows.items() if number % 8 == 5]
    np.testing.assert_allclose(embeddings, [embeddings[0]] * 25, atol=1e-5)
    assert all((row["embedding"] is not None) == (number % 8 == 5) for number, row in rows.items())


@pytest.mark.parametrize(
    "options, batches_at_once, actors",
    [
        (dict(), 32, (1, 1)),  # 8 rows for each of 512 sequences, in batches of 128
        (dict(max_num_seqs=4), 2, (1, 1)),  # never one alone
        (dict(concurrency=4, num_rows=2048), 4, (4, 4)),  # a fourth of 16 batches
        (dict(concurrency=(1, 4), batch_size=64), 64, (1, 4)),
    ],
)
def test_actors_work_at_many_batches_but_take_no_more_than_their_share(
    cluster: str, options: dict[str, Any], batches_at_once: int, actors: tuple[int, int]
) -> None:
    arguments = worker_arguments(**options)
    pool = arguments["compute"]
    at_once = getattr(pool, "max_concurrent_calls_per_actor", arguments.get("max_concurrency"))
    assert at_once == batches_at_once
    assert (pool.min_size, pool.max_size) == actors
    assert arguments["num_gpus"] == 0  # the cluster has none


# --- run-batch --ray ------------------------------------------------------------------------------


def write_input(path: Path, num_lines: int) -> list[str]:
    """Lines of a job, every 50th of them wrong; returns the prompts."""
    prompts = [f"Line {number} says" for number in range(1, num_lines + 1)]
    with path.open("w") as file:
        for number, prompt in enumerate(prompts, 1):
            body = {"model": "demo", "prompt": prompt, **GREEDY}
            if number % 50 == 0:
                body["temperature"] = "warm"
            line = {"custom_id": f"id-{number}", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return prompts


def arguments(directory: Path, replicas: int) -> list[str]:
    """The command line of the job of these tests, but for --ray."""
    engine = [f"--{name}={value}" for name, value in ENGINE.items()]
    files = ["-i", str(directory / "input.jsonl"), "-o", str(directory / "output")]
    model = ["--model", DEMO_MODEL, f"--replicas={replicas}"]
    return ["run-batch", *files, *model, "--quiet", *engine]


# The job hands over so few lines at a time that there is something to kill.
small_job = partial(run_on_ray, batch_size=8, rows_per_part=16)
JOB_IN_A_PROCESS = """
import sys
import nanovllm.jobs.ray
from nanovllm.jobs.command.cli import main
from test_ray import small_job
nanovllm.jobs.ray.run_on_ray = small_job
sys.exit(main(sys.argv[1:]))
"""


class Victim:
    """A job in a process of its own; it, its actors and their engines can be killed."""

    def __init__(self, directory: Path, cluster: str) -> None:
        self.directory = directory
        self.cluster = cluster
        self.job: subprocess.Popen[bytes] | None = None
        self.num_kills = 0

    def come_further(self) -> None:
        """Have the job run, and wait until it has finished one more part."""
        if self.job is None:
            job = arguments(self.directory, replicas=2)
            command = [sys.executable, "-c", JOB_IN_A_PROCESS, *job, "--ray", self.cluster]
            self.job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = num_lines(self.directory)
        self.wait_until(lambda: num_lines(self.directory) > before)

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        """Wait until the condition holds, and return it; None: the job has answered all lines."""
        assert self.job is not None
        while True:
            result = condition()
            if result:
                return result
            status = self.job.poll()
            if status is not None:
                assert status == LINES_FAILED
                return None
            time.sleep(0.05)

    def kill(self, kind: str) -> None:
        """Kill -9 the job, one of its actors, or one of their engines, if there are any left."""
        if kind == "job":
            self.close()
            return
        title = {"actor": "ray::MapWorker(MapBatches(JobWorker)", "engine": "replica_process"}[kind]
        # There may be none yet: the part was one of the job before, whose processes Ray ends only
        # now.
        found = self.wait_until(lambda: processes(title))
        if found is not None:
            os.kill(random.choice(found), signal.SIGKILL)
            self.num_kills += 1

    def close(self) -> None:
        """Kill the job, if it runs."""
        if self.job is not None:
            self.num_kills += self.job.poll() is None
            self.job.kill()
            self.job.wait()
            self.job = None


def processes(title: str) -> list[int]:
    """The ids of processes that this one's cluster runs, with this in their command line."""
    return [pid for pid in descendants(os.getpid()) if title in command_of(pid)]


def descendants(pid: int) -> list[int]:
    """The ids of the children of a process, of their children, and so on."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(directory.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def num_lines(directory: Path) -> int:
    """Lines in finished parts."""
    return len(read_parts(str(directory / "output")).numbers)


@pytest.mark.parametrize("kinds", [KINDS[index % 3] for index in range(KILLS // 2)])
def test_nothing_is_lost_and_nothing_twice_whatever_is_killed(
    kinds: tuple[str, str],
    cluster: str,
    tmp_path: Path,
    expected: Callable[[list[str]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = write_input(tmp_path / "input.jsonl", 300)
    victim = Victim(tmp_path, cluster)
    try:
        for kind in kinds:
            victim.come_further()
            time.sleep(random.uniform(0, 0.2))
            victim.kill(kind)
    finally:
        victim.close()
    assert victim.num_kills > 0  # a moment that comes after the end of the job kills nothing
    monkeypatch.setattr(nanovllm.jobs.ray, "run_on_ray", small_job)
    assert main([*arguments(tmp_path, replicas=1), "--ray"]) == LINES_FAILED
    output = str(tmp_path / "output")
    rows = ray.data.read_json(output).take_all()
    assert sorted(row["id"] for row in rows) == sorted(
        f"batch_req_{number}" for number in range(1, len(prompts) + 1)
    )
    texts = expected(prompts)
    for row in rows:
        number = int(row["id"].removeprefix("batch_req_"))
        assert row["custom_id"] == f"id-{number}"
        body = row["response"]["body"]
        if number % 50 == 0:
            assert body["error"]["code"] == "invalid_type"
        else:
            assert body["choices"][0]["text"] == texts[number - 1]

    parts = sorted((tmp_path / "output").iterdir())
    assert main([*arguments(tmp_path, replicas=1), "--ray"]) == LINES_FAILED  # finds nothing to do
    assert sorted((tmp_path / "output").iterdir()) == parts


def test_lines_are_read_in_small_blocks_and_repeated_ids_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    ids = [*(f"id-{number}" for number in range(1, 300)), "id-7"]
    path.write_text("".join(json.dumps({"custom_id": each, "body": {}}) + "\n" for each in ids))
    blocks = list(read_blocks(str(path)))
    assert max(block.num_rows for block in blocks) <= 128
    table = pa.concat_tables(blocks)
    assert table["number"].to_pylist() == list(range(1, 301))
    assert table["duplicate_of"].to_pylist() == [None] * 299 + [7]
    assert json.loads(table["data"][299].as_py())["custom_id"] == "id-7"


def test_an_input_that_is_cut_off_ends_the_job_after_what_could_be_read(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl.gz"
    random_texts = random.Random(0)
    lines = [f'{{"prompt": "{random_texts.random()}"}}\n' for _ in range(2000)]
    path.write_bytes(gzip.compress("".join(lines).encode())[:-1000])
    blocks = read_blocks(str(path))
    assert next(blocks).num_rows == 128
    with pytest.raises((OSError, ValueError)):
        list(blocks)


# --- parts ----------------------------------------------------------------------------------------


def write_part(output: Path, name: str, numbers: dict[int, bool], ending: str) -> None:
    """A part with these lines (number -> whether it failed) and its list."""
    lists = Path(checkpoint_of(str(output)))
    for directory in (output, lists):
        directory.mkdir(exist_ok=True)
    lines = []
    for number, is_error in numbers.items():
        fields = {"error": {"code": "x"}} if is_error else {"text": ""}
        lines.append(json.dumps({"line": number, **fields}, separators=(",", ":")) + "\n")
    (output / f"{name}.jsonl").write_text("".join(lines))
    pq.write_table(pa.table({"number": list(numbers)}), lists / f"{name}{ending}")


def test_lines_with_errors_are_taken_out_of_parts_and_lists(tmp_path: Path) -> None:
    output = tmp_path / "output"
    write_part(output, "good", {1: False, 2: False}, ".parquet")
    write_part(output, "mixed", {3: True, 4: False}, ".parquet")
    write_part(output, "bad", {5: True}, ".parquet")
    write_part(output, "unfinished", {6: False}, ".pending.parquet")
    before = read_parts(str(output))
    assert [number in before.numbers for number in range(1, 7)] == [True] * 5 + [False]
    assert before.num_errors == 2

    drop_errors(str(output))
    after = read_parts(str(output))
    assert [number in after.numbers for number in range(1, 7)] == [1, 1, 0, 1, 0, 0]
    assert after.num_errors == 0
    lists = Path(checkpoint_of(str(output)))
    assert sorted(path.name for path in lists.iterdir()) == [
        *("good.parquet", "mixed.parquet", "unfinished.pending.parquet"),
    ]
    assert pq.read_table(lists / "mixed.parquet")["number"].to_pylist() == [4]
    assert sorted(path.name for path in output.iterdir()) == [
        *("good.jsonl", "mixed.jsonl", "unfinished.jsonl"),
    ]


def test_lines_of_a_part_that_was_deleted_are_not_taken_for_done(tmp_path: Path) -> None:
    output = tmp_path / "output"
    write_part(output, "good", {1: False}, ".parquet")
    write_part(output, "deleted", {2: False}, ".parquet")
    (output / "deleted.jsonl").unlink()
    forget_lost_parts(str(output))
    assert [path.name for path in Path(checkpoint_of(str(output))).iterdir()] == ["good.parquet"]


def test_a_foreign_line_in_a_part_is_named(tmp_path: Path) -> None:
    output = tmp_path / "output"
    write_part(output, "good", {1: False}, ".parquet")
    (output / "good.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="good.jsonl holds a line that no job has written.*hello"):
        read_parts(str(output))


def test_stdin_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read stdin"):
        run_on_ray(
            input="-",
            output="output",
            model=DEMO_MODEL,
            engine_options={},
            line_options=LineOptions(model="demo"),
        )


def test_what_stops_a_cluster_is_said_in_one_line() -> None:
    error = RuntimeError(
        "ray::MapWorker.__init__() died\n  File ...\nValueError: no such model\n\n"
    )
    assert reason(error) == "ValueError: no such model"
    assert reason(KeyError()) == "KeyError"
