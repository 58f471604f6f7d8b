"""The engine process: the base, the page pool, the scheduler. Knows token ids, not text."""

import logging

# At import it regrets the absence of a hub client, and in every int8 layer of every step that activations pass through
# float16 on their way to int8.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
