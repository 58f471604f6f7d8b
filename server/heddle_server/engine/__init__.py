"""The engine process: the base, the page pool, the scheduler. Knows token ids, not text."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it regrets the absence of a hub client
