"""`python -m heddle_server.settings_page > docs/settings.md`: the page of all settings, made from their declaration."""

from __future__ import annotations

from collections.abc import Iterator

from heddle_server.options import ServeOptions, expected, flag_of, variable_of, written
from heddle_server.serve_flags import CONFIG_FLAG, CONFIG_VARIABLE

INTRODUCTION = f"""# Settings

<!-- Made by `python -m heddle_server.settings_page > docs/settings.md`; a test holds this page to the code. -->

`heddle serve` and `heddle demo` take every setting in three ways, under one name:

| | |
|---|---|
| a flag | `--pool-bytes 2GiB` |
| an environment variable | `HEDDLE_POOL_BYTES=2GiB` |
| a key of a TOML file | `pool_bytes = "2GiB"` |

A flag wins over a variable, a variable over the file, the file over the default. The file is named with
`{CONFIG_FLAG} FILE` or `{CONFIG_VARIABLE}`; a key in it that is no setting is an error. An empty variable counts as
not set. Paths are taken from where the command is run, and `~` is the home folder.

```toml
# heddle.toml
quantization = "nf4"
pool_bytes = "9GiB"
max_model_len = 8192
store = "/var/lib/heddle"
host = "0.0.0.0"
```

    heddle serve Qwen/Qwen2.5-0.5B-Instruct {CONFIG_FLAG} heddle.toml --port 9000

A flag that is either on or off has a second form, `--no-double-quantization`. Sizes are bytes, or numbers with a unit:
KB, MB, GB and TB count in thousands, KiB, MiB, GiB and TiB in 1024. What is wrong is said with where it comes from:

```text
heddle: max_model_len in heddle.toml is 1; it must be a whole number, at least 2.
```

| Flag | Variable | Default | May be | |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(_rows())


def _rows() -> Iterator[str]:
    for name, field in ServeOptions.model_fields.items():
        default = written(name)
        shown = "" if default is None else f"`{default}`"
        assert field.description, f"nobody says what {name} is"
        yield f"| `{flag_of(name)}` | `{variable_of(name)}` | {shown} | {expected(name)} | {field.description} |\n"


if __name__ == "__main__":
    print(page(), end="")
