"""Attacks that use logits only, never a gradient."""
