"""What a job is to do, and what can be wrong with that."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nanovllm.jobs.command.manifest import describe_engine
from nanovllm.jobs.lines.line_options import LineOptions

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.jobs.sources.readers import Input


class UsageError(Exception):
    """Why a job cannot begin."""


class JobStopped(Exception):
    """Why a job ended before its last line. What is written is not run again."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job is to do; the command line has these options by the same names."""

    input: str  # a path, or "-" for stdin
    output: str  # a path, or "-" for stdout
    model: str
    engine: dict[str, Any] = field(default_factory=dict)  # fields of Config
    defaults: dict[str, Any] = field(default_factory=dict)  # of SamplingParams, as JSON has them
    # See LineOptions for these three.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    format: str = "auto"
    keep_prompt: bool = False
    in_order: bool = False  # whether the output has the order of the input
    replicas: int | Literal["auto"] | None = None  # None: 1, or with Ray "auto"
    # Whether a Ray cluster runs the job. The output is then a directory.
    use_ray: bool = False
    ray_address: str | None = None  # of the cluster; None: the one that this machine belongs to
    retry_errors: bool = False  # whether lines that earlier runs answered with errors are run again
    shard: tuple[int, int] | None = None  # (i, n): the i-th part of n, i from 1
    overwrite: bool = False  # whether what the output holds is dropped
    progress: bool = True  # whether stderr shows how far the job is

    @property
    def output_name(self) -> str:
        """How the output is called."""
        return "standard output" if self.output == "-" else self.output

    def line_options(self, config: Config) -> LineOptions:
        """What the replicas are told about lines. Raises a TypeError or ValueError for defaults
        that no line could have.
        """
        return LineOptions(
            model=self.model,
            form=self.format,
            defaults=from_json(self.defaults),
            chat_template_kwargs=self.chat_template_kwargs,
            seed=config.seed,
            keep_prompt=self.keep_prompt,
        )


def describe_job(options: JobOptions, source: Input, config: Config) -> dict[str, Any]:
    """What decides the answers: the manifest of the output."""
    return {
        "input": {"size": source.size, "beginning": source.fingerprint},
        "engine": describe_engine(config),
        "defaults": options.defaults,
        "chat_template_kwargs": options.chat_template_kwargs,
        "format": options.format,
        "keep_prompt": options.keep_prompt,
        "in_order": options.in_order,
        "shard": options.shard,
        "note": {"input": os.path.abspath(options.input), "model": config.model},
    }


def from_json(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters as JSON has them, as SamplingParams takes them."""
    from nanovllm.params.structured import StructuredOutputsParams

    params = dict(params)
    form = params.get("structured_outputs")
    if isinstance(form, dict):
        params["structured_outputs"] = StructuredOutputsParams(**form)
    bias = params.get("logit_bias")
    if isinstance(bias, dict):
        params["logit_bias"] = {int(token_id): value for token_id, value in bias.items()}
    return params


def make_config(model: str, options: dict[str, Any]) -> Config:
    """Check the engine's options and find the model's files, as the engine will. A GPU is not
    touched, and no weights are read.
    """
    from nanovllm.config import Config
    from nanovllm.models import MODELS

    return Config.from_options(model, options, architectures=MODELS)
