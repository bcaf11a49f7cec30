"""What is wrong with an adapter, and how two differ: reading what can be read, measures, and a table of checks."""
