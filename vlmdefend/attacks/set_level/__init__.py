"""Attacks that learn one perturbation for a whole set of images."""
