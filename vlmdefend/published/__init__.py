"""Numbers as data, with source and protocol: what papers report, and what was measured with this package."""
