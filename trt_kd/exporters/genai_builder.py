"""Run ONNX Runtime GenAI's model builder, also under a transformers older than it expects.

The builder of version 0.18 imports classes of the newest models at its top and so refuses
transformers 4.57 altogether. Classes that are absent are stood in for here; none of them is used
for the model types that are exported. Run as a script, with the builder's own arguments.
"""

import importlib
import re
import runpy
import sys
from typing import Any

_ABSENT = re.compile(r"cannot import name '(\w+)' from 'transformers'")


def run(module: str, added: frozenset[str] = frozenset()) -> None:
    """Run ``module`` as a program; add to transformers, one by one, the classes it lacks.

    Raises:
        ImportError: if anything else is missing.
    """
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ImportError as error:
        absent = _ABSENT.match(str(error))
        if absent is None or absent[1] in added:
            raise
        transformers: Any = importlib.import_module("transformers")
        setattr(transformers, absent[1], type(absent[1], (), {}))
    else:
        return
    run(module, added | {absent[1]})


if __name__ == "__main__":
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # a third of the start, never used
    sys.path.pop(0)  # the folder of this file, whose modules must not stand in for others
    run("onnxruntime_genai.models.builder")
