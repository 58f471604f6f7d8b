"""The API process: HTTP, text, the adapter store. Never imports torch."""
