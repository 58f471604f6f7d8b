"""One request to one OpenAI-compatible server, and what came of it."""
