"""The parts of serve_soak.py: the server as a process, the right answers, the clients, and what disturbs them."""
