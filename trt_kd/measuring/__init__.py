"""Measuring: the one clock, statistics of repeats, the roofline, the state of the machine."""
