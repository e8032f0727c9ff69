"""`run-batch --ray`: what is checked before Ray gets a job, and how the job ends."""

from __future__ import annotations

import os

from nanovllm.jobs.command.counts import Counts
from nanovllm.jobs.command.job_options import (
    JobOptions,
    JobStopped,
    UsageError,
    describe_job,
    make_config,
)
from nanovllm.jobs.command.manifest import check_manifest
from nanovllm.jobs.command.output import OutputError, check_apart, open_directory_alone
from nanovllm.jobs.sources.readers import open_input

# This process runs no engine, and may have neither the GPUs of those that do nor the weights.
HERE = {"device": "cpu", "load_format": "dummy"}


class ClusterJob:
    """One run of a job on a cluster, as `BatchJob` is one on this machine."""

    can_resume = True

    def __init__(self, options: JobOptions) -> None:
        self.options = options
        self.counts = Counts()
        refuse_options(options)
        try:
            source = open_input(options.input)
            check_apart(options.output, options.input)
            config = make_config(options.model, {**options.engine, **HERE})
            self._line_options = options.line_options(config)
            self._description = describe_job(options, source, config)
        except (OSError, ValueError, TypeError, ImportError, OutputError) as error:
            raise UsageError(str(error)) from error

    def run(self) -> Counts:
        """Answer what is not answered yet.

        Raises:
            UsageError: if Ray is missing, or the output belongs to another job or process.
            JobStopped: if Ray gives up.
        """
        options = self.options
        output = options.output.rstrip("/")
        try:
            from nanovllm.jobs.ray import run_on_ray

            locked = open_directory_alone(output)
        except (OSError, ImportError, OutputError) as error:
            raise UsageError(str(error)) from error
        try:
            check_manifest(output, self._description, may_replace=not os.listdir(output))
            self.counts = run_on_ray(
                input=options.input,
                output=output,
                model=options.model,
                engine_options=options.engine,
                line_options=self._line_options,
                address=options.ray_address,
                replicas=None if options.replicas == "auto" else options.replicas,
                retry_errors=options.retry_errors,
                progress=options.progress,
            )
        except RuntimeError as error:
            raise JobStopped(f"Ray has given the job up: {error}") from error
        except (ValueError, TypeError, OSError, OutputError) as error:
            raise UsageError(str(error)) from error
        finally:
            os.close(locked)
        return self.counts


def refuse_options(options: JobOptions) -> None:
    """Raise a UsageError for what a cluster cannot do."""
    if options.in_order:
        raise UsageError(
            "--ray keeps no order; leave --in-order out, and sort by the lines' numbers"
        )
    if options.shard is not None:
        raise UsageError("--ray shares the lines among the machines itself; leave --shard out")
    if options.overwrite:
        raise UsageError(
            "--ray overwrites nothing; remove the directory of the output, and the one with "
            ".checkpoint behind its name"
        )
    if "-" in (options.input, options.output):
        raise UsageError("--ray needs paths for -i and -o, which all machines can read and write")
    if os.path.isfile(options.output):
        raise UsageError(f"with --ray the output is a directory, and {options.output!r} is a file")
