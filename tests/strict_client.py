"""OpenAI's own client, which refuses what is not of its types."""

from __future__ import annotations

import openai


def strict_client(address: object) -> openai.OpenAI:
    """For the server at an address; to be closed, as in `with`."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, _strict_response_validation=True)
