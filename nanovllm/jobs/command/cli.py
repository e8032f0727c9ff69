"""The command `nanovllm`, and what it says at its end."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from nanovllm.jobs.command.batch_job import BatchJob, MakePool
from nanovllm.jobs.command.cli_options import DESCRIPTION, EXIT_STATUS, Parser, RunBatchOptions
from nanovllm.jobs.command.cluster_job import ClusterJob
from nanovllm.jobs.command.job_options import JobOptions, JobStopped, UsageError
from nanovllm.jobs.command.stop_signals import Interrupted, StopSignals
from nanovllm.jobs.replicas.pool import ReplicaPool

# Exit statuses; 128 and the number of a signal is the one of a job that was interrupted by it.
ALL_FINE = 0
LINES_FAILED = 1
USAGE_ERROR = 2
STOPPED = 3
SIGNAL_BASE = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process; return its exit status.

    Raises:
        SystemExit: for arguments that are wrong, and after --help.
    """
    parser = Parser(
        prog="nanovllm",
        description="Offline LLM inference: this command, and a library for Python.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run_batch_parser = commands.add_parser(
        "run-batch",
        help="answer each line of a file",
        usage="nanovllm run-batch -i INPUT -o OUTPUT --model MODEL [options] (--help lists them)",
        description=DESCRIPTION,
        epilog=EXIT_STATUS,
    )
    options = RunBatchOptions(run_batch_parser)
    parsed = parser.parse_args(arguments)
    return run_batch(options.read(parsed), is_quiet=parsed.quiet)


def run_batch(
    options: JobOptions, is_quiet: bool = False, make_pool: MakePool = ReplicaPool
) -> int:
    """Run a job and say how it went, on stderr; return the exit status.

    is_quiet: whether nothing is said of a job that ends well.
    make_pool: what starts the engines.
    """
    job: BatchJob | ClusterJob | None = None
    try:
        with StopSignals() as signals:
            if options.use_ray:
                job = ClusterJob(options)
                counts = job.run()
            else:
                job = BatchJob(options)
                counts = job.run(signals, make_pool)
    except UsageError as error:
        say(f"error: {error}")
        return USAGE_ERROR
    except JobStopped as error:
        say(f"stopped: {error}", how_far(job))
        return STOPPED
    except Interrupted as stop:
        say("stopped by a signal", how_far(job))
        return SIGNAL_BASE + stop.number
    except Exception:  # a fault of ours. Python's own exit status for it, 1, says that all is done
        say(f"stopped by a fault of this program:\n{traceback.format_exc()}", how_far(job))
        return STOPPED
    except KeyboardInterrupt:  # the second Ctrl-C, while the job was ending after the first
        say("stopped at once", how_far(job))
        return SIGNAL_BASE + signal.SIGINT
    if not is_quiet:
        say(counts.summary(options.output_name))
    return LINES_FAILED if counts.num_failed else ALL_FINE


def how_far(job: BatchJob | ClusterJob | None) -> str:
    """What a job that was stopped has done, and how it goes on."""
    if job is None:
        return "nothing was written"
    done = job.counts.summary(job.options.output_name)
    if not job.can_resume:
        return f"{done}\nIt cannot be gone on with, as the output is no file."
    without = " without --overwrite" if job.options.overwrite else ""
    return f"{done}\nThe same command{without} goes on from there."


def say(*texts: str) -> None:
    """Print to stderr, which may be closed."""
    with suppress(OSError, ValueError):
        for text in texts:
            print(f"nanovllm run-batch: {text}", file=sys.stderr, flush=True)
