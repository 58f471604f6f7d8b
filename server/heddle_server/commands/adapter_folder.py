"""The folders that commands take adapters from."""

from __future__ import annotations

from pathlib import Path

import typer


def check_folder(folder: Path) -> None:
    """Raises `typer.BadParameter`, with a remedy, for one that lacks one of an adapter's two files."""
    from heddle_server.adapters_client import FILES

    for file in FILES:
        if not (folder / file).is_file():
            is_pickle = (folder / file).with_suffix(".bin").exists()
            remedy = (
                f"a .bin file is not read: `heddle adapters convert {folder} OUT` makes safetensors of it"
                if is_pickle
                else "give the folder that PEFT's save_pretrained wrote"
            )
            raise typer.BadParameter(f"{folder} has no {file}; {remedy}.")
