"""The classes of results of `embed` and `score`, which are dicts as those of `generate` are."""

from typing import Any

from nanovllm.results import item


class PoolingOutput(dict[str, Any]):
    """What both have. Each attribute is an item of the dict, under the same name."""

    prompt_token_ids: list[int] = item("prompt_token_ids")
    # Tokens of the prompt that were found in the prefix cache.
    num_cached_tokens: int = item("num_cached_tokens")

    request_id: str = ""  # no item: the number of the request, as a string
    finished: bool = True  # nothing is returned before it has ended


class EmbeddingRequestOutput(PoolingOutput):
    """What `embed` returns for a prompt."""

    embedding: list[float] = item("embedding")

    @property
    def hidden_size(self) -> int:
        """How many numbers the vector has."""
        return len(self.embedding)

    @property
    def outputs(self) -> "EmbeddingRequestOutput":
        """This result itself, of which scripts written for vLLM read `.outputs.embedding`."""
        return self


class ScoringRequestOutput(PoolingOutput):
    """What `score` returns for a pair."""

    # From 0 to 1, how likely it is that the document answers the query; of an embedding model the
    # cosine of the angle between the two, from -1 to 1.
    score: float = item("score")

    @property
    def outputs(self) -> "ScoringRequestOutput":
        """This result itself, of which scripts written for vLLM read `.outputs.score`."""
        return self
