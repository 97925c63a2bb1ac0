"""Training-free defenses: the model is untouched, its input or its embedding is changed."""
