"""Every setting as a flag, a variable and a key of a file; what wins; what is said of a wrong one; where it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from byte_tokenizer import save_tokenizer
from heddle_server.cli import app
from heddle_server.config import ConfigError, EngineConfig, ServerConfig
from heddle_server.options import ServeOptions, expected, flag_of, load_options, variable_of
from heddle_server.settings_page import page
from heddle_server.sizes import format_count, format_size, parse_size

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
OTHER = {  # than the default, in the words of each place: typed, and in TOML
    "model_name": ("other", '"other"'),
    "quantization": ("int8", '"int8"'),
    "double_quantization": ("false", "false"),
    "load_format": ("dummy", '"dummy"'),
    "base_cache": ("bf16", '"bf16"'),
    "kernels": ("reference", '"reference"'),
    "overlap": ("off", '"off"'),
    "dtype": ("float32", '"float32"'),
    "device": ("cpu", '"cpu"'),
    "pool_bytes": ("2GiB", '"2GiB"'),
    "memory_fraction": ("0.5", "0.5"),
    "host_cache_bytes": ("0", "0"),
    "eviction": ("lru", '"lru"'),
    "tenant_pool_share": ("0.25", "0.25"),
    "allow_dense_adapters": ("true", "true"),
    "max_model_len": ("128", "128"),
    "max_batch_tokens": ("64", "64"),
    "max_batch_requests": ("2", "2"),
    "threads": ("1", "1"),
    "store": ("/tmp/store", '"/tmp/store"'),
    "adapters": ("/tmp/adapters", '"/tmp/adapters"'),
    "keep_versions": ("3", "3"),
    "max_upload_bytes": ("5MB", '"5MB"'),
    "max_body_bytes": ("64KiB", "65536"),
    "max_queued_requests": ("8", "8"),
    "max_queue_seconds": ("1.5", "1.5"),
    "max_engine_restarts": ("0", "0"),
    "host": ("0.0.0.0", '"0.0.0.0"'),
    "port": ("9000", "9000"),
    "allow_anonymous": ("true", "true"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tokenizer(tmp_path / "my-model")
    (folder / "config.json").write_text("{}")
    return folder


def settings_file(folder: Path, content: str) -> Path:
    file = folder / "heddle.toml"
    file.write_text(content)
    return file


def test_every_setting_is_tried_here() -> None:
    assert set(OTHER) == set(ServeOptions.model_fields)


@pytest.mark.parametrize("name", OTHER)
def test_each_place_says_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed, in_file = OTHER[name]
    by_flag = load_options({name: typed})
    monkeypatch.setenv(variable_of(name), typed)
    by_variable = load_options({})
    monkeypatch.delenv(variable_of(name))
    by_file = load_options({}, settings_file(tmp_path, f"{name} = {in_file}"))
    values = [getattr(options, name) for options in (by_flag, by_variable, by_file)]
    assert values[0] == values[1] == values[2] != ServeOptions.model_fields[name].default
    assert {type(value) for value in values} == {type(values[0])}


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_every_setting_is_a_flag(command: str) -> None:
    found = {flag for option in get_command(app).commands[command].params for flag in option.opts}  # type: ignore[attr-defined]
    assert {flag_of(name) for name in ServeOptions.model_fields} <= found
    assert "--config" in found


def test_flag_before_variable_before_file_before_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settings_file(tmp_path, "port = 1\nmax_batch_requests = 1\nthreads = 1")
    monkeypatch.setenv("HEDDLE_PORT", "2")
    monkeypatch.setenv("HEDDLE_MAX_BATCH_REQUESTS", "2")
    monkeypatch.setenv("HEDDLE_THREADS", "")  # as if it were not there
    options = load_options({"port": "3"}, file)
    assert (options.port, options.max_batch_requests, options.threads, options.max_batch_tokens) == (3, 2, 1, 2048)


def test_the_commands_flags_variables_and_file_end_in_one_server(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting that cannot be served comes from each place in turn, and is named as it stands there."""
    file = settings_file(tmp_path, "max_model_len = 1")

    def refusal(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["serve", str(model), "--store", str(tmp_path), *arguments])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        return result.stderr

    assert f"max_model_len in {file} is 1; it must be a whole number, at least 2." in refusal("--config", str(file))
    monkeypatch.setenv("HEDDLE_CONFIG", str(file))
    assert f"max_model_len in {file} is 1" in refusal()
    monkeypatch.setenv("HEDDLE_MAX_MODEL_LEN", "0")
    assert "heddle: HEDDLE_MAX_MODEL_LEN is 0; it must be" in refusal()
    assert "heddle: --max-model-len is many; it must be" in refusal("--max-model-len", "many")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pool-bytes = 5", r"sets pool-bytes, which is no setting; did you mean pool_bytes\?"),
        ("max_batch_token = 5", r"sets max_batch_token, which is no setting; did you mean max_batch_tokens\?"),
        ("xyzzy = 5", "sets xyzzy, which is no setting; `heddle serve --help` lists all"),
        ("[server]\nport = 5", "sets server, which is no setting"),
        ("port = ", "is not TOML"),
        ("port = [5]", r"port in .*heddle\.toml is \[5\]; it must be a whole number, at least 0 and at most 65535"),
        ("dtype = 16", r"dtype in .*heddle\.toml is 16; it must be one of auto, bfloat16"),
        ('pool_bytes = "3 apples"', r"pool_bytes in .*heddle\.toml is 3 apples; it must be a size such as 512MiB"),
        ("double_quantization = 7", r"is 7; it must be true or false"),
        ("memory_fraction = 0.0", "is 0.0; it must be a number, more than 0 and at most 1"),
    ],
)
def test_a_file_that_cannot_be_served_says_why(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_options({}, settings_file(tmp_path, content))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        load_options({}, tmp_path / "nowhere.toml")


def test_two_settings_that_exclude_each_other_are_named_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEDDLE_MEMORY_FRACTION", "0.5")
    file = settings_file(tmp_path, "pool_bytes = 1000")
    with pytest.raises(ConfigError, match=rf"pool_bytes in {file} and HEDDLE_MEMORY_FRACTION both size the page pool"):
        load_options({}, file)


def test_defaults_are_those_of_the_config_they_become(model: Path, tmp_path: Path) -> None:
    engine = EngineConfig(model_path=str(model), model_name="my-model", store_path=str(tmp_path))
    assert ServeOptions(store=tmp_path).config(str(model)) == ServerConfig(engine=engine, store_path=tmp_path)


def test_every_field_of_the_config_can_be_set(model: Path, tmp_path: Path) -> None:
    """None of them is left at its default for want of a setting."""
    typed = {name: value for name, (value, _) in OTHER.items() if name not in ("memory_fraction", "adapters")}
    config = load_options({**typed, "adapters": str(tmp_path)}).config(str(model))
    for changed, default in ((config, ServerConfig), (config.engine, EngineConfig)):
        names = default.__struct_fields__[-len(default.__struct_defaults__) :]
        for name, value in zip(names, default.__struct_defaults__, strict=True):
            if name != "memory_fraction":
                assert getattr(changed, name) != value, name


def test_a_config_made_by_hand_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="--threads is 0; it must be at least 1"):
        EngineConfig(model_path="", model_name="", store_path="", num_threads=0)
    with pytest.raises(ConfigError, match=r"--memory-fraction is 1\.5; it must be more than 0 and at most 1"):
        EngineConfig(model_path="", model_name="", store_path="", memory_fraction=1.5)


def test_the_page_is_the_code() -> None:
    """`python -m heddle_server.settings_page > docs/settings.md` writes it again."""
    assert PAGE.read_text() == page()
    command = [sys.executable, "-m", "heddle_server.settings_page"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert printed.stdout == page()


@pytest.mark.parametrize("name", OTHER)
def test_the_page_says_all_of_each(name: str) -> None:
    row = next(
        line for line in page().splitlines() if line.startswith(f"| `{flag_of(name)}` | `{variable_of(name)}` |")
    )
    assert expected(name) in row
    assert str(ServeOptions.model_fields[name].description) in row


def test_help_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEDDLE_API_KEY", "hdl_secret")
    for command in ("serve", "chat", "top", "doctor"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert (result.exit_code, "hdl_secret" in result.output) == (0, False)


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("2KiB", 2048), ("1.5 GB", 1_500_000_000), ("2gib", 2 << 30), ("3M", 3_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "3 apples", "-1", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (2048, "2 KiB"), (3 << 19, "1.5 MiB"), (5 << 30, "5.00 GiB")]
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(("number", "text"), [(9999, "9999"), (71_000, "71k"), (1_250_000, "1.2M")])
def test_counts_for_people(number: int, text: str) -> None:
    assert format_count(number) == text
