"""Tensor functions that know nothing of adapters as values: torch only, each with a plain reference."""
