"""Statistics over records and per-image rows: intervals, paired tests, diagnostics. Torch-free."""
