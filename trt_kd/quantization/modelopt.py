"""Model Optimizer, imported and run without its noise."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from trt_kd.optional import require

log = logging.getLogger(__name__)


def modelopt(module: str) -> Any:
    """Import ``modelopt.torch.<module>``; what its own imports warn of is left out.

    Raises:
        MissingDependencyError: if Model Optimizer is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require(f"modelopt.torch.{module}", extra="compress")


@contextmanager
def quiet() -> Iterator[None]:
    """Send what Model Optimizer prints to the log, and leave out its warnings."""
    printed = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(printed):
        warnings.filterwarnings("ignore", module=r"(modelopt|pulp)\.")
        yield
    for line in printed.getvalue().splitlines():
        log.debug("modelopt: %s", line)
