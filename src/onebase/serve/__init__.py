"""Serving: many adapters over one base, continuously batched; knows nothing of training."""
