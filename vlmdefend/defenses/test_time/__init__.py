"""Prompts or weights are adapted to each sample, then restored."""
