"""Random LoRAs for any base, put into a store as an upload would."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterVersion
from heddle_adapters.tensor_file import WEIGHTS_FILE


class RandomUploads:
    """Rank-exact LoRAs on every linear but the head, strong enough to change any answer."""

    def __init__(self, store: AdapterStore, base: BaseLayout) -> None:
        self.store = store
        self.base = base

    def put(self, name: str, *, rank: int, seed: int, alpha: float = 8.0, strength: float = 0.3) -> AdapterVersion:
        random = np.random.default_rng(seed)
        sites = [site for path, site in self.base.by_path("linear").items() if path != "lm_head"]
        tensors = {
            f"base_model.model.{site.path}.{part}.weight": random.normal(0, strength, shape).astype(np.float32)
            for site in sites
            for part, shape in (("lora_A", (rank, site.in_features)), ("lora_B", (site.out_features, rank)))
        }
        targets = sorted({site.path.rpartition(".")[2] for site in sites})
        config = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}).encode()
        with self.store.upload_folder() as folder:
            weights_path = folder / WEIGHTS_FILE
            save_file(tensors, weights_path)
            checkpoint = read_checkpoint(config, weights_path, self.base)
            return self.store.put(name, checkpoint, config, weights_path)
