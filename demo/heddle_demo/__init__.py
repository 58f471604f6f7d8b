"""The embedded default of heddle: a small trained base, trained adapters, and the scripts that made them."""

from heddle_demo.data import ADAPTERS, ADAPTERS_DIR, BASE_DIR, BASE_NAME, UPLOAD_DIR, UPLOADS
from heddle_demo.styles import STYLES
from heddle_demo.world import Example, held_out, questions

__all__ = [
    "ADAPTERS",
    "ADAPTERS_DIR",
    "BASE_DIR",
    "BASE_NAME",
    "STYLES",
    "UPLOADS",
    "UPLOAD_DIR",
    "Example",
    "held_out",
    "questions",
]
