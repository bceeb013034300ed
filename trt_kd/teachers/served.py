"""A teacher behind a server: a black box that says its likeliest tokens."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from typing_extensions import Self

from trt_kd.config import KeyVariable, ServerAddress
from trt_kd.errors import ConfigError
from trt_kd.teachers.base import Demand, Teacher

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from trt_kd.losses.base import KDLoss
    from trt_kd.teachers.cache import Cache
    from trt_kd.teachers.endpoint import Endpoint
    from trt_kd.teachers.forward import Rows


class ServedTeacher(Teacher):
    """Ask an OpenAI-compatible server for top log-probabilities once, then train on the cache."""

    needs_checkpoint: ClassVar[bool] = False

    kind: Literal["served"] = "served"
    """Name in the registry."""
    url: ServerAddress
    """Where the API begins, such as ``http://127.0.0.1:8000/v1``; no part of a run's identity or
    manifest."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model at the server; it stands for the teacher in a run's identity, so a server
    must not give it to another model."""
    k: PositiveInt = 20
    """Tokens kept per position; vLLM returns at most 20 unless started with --max-logprobs."""
    form: Literal["prompt_logprobs", "echo"] = "prompt_logprobs"
    """``prompt_logprobs``: vLLM's, by token id; ``echo``: OpenAI's completions, by text."""
    key_env: KeyVariable = None
    """Environment variable that holds the server's key; the key is never stored. Like ``url`` and
    what follows it is no part of a run's identity or manifest."""
    parallel: Annotated[PositiveInt, Field(exclude=True)] = 4
    """Requests at a time, one block each."""
    timeout_s: Annotated[PositiveFloat, Field(exclude=True)] = 120.0
    """Seconds that one request may take."""
    retries: Annotated[NonNegativeInt, Field(exclude=True)] = 5
    """Further attempts where the server is busy or away, after 1, 2, 4, ... seconds."""
    cache: Annotated[Path | None, Field(exclude=True)] = None
    """Folder shared between runs; without one, the run's own, removed in the end."""

    @field_validator("max_dropped_mass")
    @classmethod
    def _is_not_known(cls, limit: float) -> float:
        if limit != Teacher.model_fields["max_dropped_mass"].default:
            raise ValueError("has no effect: a token that the student lacks is refused")
        return limit

    def targets(self, directory: Path, demand: Demand) -> "Cache":
        """See the base class; ``directory`` is read for its tokenizer and vocabulary only.

        Raises:
            ArtifactError: if the disk lacks space, or the cache is damaged.
            ConfigError: if the variable of the key is not set.
            ServerError: if the server does not answer, or not about these tokens.
        """
        from trt_kd.architectures.shape import read_shape
        from trt_kd.artifacts.manifest import sha256_of
        from trt_kd.teachers.identity import Identity
        from trt_kd.teachers.shards import Contents
        from trt_kd.teachers.writing import fill_cache

        endpoint = self.endpoint()
        size = demand.vocabulary or read_shape(directory).vocab
        identity = Identity(
            teacher=hashlib.sha256(f"served {self.model}".encode()).hexdigest(),
            tokenizer=sha256_of(directory / "tokenizer.json"),
            vocabulary=size,
            precision="served",
        )
        return fill_cache(
            self.cache or demand.work / "logits",
            lambda: self._asking(endpoint, directory, size),
            demand.blocks,
            contents=Contents(k=self.k, identity=identity),
            batch_size=4 * self.parallel,
        )

    def endpoint(self) -> "Endpoint":
        """The client.

        Raises:
            ConfigError: if the variable of the key is not set.
        """
        from trt_kd.teachers.endpoint import Endpoint

        key = os.environ.get(self.key_env) if self.key_env else None
        if self.key_env and not key:
            raise ConfigError(
                f"the environment variable {self.key_env} is not set",
                hint="put the server's key in it, or leave out teacher.key_env",
            )
        return Endpoint(self.url, self.model, key, self.timeout_s, self.retries)

    def problem(self, loss: "KDLoss") -> str | None:
        """See the base class."""
        return loss.top_k_problem()

    def rehearsal(self) -> Self:
        """See the base class; the server is asked about the rehearsal's few blocks."""
        return self.model_copy(update={"cache": None})

    def _asking(
        self, endpoint: "Endpoint", directory: Path, size: int
    ) -> "Callable[[NDArray[np.int64]], list[Rows]]":
        """What gives the rows of blocks ``[B, L]``, some requests at a time."""
        from trt_kd.checkpoints import load_tokenizer
        from trt_kd.teachers.answers import Texts, rows_of

        texts = Texts(load_tokenizer(directory), size)
        settings = (
            {"prompt_logprobs": self.k}
            if self.form == "prompt_logprobs"
            else {"echo": True, "logprobs": self.k}
        )

        def one(tokens_L: "NDArray[np.int64]") -> "Rows":
            choice = endpoint.complete(prompt=tokens_L.tolist(), **settings)
            try:
                return rows_of(choice, tokens_L, k=self.k, texts=texts, size=size)
            except ValueError as error:
                hint = "needed: vLLM's prompt_logprobs, or completions with echo, one tokenizer"
                raise endpoint.problem(str(error), hint) from error

        def rows(blocks_BL: "NDArray[np.int64]") -> "list[Rows]":
            with ThreadPoolExecutor(self.parallel) as pool:
                asked = [pool.submit(one, tokens_L) for tokens_L in blocks_BL]
                try:
                    return [future.result() for future in asked]
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)

        return rows
