"""Test-time adaptation: prompts or tokens are tuned for each sample, then restored."""
