"""Measures the ceilings of a machine, the job, and its alternatives, in turns in one run."""
