"""`embed` and `score`: prompts of which no completion is wanted, but a vector or a number.

Each prompt is a sequence that ends with its prefill. What that step reads is a `Readout`, see
readout/. It samples nothing, and for embeddings it runs no LM head either, unless it is so small
that a CUDA graph runs it, which does both in any case. The blocks are free when it has ended.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.collector import collector_slowed
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.requests import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.exclusive import exclusive
from nanovllm.inputs import Prompts
from nanovllm.pooling.files import EmbeddingFiles
from nanovllm.pooling.params import PoolingParams
from nanovllm.pooling.prompts import ANSWERS, CHAT_TOKENS, INSTRUCTION, TEMPLATE
from nanovllm.pooling.results import EmbeddingRequestOutput, ScoringRequestOutput
from nanovllm.progress import progress_bar
from nanovllm.readout.readout import LastHidden, MeanHidden, NextLogits
from nanovllm.sampling_params import SamplingParams
from nanovllm.vllm_compat.absent import ABSENT_IN_POOLING, refuse_others

PREFILL_ONLY = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
Params = PoolingParams | SequenceOf[PoolingParams] | None


@dataclass(frozen=True, slots=True)
class EmbeddingTask:
    """A prompt that is to be embedded, checked and encoded."""

    request: Request
    params: PoolingParams


class PoolingEngine(LLMEngine):
    """An engine that also embeds and scores."""

    @cached_property
    def _embedding_files(self) -> EmbeddingFiles:
        return EmbeddingFiles.read(Path(self.config.model))

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        **absent: Any,
    ) -> list[EmbeddingRequestOutput]:
        """Embed prompts, batched as the cache allows, and return a result for each, in order.

        How hidden states become a vector, and what is put before the texts, is what the
        checkpoint's files say; of one without such files, it is the last token's, normalised.

        Args:
            prompts: as for `generate`.
            pooling_params: one for all, one for each, or None for `PoolingParams()`.
            prompt_name: of a prompt in the checkpoint's files, "query" for one, to put before all
                texts; None for the one that the files name as the default, if they do.
            truncate_prompt_tokens: take only so many tokens at the end of a prompt; -1: as many as
                fit. None: all.
            use_tqdm: whether to show a progress bar.
            absent: options of vLLM's, if their values ask for nothing.

        Returns:
            For each prompt a dict with `embedding` (a list of floats), `prompt_token_ids` and
            `num_cached_tokens`; `.outputs.embedding` is the same list.

        Raises:
            TypeError, ValueError: for a wrong prompt or parameter, or a checkpoint whose embeddings
                are made in a way that is not supported.
            RuntimeError: as for `generate`.
        """
        refuse_others("LLM.embed", absent, ABSENT_IN_POOLING)
        tasks = self._check_embeddings(prompts, pooling_params, prompt_name, truncate_prompt_tokens)
        seqs = [self._start_embedding(task) for task in tasks]

        def finish(index: int) -> EmbeddingRequestOutput:
            return self._finish_embedding(seqs[index], tasks[index])

        return self._prefill_all(seqs, finish, "Embedding", use_tqdm)

    def score(
        self,
        queries: str | list[str],
        documents: str | list[str],
        *,
        instruction: str = INSTRUCTION,
        template: str | None = None,
        use_tqdm: bool = True,
        **absent: Any,
    ) -> list[ScoringRequestOutput]:
        """Score how well documents answer queries, and return a result for each pair, in order.

        A checkpoint for embeddings, as its files say, gives the cosine of the two vectors. Any
        other model is asked, as Qwen3-Reranker is trained to be: the score is the probability of
        "yes" against "no" as the next token.

        Args:
            queries: as many as documents, or one for all of them.
            documents: texts.
            instruction: what the judgement is to be about, as Qwen3-Reranker's prompt has it.
            template: of the prompt, with {instruction}, {query} and {document} in it; None for
                Qwen3-Reranker's.
            use_tqdm: whether to show a progress bar.
            absent: options of vLLM's, if their values ask for nothing.

        Returns:
            For each pair a dict with `score`, `prompt_token_ids` and `num_cached_tokens`;
            `.outputs.score` is the same number. Of a cosine the last two are the document's.

        Raises:
            TypeError, ValueError: for texts that make no pairs, or a model that cannot be asked.
            RuntimeError: as for `generate`.
        """
        refuse_others("LLM.score", absent, ABSENT_IN_POOLING)
        pairs = make_pairs(queries, documents)
        if self._embedding_files.are_there and template is None:
            return self._score_by_cosine(pairs, use_tqdm)
        texts = self._make_questions(pairs, instruction, template)
        answers = self._answer_ids()
        requests = self._check_requests(texts, PREFILL_ONLY)
        seqs = [self._inputs.make_sequences(request, is_streamed=False)[0] for request in requests]
        for seq in seqs:
            seq.readout = NextLogits(answers)

        def finish(index: int) -> ScoringRequestOutput:
            yes, no = read_vector(seqs[index]).tolist()
            with np.errstate(over="ignore"):  # of a score that is 0 to all digits
                score = 1 / (1 + np.exp(no - yes))
            return ScoringRequestOutput(score=float(score), **facts(seqs[index]))

        return self._prefill_all(seqs, finish, "Scoring", use_tqdm)

    # --- embeddings -------------------------------------------------------------------------------

    def _check_embeddings(
        self,
        prompts: Prompts,
        pooling_params: Params,
        prompt_name: str | None,
        truncate_prompt_tokens: int | None,
    ) -> list[EmbeddingTask]:
        """Check and encode all prompts of an `embed`, without the engine's lock."""
        self._check_alive()
        before = self._embedding_files.prompt(prompt_name)
        if before:
            prompts = put_before(prompts, before)
        params = replace(PREFILL_ONLY, truncate_prompt_tokens=truncate_prompt_tokens)
        requests = self._inputs.check(prompts, params)
        each_params = self._check_pooling(pooling_params, len(requests))
        return [EmbeddingTask(*pair) for pair in zip(requests, each_params, strict=True)]

    def _start_embedding(self, task: EmbeddingTask) -> Sequence:
        """Make the sequence that computes an embedding."""
        (seq,) = self._inputs.make_sequences(task.request, is_streamed=False)
        is_mean = self._embedding_files.pooling == "mean"
        seq.readout = MeanHidden(seq.num_prompt_tokens) if is_mean else LastHidden()
        return seq

    def _finish_embedding(self, seq: Sequence, task: EmbeddingTask) -> EmbeddingRequestOutput:
        """Make the result of a sequence that has ended."""
        embedding = self._embedding(read_vector(seq), task.params)
        return EmbeddingRequestOutput(embedding=embedding.tolist(), **facts(seq))

    def _check_pooling(self, params: Params, number: int) -> list[PoolingParams]:
        """Return the parameters of each prompt, checked against the model."""
        if params is None or isinstance(params, PoolingParams):
            params = [params or PoolingParams()] * number
        if not isinstance(params, (list, tuple)):
            raise TypeError(f"pooling_params must be a PoolingParams or a list, not {params!r}")
        if len(params) != number:
            raise ValueError(f"{len(params)} pooling_params for {number} prompts; pass one each")
        size = self.config.hf_config.hidden_size
        for one in params:
            if not isinstance(one, PoolingParams):
                raise TypeError(f"pooling_params must be of PoolingParams, not {one!r}")
            if one.dimensions is not None and one.dimensions > size:
                raise ValueError(
                    f"dimensions must be at most {size}, the model's hidden_size, not "
                    f"{one.dimensions}"
                )
        return list(params)

    def _embedding(self, vector: np.ndarray, params: PoolingParams) -> np.ndarray:
        """Cut and normalise a hidden state."""
        embedding = vector[: params.dimensions]
        normalizes = self._embedding_files.normalizes
        if params.normalize is not None:
            normalizes = params.normalize
        if normalizes:
            embedding = embedding / max(float(np.linalg.norm(embedding)), 1e-12)
        return embedding

    # --- scores -----------------------------------------------------------------------------------

    def _score_by_cosine(
        self, pairs: list[tuple[str, str]], use_tqdm: bool
    ) -> list[ScoringRequestOutput]:
        """Embed each text once, queries and documents with the prompts of these names."""
        prompts = self._embedding_files.prompts
        normalized = PoolingParams(normalize=True)
        vectors: list[dict[str, EmbeddingRequestOutput]] = []
        for kind, texts in zip(("query", "document"), zip(*pairs, strict=True), strict=True):
            distinct = list(dict.fromkeys(texts))
            outputs = self.embed(
                distinct,
                pooling_params=normalized,
                prompt_name=kind if kind in prompts else None,
                use_tqdm=use_tqdm,
            )
            vectors.append(dict(zip(distinct, outputs, strict=True)))
        scores = []
        for query, document in pairs:
            ours, theirs = vectors[0][query], vectors[1][document]
            others = {key: value for key, value in theirs.items() if key != "embedding"}
            score = float(np.dot(ours.embedding, theirs.embedding))
            scores.append(ScoringRequestOutput(score=score, **others))
        return scores

    def _make_questions(
        self, pairs: list[tuple[str, str]], instruction: str, template: str | None
    ) -> list[str]:
        """Write the prompt of each pair."""
        tokenizer = self._inputs.tokenizer
        if tokenizer is None:
            raise ValueError(f"{self.config.model} has no tokenizer, and score takes texts")
        if template is None:
            vocabulary = tokenizer.get_vocab()
            if any(token not in vocabulary for token in CHAT_TOKENS):
                raise ValueError(
                    f"the tokenizer does not know {' and '.join(CHAT_TOKENS)}, which the prompt of "
                    "Qwen3-Reranker has; pass template="
                )
            template = TEMPLATE
        return [
            template.format(instruction=instruction, query=query, document=document)
            for query, document in pairs
        ]

    def _answer_ids(self) -> tuple[int, ...]:
        """The token ids of the two answers."""
        named = self._embedding_files.answer_ids
        if named is not None:
            return named
        tokenizer = self._inputs.tokenizer
        assert tokenizer is not None  # `_make_questions` has seen to it
        with self._inputs.lock:
            encoded = [tokenizer.encode(answer, add_special_tokens=False) for answer in ANSWERS]
        for answer, token_ids in zip(ANSWERS, encoded, strict=True):
            if len(token_ids) != 1:
                raise ValueError(
                    f"{answer!r} is {len(token_ids)} tokens of this model and not one, so that it "
                    "cannot be asked for a score"
                )
        return tuple(token_ids[0] for token_ids in encoded)

    # --- both -------------------------------------------------------------------------------------

    @exclusive
    def _prefill_all(
        self, seqs: list[Sequence], finish: Callable[[int], Any], what: str, use_tqdm: bool
    ) -> list[Any]:
        """Run the prefills of all sequences, and return what `finish` makes of each, by its index.

        It is called for a step's sequences while the next steps run.
        """
        self._check_idle()
        results: list[Any] = [None] * len(seqs)
        indices = {seq: index for index, seq in enumerate(seqs)}
        try:
            for seq in seqs:
                self.scheduler.add(seq)
            options = dict(total=len(seqs), desc=what, disable=not use_tqdm, dynamic_ncols=True)
            with collector_slowed(), progress_bar(**options) as update:
                while not self.is_finished():
                    step = self._advance()
                    self._launch_behind()  # for the device to run while results are made
                    finished = [] if step is None else [seq for seq in step.seqs if seq.is_finished]
                    for seq in finished:
                        result = finish(indices[seq])
                        result.request_id = str(seq.request_id)
                        results[indices[seq]] = result
                    update(len(finished))
        except BaseException:
            # Ctrl-C too: the abandoned requests must not come back in the next call.
            self._reset()
            raise
        if any(not seq.is_finished for seq in seqs):
            raise RuntimeError("requests were dropped by a reset() while they ran")
        if seqs and all(seq.finish_reason == "error" for seq in seqs):
            raise RuntimeError(f"no request could be completed: {seqs[0].stop_reason}")
        return results

    def _launch_behind(self) -> None:
        """Launch what the ends of the last step's sequences have made room for."""
        try:
            self._launch_ahead()
        except BaseException as error:
            self._fail(error)
            raise


