"""PEFT and transformers behind the same HTTP interface, so that one schedule measures all of them."""
