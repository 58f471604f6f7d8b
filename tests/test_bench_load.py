"""The tables of docs/performance.md: made of the result folders that it names, and of nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.load.bases import make_base
from heddle_demo.bench.load.load_bench import MEASUREMENTS, run_load_bench
from heddle_demo.bench.load.page import keep_results, rewrite_page
from heddle_demo.bench.load.tables import TABLES
from heddle_demo.bench.word_tokenizer import write_word_tokenizer
from heddle_demo.data import BASE_DIR
from heddle_loadtest.workload.prompts import WORDS
from heddle_server.api.tokenizer import Tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def test_the_page_says_what_its_folders_say() -> None:
    assert rewrite_page(PAGE) == PAGE.read_text(), "run `heddle bench page`"
    assert set(re.findall(r"<!-- table (\w+) from", PAGE.read_text())) == set(TABLES)


def test_its_figures_may_be_published() -> None:
    """Three rounds or more, all that was asked answered or refused, and nothing measured where the client was late
    without saying so."""
    for folder in re.findall(r"<!-- table \w+ from ([\w./-]+) -->", PAGE.read_text()):
        for path in (PAGE.parent / folder).rglob("summary.json"):
            summary = json.loads(path.read_text())
            assert len(summary["repeats"]) >= 3, path
            assert not summary["was_interrupted"], path
            refused = summary["errors"].get("overloaded", 0)
            assert summary["total"]["num_failed"] == refused, (path, summary["errors"])


def test_distinct_was_distinct() -> None:
    """The engine counted what a step computed: one adapter if all want the same, as many as there are requests else."""
    for folder in (PAGE.parent / "measurements" / "load").glob("punica-*"):
        segments = {
            mix: json.loads((folder / "heddle" / mix / "summary.json").read_text())["server"]["segments_per_step"]
            for mix in ("base", "identical", "skewed", "uniform", "distinct")
        }
        assert segments["base"] == segments["identical"] == 1.0
        assert 1.0 < segments["skewed"] <= 9.0
        assert segments["skewed"] < segments["distinct"]
        assert 1.0 < segments["uniform"] <= 8.0
        assert 20.0 < segments["distinct"] <= 32.0


def test_a_page_with_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table punica from nowhere -->\nold\n<!-- end of table -->\nb\n")
    with pytest.raises(BenchFailed, match="nowhere, which is not there"):
        rewrite_page(page)
    page.write_text("<!-- table pumica from nowhere -->\n<!-- end of table -->\n")
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(BenchFailed, match="'pumica'; there are punica"):
        rewrite_page(page)


def test_unknown_tables_and_bases_are_refused(tmp_path: Path) -> None:
    assert set(MEASUREMENTS) == set(TABLES)
    with pytest.raises(BenchFailed, match="no table vllm"):
        run_load_bench("vllm", "demo", tmp_path, print, quick=True)
    with pytest.raises(BenchFailed, match="--base knows demo, tiny"):
        run_load_bench("punica", "8b", tmp_path, print, quick=True)


def test_a_table_is_measured_on_a_real_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smallest form of the smallest one, from a server's start to the line of a page."""
    said: list[str] = []
    run_load_bench("cold", "demo", tmp_path / "results", said.append, quick=True)
    assert any("disk" in line for line in said)
    table = capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("# T\n\n<!-- table cold from measurements/load/cold-demo -->\n<!-- end of table -->\n")
    assert keep_results(tmp_path / "results", tmp_path / "measurements" / "load") == 3
    assert table.strip() in rewrite_page(page)
    rows = [line for line in table.splitlines() if line.startswith(("| device", "| host", "| disk"))]
    assert len(rows) == 3
    assert "100% / 0% / 0%" in rows[0]  # found on the device, in host memory, on disk


def test_every_token_of_the_word_tokenizer_is_a_word(tmp_path: Path) -> None:
    write_word_tokenizer(tmp_path, 2000)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 2000}))
    tokenizer = Tokenizer(tmp_path)
    text = " ".join(WORDS[:50])
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert len(ids) == len(set(ids)) == 50
    assert max(ids) < 2000


def test_kv_bytes_of_the_demo_base() -> None:
    config = json.loads((BASE_DIR / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"]
    assert make_base("demo", Path()).kv_bytes(10) == 10 * 2 * 2 * config["num_hidden_layers"] * width
