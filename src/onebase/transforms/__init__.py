"""Adapters in, an adapter or a plain model out: combine, merge, export."""
