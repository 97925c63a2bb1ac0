"""Weight files and model folders: read safely, copied by name, fetched from a hub."""
