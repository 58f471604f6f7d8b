"""The one adapter name that means something by itself."""

BASE = "base"  # the base model, no adapter
