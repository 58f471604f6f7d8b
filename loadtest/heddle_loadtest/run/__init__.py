"""A schedule put on a target: dispatch, warm-up, scrapes, the client's own health."""
