"""Augmented views and resampling of images, shared by several defenses."""
