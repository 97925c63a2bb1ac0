"""Training: one loop for every objective, one job per command."""
