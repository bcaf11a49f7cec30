"""Rows to batches: read -> split -> template -> pack -> checks -> preview, each importing only what is before it."""