def read_vector(seq: Sequence) -> np.ndarray:
    """What was read for a sequence that has ended: `[size]` float32."""
    assert isinstance(seq.readout, (LastHidden, MeanHidden))
    return seq.readout.vector


def facts(seq: Sequence) -> dict[str, Any]:
    """What results of both kinds have."""
    return {
        "prompt_token_ids": seq.token_ids[: seq.num_prompt_tokens],
        "num_cached_tokens": seq.num_cached_prompt_tokens or 0,
    }


def put_before(prompts: Any, before: str) -> Any:
    """Put a text before all prompts that are texts; those that are token ids stay as they are."""
    if isinstance(prompts, str):
        return before + prompts
    if isinstance(prompts, dict):
        is_text = isinstance(prompts.get("prompt"), str) and not prompts.get("prompt_token_ids")
        return {**prompts, "prompt": before + prompts["prompt"]} if is_text else prompts
    if isinstance(prompts, (list, tuple)):
        return [put_before(p, before) if isinstance(p, (str, dict)) else p for p in prompts]
    return prompts


def make_pairs(queries: str | list[str], documents: str | list[str]) -> list[tuple[str, str]]:
    """Pair each query with its document, or one query with all of them."""
    texts: list[list[str]] = []
    for name, given in (("queries", queries), ("documents", documents)):
        several = [given] if isinstance(given, str) else given
        if not isinstance(several, (list, tuple)) or not all(isinstance(t, str) for t in several):
            raise TypeError(f"{name} must be a string or a list of strings, not {given!r:.60}")
        texts.append(list(several))
    asked, answers = texts
    if len(asked) == 1:
        asked = asked * len(answers)
    if len(asked) != len(answers):
        raise ValueError(
            f"{len(asked)} queries for {len(answers)} documents; pass as many, or one query"
        )
    return list(zip(asked, answers, strict=True))
