"""How a script of this folder ends: a table, then the record as one line of JSON."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from trt_kd.errors import TrtKdError

R = TypeVar("R")


def shown(measure: Callable[[], R], table: Callable[[R], str] | None = None) -> int:
    """Print the ``table`` of what ``measure`` returns, then that as JSON; return the exit code.

    What a user can mend is told in two lines, exit code 2; a child that failed has said why.
    """
    try:
        record = measure()
    except TrtKdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    if table is not None:
        print(table(record))
    print(json.dumps(record))
    return 0
