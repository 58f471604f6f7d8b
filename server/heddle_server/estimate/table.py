"""An estimate for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from heddle_server.estimate.capacity import Estimate
from heddle_server.sizes import format_count, format_size


def as_table(model: str, estimate: Estimate) -> RenderableType:
    base, wanted = estimate.base, estimate.wanted
    table = Table(f"{model} on {estimate.device}", "", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, value in _rows(estimate):
        table.add_row(name, value)
    fits = (
        f"{estimate.num_adapters} of {wanted.num_adapters} adapters of rank {wanted.rank} are on the device at once, "
        f"beside {estimate.num_requests} requests of {wanted.context} tokens."
    )
    return Group(table, Text(fits, style="bold"), *(Text(line) for line in _remarks(estimate, base.dtype)))


def _rows(estimate: Estimate) -> Iterator[tuple[str, str]]:
    base, wanted = estimate.base, estimate.wanted
    if base.quantized_bytes:
        yield f"weights in {base.quantization}", format_size(base.quantized_bytes)
    yield f"weights in {base.dtype}", format_size(base.weights_bytes - base.quantized_bytes)
    if estimate.memory_bytes is not None:
        yield "memory", format_size(estimate.memory_bytes)
    yield "page pool", format_size(estimate.pool_bytes)
    yield "  pages", f"{estimate.num_pages} of {format_size(base.page_bytes)}"
    yield "  tokens, without adapters", format_count(estimate.most_tokens)
    yield "  adapters, without a token", format_count(estimate.most_adapters)
    yield "keys and values of a token", format_size(estimate.kv_bytes_per_token)
    linears = "all linears" if wanted.targets == "all" else "attention"
    yield f"an adapter, rank {wanted.rank} on {linears}", format_size(estimate.bytes_per_adapter)
    yield "  its file, in float32", format_size(estimate.adapter_file_bytes)
    yield f"{wanted.num_adapters} adapters in host memory", format_size(estimate.host_bytes)


def _remarks(estimate: Estimate, dtype: str) -> Iterator[str]:
    if not estimate.num_requests:
        yield (
            f"A request of {estimate.wanted.context} tokens does not fit: the pool holds {estimate.most_tokens}. "
            "Take a smaller --context, more memory, or a smaller base."
        )
    elif estimate.wanted.num_adapters and not estimate.num_adapters:
        yield "No adapter fits beside such a request: take a smaller --rank or --context, or more memory."
    elif estimate.num_adapters < estimate.wanted.num_adapters:
        yield (
            "The others wait in host memory and on disk, and are brought in when they are asked for: "
            f"--host-cache-bytes {estimate.host_bytes} keeps all of them ready."
        )
    yield f"To have exactly this pool: --pool-bytes {estimate.pool_bytes}"
    yield (
        "From config.json alone. Weights, pages and adapters are counted as the server counts them. That activations "
        "and the device's own needs, which are not counted, fit into the rest is an assumption. How fast it "
        "would be is not estimated: `heddle bench step --shape` measures."
    )
