"""The options of `nanovllm run-batch`, and how a command line is read."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from nanovllm.jobs.command.declared_options import declared_options
from nanovllm.jobs.command.job_options import JobOptions
from nanovllm.jobs.lines.line_options import FORMS

DESCRIPTION = """\
Answer each line of a file, however many there are. A line is a JSON object: in the form of OpenAI's
batch files ("custom_id", "url", "body"), or plain, {"prompt": ...} or {"messages": ...} with
sampling parameters beside it. What is wrong with a line becomes the error that it is answered with,
and the others go on.

Answers are written as they come. After Ctrl-C, a crash or kill -9 the same command goes on where
the job was. OUTPUT.manifest.json says which job that is, and another one is refused."""

EXIT_STATUS = """\
exit status:
  0    all lines are answered
  1    all lines are answered, some of them with an error
  2    the job did not begin: an option, the input or the output is not right
  3    the job stopped before its end: a full disk, an input that cannot be read, no engine left
  130  it was stopped by Ctrl-C; 143: by SIGTERM
With 3, 130 and 143 the same command goes on where the job was."""


class Parser(argparse.ArgumentParser):
    """Names the nearest option where it finds an unknown one, and takes `_` for `-` in names."""

    def __init__(self, **options: Any) -> None:
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all that there is. What is left over is an error, which the option that was meant
        can be named in only here, by the command that has it.
        """
        words = [with_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = super().parse_known_args(words, namespace)
        for word in unknown:
            self._refuse(word.partition("=")[0])
        return parsed, []

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}: it follows no option that takes it")
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        nearest = difflib.get_close_matches(word, flags, n=1, cutoff=0)[0]
        self.error(f"unknown option {word}; did you mean {nearest}?")


def with_dashes(word: str) -> str:
    """`--max_num_seqs=4` as `--max-num-seqs=4`; what is no option stays as it is."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


class RunBatchOptions:
    """The options of `run-batch`: those written down here, and those made of dataclasses."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self._add_file_options()
        self._add_job_options()
        self._engine = self._add_declared(
            "engine, as the options of LLM", "nanovllm.config", "Config", without="hf_config"
        )
        # Seeds of lines follow from the engine's and their numbers: one for all would have equal
        # lines answered alike, and is no default that anybody wants.
        self._sampling = self._add_declared(
            "sampling parameters of lines that bring none",
            "nanovllm.sampling_params",
            "SamplingParams",
            without="seed",
        )

    def read(self, parsed: argparse.Namespace) -> JobOptions:
        """The job that a command line asks for; ends with an error if it lacks something."""
        given = vars(parsed)
        for name, flags in (("input", "-i"), ("output", "-o"), ("model", "--model")):
            if given[name] is None:
                self.parser.error(f"{flags} is missing, the {name}")
        return JobOptions(
            input=parsed.input,
            output=parsed.output,
            model=parsed.model,
            engine={name: given[name] for name in self._engine if name in given},
            defaults={name: given[name] for name in self._sampling if name in given},
            chat_template_kwargs=parsed.chat_template_kwargs,
            format=parsed.format,
            keep_prompt=parsed.keep_prompt,
            in_order=parsed.in_order,
            replicas=parsed.replicas,
            use_ray=parsed.ray is not None,
            ray_address=parsed.ray or None,
            retry_errors=parsed.retry_errors,
            shard=parsed.shard,
            overwrite=parsed.overwrite,
            progress=parsed.progress and not parsed.quiet,
        )

    def _add_file_options(self) -> None:
        group = self.parser.add_argument_group("files")
        group.add_argument(
            "-i",
            "--input",
            "--input-file",
            metavar="INPUT",
            help="JSON lines, also .gz or .zst; a Parquet file; a directory of these, or "
            "of a dataset that Hugging Face's datasets has saved; - for stdin",
        )
        group.add_argument(
            "-o",
            "--output",
            "--output-file",
            metavar="OUTPUT",
            help="JSON lines, which are appended; - for stdout, where nothing can be gone on with",
        )
        group.add_argument(
            "--format",
            choices=FORMS,
            default="auto",
            help="of the answers: OpenAI's (batch), plain, or each as its line is (auto, which is "
            "the default)",
        )
        group.add_argument(
            "--keep-prompt", action="store_true", help="plain answers repeat what was asked"
        )
        group.add_argument(
            "--in-order",
            action="store_true",
            help="answers have the order of the lines, not that in which they are ready",
        )
        group.add_argument(
            "--retry-errors",
            action="store_true",
            help="run lines again that an earlier run has answered with an error",
        )
        group.add_argument(
            "--overwrite", action="store_true", help="drop what the output holds, and begin anew"
        )
        group.add_argument(
            "--shard",
            type=read_shard,
            metavar="I/N",
            help="run only the I-th of N parts, for N machines with an output each",
        )

    def _add_job_options(self) -> None:
        group = self.parser.add_argument_group("how it is run")
        group.add_argument("--model", help="a directory in Hugging Face format, or a hub id")
        group.add_argument(
            "--chat-template-kwargs",
            type=read_object,
            default={},
            metavar="JSON",
            help="options of the chat template for lines that do not say, such as "
            "'{\"enable_thinking\": false}'",
        )
        group.add_argument(
            "--replicas",
            type=read_replicas,
            metavar="N",
            help="engines that share the lines, each in a process of its own; auto: as many as "
            "there are GPUs for (default: 1, or with --ray auto)",
        )
        group.add_argument(
            "--ray",
            nargs="?",
            const="",
            metavar="ADDRESS",
            help="have a Ray cluster run the lines: the one at an address, or the one that this "
            "machine belongs to, or one of this machine alone. OUTPUT is then a directory of parts",
        )
        group.add_argument(
            "--no-progress", dest="progress", action="store_false", help="show no progress bar"
        )
        group.add_argument(
            "--quiet", action="store_true", help="show neither that nor a summary, only errors"
        )

    def _add_declared(self, title: str, module: str, class_name: str, without: str) -> list[str]:
        """Add a group of options, one for each field of a dataclass; return their names."""
        group = self.parser.add_argument_group(title)
        options = [each for each in declared_options(module, class_name) if each.name != without]
        for option in options:
            option.add_to(group)
        return [option.name for option in options]


def read_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"must be I/N with I from 1 to N, such as 2/8, not {text!r}"
        )
    return int(found[1]), int(found[2])


def read_object(text: str) -> dict[str, Any]:
    """A JSON object as a dict."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text!r}")
    return found


def read_replicas(text: str) -> int | Literal["auto"]:
    """A number of engines, or `auto`."""
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, or auto, not {text!r}")
    return int(text)
