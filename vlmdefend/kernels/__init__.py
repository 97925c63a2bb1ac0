"""The attack steps that run once per iteration over every pixel, in place, in float32.

Each file holds one step in plain torch, in the exact order of operations that defines its bits.
"""
