"""Optional packages: imported where they are used, named with the extra that brings them."""

from importlib import import_module
from types import ModuleType

from trt_kd.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, which ``pip install 'trt-kd[extra]'`` provides.

    Raises:
        MissingDependencyError: if ``module`` itself is absent. A package that is present
            but broken raises its own error, which is never hidden.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingDependencyError(
            f"{module} is not installed", hint=f"pip install 'trt-kd[{extra}]'"
        ) from error
