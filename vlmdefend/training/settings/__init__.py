"""Settings that all training commands share."""
