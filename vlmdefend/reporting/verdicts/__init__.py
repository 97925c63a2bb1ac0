"""Turns records into verdict rows: clean, per-attacker and worst-case accuracy with intervals and doubts."""
