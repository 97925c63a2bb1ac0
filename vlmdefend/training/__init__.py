"""The training room: one loop for every objective."""
