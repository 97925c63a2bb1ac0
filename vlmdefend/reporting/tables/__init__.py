"""Verdict rows as tables: terminal, Markdown, LaTeX, CSV, Parquet."""
