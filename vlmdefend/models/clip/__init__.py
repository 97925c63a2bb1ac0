"""CLIP models of open_clip: built, loaded, and turned into zero-shot classifiers."""
