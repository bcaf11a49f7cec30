"""From a prepared run to a proven adapter."""
