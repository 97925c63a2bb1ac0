"""Training of CLIP models: `train` and `distill`."""
