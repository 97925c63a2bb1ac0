"""Results of `distill`, `train` and `urda-train` as text."""
