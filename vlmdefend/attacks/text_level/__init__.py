"""Attacks that change the class prompts."""
