"""One seed for every generator a stage may touch."""

import random
import sys


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators; the last two only where loaded."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
