"""Stands in for vLLM: the documented names that our backend uses, and nothing else."""

from vllm.sampling_params import SamplingParams

__all__ = ["SamplingParams"]
