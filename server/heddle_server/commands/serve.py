"""`heddle serve`"""

from __future__ import annotations

from typing import Annotated

import typer

from heddle_server.options import ServeOptions
from heddle_server.serve_flags import with_serve_options

app = typer.Typer()


@app.command("serve")
@with_serve_options()
def serve_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id of a transformers causal LM.")],
    options: ServeOptions,
) -> None:
    """Serve MODEL and its adapters over an OpenAI-compatible API.

    Every option is also an environment variable, --pool-bytes is HEDDLE_POOL_BYTES, and a key of the --config file,
    pool_bytes = "2GiB". A flag wins over a variable, a variable over the file.
    """
    from heddle_server.api.serving import serve

    serve(options.config(model))
