"""Records and per-image rows on disk, and the keys under which they are found again."""
