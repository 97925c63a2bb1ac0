"""Saved sets of adversarial images: written by `attack`, scored by `evaluate --adversarial`."""
