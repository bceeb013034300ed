"""Which runtime each variant of a benchmark runs in: the one that is named, or its own."""

from collections.abc import Collection, Mapping
from typing import Any

from trt_kd.artifacts import Artifact
from trt_kd.backends import BACKENDS
from trt_kd.backends.base import Backend, backend_for, check_reads
from trt_kd.config import validate
from trt_kd.errors import ConfigError
from trt_kd.registry import Registry


def check_names(named: Collection[str], variants: Collection[str]) -> None:
    """Check that every name of ``named`` is one of ``variants``.

    Raises:
        ConfigError: if one is not.
    """
    for name in named:
        if name not in variants:
            raise ConfigError(
                f"benchmark.backends: there is no variant {name!r}",
                hint=f"available: {', '.join(variants)}",
            )


def choose(
    named: Mapping[str, Backend], variants: Mapping[str, Artifact], threads: int | None
) -> dict[str, Backend]:
    """The runtime of every variant, on ``threads`` where that is a number.

    Raises:
        ConfigError: if ``named`` has a name that is no variant's, or a runtime takes no threads.
        ArtifactError: if a runtime does not load the variant, or none does.
        MissingDependencyError: if one that is named is not installed.
    """
    check_names(named, variants)
    chosen = {name: named.get(name) or backend_for(each) for name, each in variants.items()}
    for name, backend in named.items():
        check_reads(backend, variants[name])
        backend.check()
    if threads is None:
        return chosen
    return {name: _on(backend, threads, name) for name, backend in chosen.items()}


def _on(backend: Backend, threads: int, name: str) -> Backend:
    registry: Registry[Any] = BACKENDS
    settings = backend.model_dump(mode="json") | {"threads": threads}
    made: Backend = validate(registry.load(backend.kind), settings, where=f"variant {name}")
    return made
