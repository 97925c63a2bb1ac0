"""Unsupervised robust domain adaptation: `urda-train`."""
