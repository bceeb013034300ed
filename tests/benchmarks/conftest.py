"""Scripts import from each other, as they do when they are run."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def beside_each_other():
    """Put the folder of the scripts on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield
