"""The server: HTTP API, engine process, scheduler, KV cache, model loading, sampling."""
