"""The server: OpenAI's API, metrics and a page over the engine of serve/."""
