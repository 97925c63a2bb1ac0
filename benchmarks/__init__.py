"""Benchmarks: run each as a module from the project's root, ``python -m benchmarks.speed.pgd``."""
