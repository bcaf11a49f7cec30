"""Adapters as values: what carries an update, where it goes, how it is put on a model and taken off."""
