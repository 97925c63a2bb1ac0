"""Formats the results of `distill`, `train` and `urda-train` as text."""
