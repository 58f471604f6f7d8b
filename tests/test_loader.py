"""Reading adapters beside the engine's thread: whatever happens to the files, whoever waits hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from adapter_samples import BASE, config_bytes, lora_config, lora_tensors, write_weights
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.content_folder import ContentFolder
from heddle_adapters.device_rows import DeviceRows
from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.loader import AdapterLoader
from heddle_adapters.page_pool import PagePool
from heddle_adapters.row_compiler import RowCompiler
from heddle_adapters.tensor_file import WEIGHTS_FILE

PAGE_BYTES = 128
NUM_PAGES = 8
SECONDS = 20.0  # that a loaded machine may take for anything here


@pytest.fixture
def compiler(tmp_path: Path) -> RowCompiler:
    return RowCompiler(tmp_path, BASE, "float32", PAGE_BYTES, {})


@pytest.fixture
def loader(compiler: RowCompiler) -> Iterator[AdapterLoader]:
    memory = torch.zeros(NUM_PAGES * PAGE_BYTES, dtype=torch.uint8)
    rows = DeviceRows(memory, PagePool(NUM_PAGES, PAGE_BYTES, EvictionOrder("lru")), torch.float32, BASE, {})
    loader = AdapterLoader(compiler, rows, on_done=lambda: None)
    yield loader
    loader.close()


@pytest.fixture
def digest(tmp_path: Path) -> str:
    folder = ContentFolder(tmp_path)
    with folder.upload_folder() as upload:
        weights = write_weights(upload / WEIGHTS_FILE, lora_tensors())
        digest = read_checkpoint(config_bytes(lora_config()), weights, BASE).digest
        folder.add(digest, config_bytes(lora_config()), weights)
    return digest


def test_damaged_rows_are_made_again(loader: AdapterLoader, compiler: RowCompiler, digest: str) -> None:
    sound = loader.read(digest).result(SECONDS)
    path = compiler.rows_path(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    np.testing.assert_array_equal(loader.read(digest).result(SECONDS).pages, sound.pages)


def test_rows_that_can_neither_be_read_nor_removed_fail_their_requests_and_hold_up_nobody(
    loader: AdapterLoader, compiler: RowCompiler, digest: str
) -> None:
    path = compiler.rows_path(digest)
    path.mkdir(parents=True)
    for _ in range(3):  # more than there are readers
        with pytest.raises((IsADirectoryError, PermissionError)):
            loader.read(digest).result(SECONDS)
    path.rmdir()
    assert loader.read(digest).result(SECONDS).digest == digest
