"""Rows of corpus files as documents: kinds, fields, checks."""
