"""Rows in files to a corpus: plan, workers, parts, merge."""
