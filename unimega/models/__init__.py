"""From descriptions to modules."""
