"""Numbers of an engine that has done nothing yet, for tests that change the few they are about."""

from __future__ import annotations

from heddle_server.messages import EngineStats

STATS = EngineStats(
    num_running=0,
    num_waiting=0,
    num_pages=100,
    num_free_pages=100,
    num_kv_pages=0,
    num_cached_pages=0,
    num_adapter_pages=0,
    num_resident_adapters=0,
    num_steps=0,
    num_preemptions=0,
    num_pinned_pages=0,
    num_loading_pages=0,
    adapter_used_bytes=0,
    host_bytes=0,
    host_budget_bytes=0,
    num_host_adapters=0,
    num_device_hits=0,
    num_host_hits=0,
    num_misses=0,
    num_adapter_loads=0,
    num_adapter_evictions=0,
    num_host_evictions=0,
    num_prefix_queries=0,
    num_prefix_hits=0,
    num_prefix_evictions=0,
    num_segments=0,
    num_computed_tokens=0,
    step_seconds=0.0,
    host_seconds=0.0,
)
