"""Learned prompts: context vectors and deep tokens, how they are read, run and stored."""
