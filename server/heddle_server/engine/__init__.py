"""The engine process: the base, the page pool, the scheduler. Knows token ids, not text."""
