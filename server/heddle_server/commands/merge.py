"""`heddle adapters merge`: one new adapter out of several of a store, without a server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from heddle_server.commands.failure import as_one_line
from heddle_server.sizes import format_size

if TYPE_CHECKING:
    from heddle_adapters.base_layout import BaseLayout
    from heddle_adapters.merge import Merged, MergePart

Method = Literal["linear", "ties", "dare_linear", "dare_ties"]


def parse_part(text: str) -> tuple[str, float]:
    """The reference and the weight of "sql@3=0.7"; of "sql" the weight is 1."""
    reference, separator, weight = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not 0 < abs(number) <= 100:
        raise typer.BadParameter(f"{weight!r} is no weight; write for example sql@3=0.7, at most 100 and not 0.")
    return reference, number


def merge_command(
    part: Annotated[
        list[str], typer.Option("--part", metavar="REF=WEIGHT", help="For example sql@3=0.7; give it more than once.")
    ],
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="Their base, for its shapes: directory or hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the new adapter.")],
    method: Annotated[Method, typer.Option("--method", help="How they become one.")] = "linear",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of each one's elements that stays; not for linear.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what dare_* drops.")] = 0,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Make a LoRA of this rank, and say how far off it is.")
    ] = None,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="TENANT", help="Whose adapters (default: those of no tenant).")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", envvar="HEDDLE_STORE", help="Folder that keeps them (default: `heddle serve`'s)."),
    ] = None,
) -> None:
    """Make one adapter of several that are registered, by what they add to the base's weights.

    LoRAs that are simply added (linear) become one LoRA, exactly. Everything else becomes an adapter of single
    elements, which a server takes with --allow-dense-adapters, or with --rank the nearest LoRA of that rank.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it regrets the absence of a hub client
    from heddle_adapters.errors import AdapterError
    from heddle_adapters.merge import Recipe, merge
    from heddle_adapters.merged_files import write_merged
    from heddle_server.config import ConfigError
    from heddle_server.options import DEFAULT_STORE

    if (method == "linear") != (density is None):
        wanted = "linear keeps everything: leave --density out" if density else f"{method} needs --density"
        raise typer.BadParameter(f"{wanted}; it is the share of elements that stays, for example 0.2.")
    if density is not None and not 0 < density <= 1:
        raise typer.BadParameter(f"--density is {density:g}; it must be more than 0 and at most 1.")
    weights = [parse_part(each) for each in part]
    with as_one_line(AdapterError, ConfigError, OSError, status=1):
        layout = _layout(base)
        parts, fingerprint = _read((store or DEFAULT_STORE).expanduser(), weights, owner, layout)
        merged = merge(parts, Recipe(method, 1.0 if density is None else density, seed, rank), layout)
        write_merged(out, merged, base, fingerprint)
    typer.echo(_summary(len(parts), merged, rank))
    size = format_size(sum(file.stat().st_size for file in out.iterdir()))
    typer.echo(f"{out} has it ({size}); heddle adapters push {out}")


def _layout(base: str) -> BaseLayout:
    """From its config.json alone."""
    from heddle_adapters.base_layout import BaseLayout
    from heddle_server.estimate.base_outline import outline
    from heddle_server.options import load_options

    # Of a hub id only the description is fetched.
    options = load_options({"load_format": "dummy"}).model_copy(update={"adapters": None})
    config = options.config(base).engine
    described = outline(config, "cpu")
    return BaseLayout(config.model_name, "", described.quantization, described.sites, allows_dense=True)


def _read(
    store: Path, weights: list[tuple[str, float]], owner: str | None, layout: BaseLayout
) -> tuple[list[MergePart], str | None]:
    """The parts, and the base that they say they were trained on; a server may be using the store meanwhile."""
    from msgspec.structs import replace

    from heddle_adapters.adapter_config import AdapterConfig
    from heddle_adapters.catalog import Catalog
    from heddle_adapters.content_folder import content_paths, open_content
    from heddle_adapters.errors import AdapterError, AdapterNotFound, quoted
    from heddle_adapters.merge import MergePart
    from heddle_adapters.store_index import LOCAL_OWNER, read_records

    index = store / "index.sqlite3"
    if not index.is_file():
        raise AdapterError(f"{store} is no adapter store; see --store.")
    catalog = Catalog(read_records(index))
    parts, fingerprint = list[MergePart](), None
    for reference, weight in weights:
        version = catalog.meaning(reference, owner or LOCAL_OWNER)
        if version is None:
            raise AdapterNotFound(f"{owner or LOCAL_OWNER} has no adapter {quoted(reference)} in {store}.")
        config = AdapterConfig.parse(content_paths(store, version.digest).config.read_bytes())
        named = config.text("heddle_base_fingerprint")
        if named and fingerprint and named != fingerprint:
            raise AdapterError(f"{version.reference} was trained on another base than the others; leave it out.")
        fingerprint = named or fingerprint
        checkpoint = open_content(store, version.digest, replace(layout, fingerprint=named or ""))
        parts.append(MergePart(version.reference, checkpoint, weight))
    return parts, fingerprint


def _summary(num_parts: int, merged: Merged, rank: int | None) -> str:
    if merged.elements:
        num_weights = sum(delta.shape[0] * delta.shape[1] for delta in merged.elements.values())
        share = sum(len(delta.values) for delta in merged.elements.values()) / num_weights
        where = f"{len(merged.elements)} modules"
        return f"{num_parts} adapters are one of single elements: {share:.2%} of the weights of {where}, exact"
    ranks = sorted({len(rows) for rows in merged.rows.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    precision = "exact" if rank is None else f"relative error {merged.relative_error:.3g}"
    return f"{num_parts} adapters are one LoRA of rank {shown} at {len(merged.rows)} modules, {precision}"
