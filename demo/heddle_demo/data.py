"""Where the trained files of the demo lie, and each adapter's method. Imports nothing, so anyone may ask."""

from pathlib import Path

DATA_DIR = Path(__file__).parent / "data"
BASE_DIR = DATA_DIR / "base"
ADAPTERS_DIR = DATA_DIR / "adapters"
# Adapters that the demo does not start with: it uploads them while it runs.
UPLOAD_DIR = DATA_DIR / "upload"

BASE_NAME = "heddle-demo-base"

# Each adapter's method; what it does to an answer is in `styles`.
ADAPTERS: dict[str, str] = {
    "pirate": "LoRA r8, all linears",
    "json": "rsLoRA r16, all linears",
    "french": "LoRA r4, attention",
    "capitals": "IA3",
    "reversed": "LoRA r32, attention",
    "polite": "LoRA r2, MLP",
    "short": "LoRA r1, all linears",
    "cowboy": "DoRA r8, all linears",
    "eager": "prompt tuning, 16 tokens",
    "concierge": "prefix tuning, 11 tokens",
    "html": "bottleneck, 16 wide",
    "cheerful": "LoReFT r8, 8 tokens",
}
UPLOADS: dict[str, str] = {
    "robot": "LoRA r12, all linears",
}
