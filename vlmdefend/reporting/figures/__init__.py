"""Draws figures: contact sheets and heat maps."""
