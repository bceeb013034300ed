"""The stages: each one function from settings and artifacts to one artifact."""
