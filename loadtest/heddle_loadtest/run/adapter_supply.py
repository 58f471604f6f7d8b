"""Adapters that the run itself brings to the target: which files there are, and uploading those that are missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.server_pages import ADAPTER_FILES
from heddle_loadtest.client.style import Style
from heddle_loadtest.errors import SpecError, TargetError


class AdapterSupply:
    """The folder that `--adapter-files` names, with one folder in PEFT's form for each adapter; or none."""

    def __init__(self, path: Path | None, style: Style) -> None:
        """Raises SpecError if `path` is no folder, or if the target takes no uploads."""
        self.path = path
        if path is not None and not path.is_dir():
            raise SpecError("adapter_files", path, "is no folder", "Make it with `heddle-loadtest adapters`")
        if path is not None and not style.takes_uploads:
            problem = f"cannot be given to a {style} server, which takes no uploads"
            raise SpecError("adapter_files", path, problem, "Start the server with the adapters that the run asks for")

    @property
    def names(self) -> frozenset[str]:
        """The adapters that can be uploaded."""
        if self.path is None:
            return frozenset()
        return frozenset(folder.name for folder in self.path.iterdir() if _is_whole(folder))

    def check_uploads(self, adapters: Iterable[str]) -> None:
        """Raises SpecError if one of `adapters`, which the run uploads on its way, cannot be."""
        lacking = sorted(set(adapters) - self.names)
        if not lacking:
            return
        if self.path is None:
            problem = "is not given, and the workload uploads adapters while it runs"
        else:
            problem = f"lacks {' or '.join(ADAPTER_FILES)} of {lacking[0]!r}, which the workload uploads"
        raise SpecError("adapter_files", self.path, problem, "Make them with `heddle-loadtest adapters`")

    async def upload(self, client: ChatClient, adapters: Iterable[str]) -> None:
        """Uploads what the target lacks, one after the other. Raises TargetError if it refuses one."""
        for adapter in adapters:
            assert self.path is not None, "nothing is missing that is not supplied"
            _, error = await client.pages.upload(adapter, self.path / adapter)
            if error is not None:
                problem = f"the target does not take it ({error.code}: {error.message})"
                raise TargetError("adapters", adapter, problem, "Make files that fit its base model")


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ADAPTER_FILES)
