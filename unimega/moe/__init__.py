"""Routed experts: router, balance losses, capacity, experts, and the FFN module they make."""
