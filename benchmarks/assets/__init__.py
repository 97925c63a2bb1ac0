"""Rebuild the embedded images and models from public packages."""
