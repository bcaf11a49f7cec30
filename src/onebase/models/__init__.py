"""Base models: find, fetch, convert, check and load them; the only package that imports transformers."""
