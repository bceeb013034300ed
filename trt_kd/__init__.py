"""Make a large language model smaller and faster, and prove what it cost."""

__version__ = "0.1.0"
