"""A server of known speed, and the proof that the load generator measures it."""
