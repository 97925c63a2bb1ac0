"""Two run folders compared image by image."""
