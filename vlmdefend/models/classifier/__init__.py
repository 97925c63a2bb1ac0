"""Classifiers with a trained head on an image backbone."""
