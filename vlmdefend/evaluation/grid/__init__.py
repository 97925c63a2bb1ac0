"""The grid of an evaluation: options to cells, before anything is loaded."""
