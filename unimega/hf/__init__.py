"""Hugging Face folders: parameter tables, reading, conversion."""
