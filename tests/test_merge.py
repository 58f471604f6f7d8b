"""Merging: what comes out is the sum, the election or the loss of what went in, and PEFT loads it."""

from __future__ import annotations

import copy
import functools
import json
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import PeftModel
from peft.utils.merge_utils import magnitude_based_pruning
from peft.utils.merge_utils import ties as pefts_ties
from typer.testing import CliRunner, Result

from base_samples import full_layout_of
from byte_tokenizer import save_tokenizer
from dense_samples import make_dense, read_dense
from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.canonical import Floats, SiteUpdate
from heddle_adapters.checkpoint import Checkpoint, read_checkpoint
from heddle_adapters.content_folder import content_paths
from heddle_adapters.errors import AdapterError
from heddle_adapters.merge import Merged, MergePart, Recipe, dropped, merge, nearest_of_rank, ties, trimmed
from heddle_adapters.merged_files import write_merged
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import read_records
from heddle_server.cli import app
from peft_samples import ModelWeights, make_adapter, tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
model = functools.cache(tiny_llama)


def layout() -> BaseLayout:
    return full_layout_of(model())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves of adapters, each made once: "lora 3" is another of the same kind."""

    @functools.cache
    def make(name: str) -> Path:
        kind, _, seed = name.partition(" ")
        folder = tmp_path_factory.mktemp("adapter")
        targets = ("q_proj", "k_proj", "down_proj") if seed == "3" else None
        if kind in ("shira", "supertuning_lora", "fourierft", "c3a", "hira", "boft"):
            make_dense(model(), kind, folder, seed=int(seed or 0), targets=targets or ())
        else:
            make_adapter(model(), kind, folder, rank=3 + int(seed or 0), targets=targets, seed=int(seed or 0))
        return folder

    return make


def part(folder: Path, weight: float = 1.0) -> MergePart:
    return MergePart(folder.name, read_dense(model(), folder), weight)


def deltas_of(checkpoint: Checkpoint) -> dict[str, Floats]:
    return {update.site: delta_of(update) for update in checkpoint.compile(ModelWeights(model())).updates}


def delta_of(update: SiteUpdate) -> Floats:
    rows = update.rows
    product = 0 if rows is None else np.einsum("r,ro,ri->oi", rows.gain, rows.b, rows.a)
    return np.asarray(product + (0 if update.delta is None else update.delta), np.float32)


def deltas_of_merged(merged: Merged) -> dict[str, Floats]:
    dense = {path: rows.b.T @ rows.a for path, rows in merged.rows.items()}
    for path, delta in merged.elements.items():
        dense[path] = np.zeros(delta.shape, np.float32)
        dense[path].reshape(-1)[delta.places] = delta.values
    return dense


def written(merged: Merged, folder: Path) -> Checkpoint:
    write_merged(folder, merged, "some/base", None)
    return read_checkpoint(folder / CONFIG, folder / WEIGHTS, layout())


def assert_peft_computes(folder: Path, deltas: dict[str, Floats]) -> None:
    """With the files in `folder`, at every layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model()), folder).eval()
    for path, delta in deltas.items():
        base, layer = model().get_submodule(path), loaded.base_model.model.get_submodule(path)
        x = torch.randn(4, delta.shape[1])
        with torch.no_grad():
            expected = base(x).numpy() + x.numpy() @ delta.T
            limit = 1e-5 * max(1, np.abs(expected).max())
            np.testing.assert_allclose(layer(x).numpy(), expected, atol=limit, rtol=0)
            assert np.abs(expected - base(x).numpy()).max() > 100 * limit


@pytest.mark.parametrize("names", [("lora",), ("patterns", "lora 1"), ("rslora 2", "lora 3", "lora")])
def test_loras_add_up_to_one_lora_exactly(names: tuple[str, ...], made: Callable[[str], Path], tmp_path: Path) -> None:
    weights = (0.7, -1.3, 0.4)
    parts = [part(made(name), weight) for name, weight in zip(names, weights, strict=False)]
    checkpoint = written(merge(parts, Recipe("linear"), layout()), tmp_path)
    assert (checkpoint.method, checkpoint.combination) == ("LoRA", "sum")
    sums: dict[str, Floats] = {}
    for each in parts:
        for path, delta in deltas_of(each.checkpoint).items():
            sums[path] = sums.get(path, 0) + np.float32(each.weight) * delta
    found = deltas_of(checkpoint)
    assert found.keys() == sums.keys()
    for path, delta in found.items():
        np.testing.assert_allclose(delta, sums[path], atol=1e-5)
        assert np.abs(delta).max() > 1e-3
    assert_peft_computes(tmp_path, sums)
    assert checkpoint.num_rows == sum(each.checkpoint.num_rows for each in parts)


@pytest.mark.parametrize(
    "names", [("lora", "lora 1", "rslora 2"), ("shira", "lora 3"), ("supertuning_lora", "rslora 1")]
)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.97])
def test_ties_is_pefts_where_the_weights_are_equal(
    names: tuple[str, ...], density: float, made: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = [part(made(name), 0.5) for name in names]
    merged = merge(parts, Recipe("ties", density), layout())
    deltas = deltas_of_merged(merged)
    found = [deltas_of(each.checkpoint) for each in parts]
    assert deltas.keys() == set().union(*found)
    for path, delta in deltas.items():
        tensors = [torch.from_numpy(each[path]) for each in found if path in each]
        expected = pefts_ties(tensors, torch.full((len(tensors),), 0.5), density)
        np.testing.assert_allclose(delta, expected.numpy(), atol=1e-6)
        assert np.count_nonzero(delta) <= len(tensors) * density * delta.size
    written(merged, tmp_path)
    assert_peft_computes(tmp_path, deltas)


def test_ties_counts_each_delta_with_its_weight() -> None:
    """Ten lines after the paper, with each task vector times its weight."""
    generator = np.random.default_rng(0)
    vectors, weights = generator.standard_normal((3, 20, 30)).astype(np.float32), (0.9, 0.2, -0.5)
    expected = np.zeros((20, 30))
    scaled = [weight * vector for weight, vector in zip(weights, vectors, strict=True)]
    kept = [np.where(np.abs(each) >= np.sort(np.abs(each), axis=None)[-60], each, 0) for each in scaled]
    for place in np.ndindex(20, 30):
        values = [each[place] for each in kept]
        agreeing = [value for value in values if value * sum(values) > 0]
        expected[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    found = ties([trimmed(np.asarray(each, np.float32), 0.1) for each in scaled])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.floats(-9, 9, width=32)),
    density=st.floats(0.01, 1),
)
def test_trimming_is_pefts(values: Floats, density: float) -> None:
    num_kept = int(density * values.size)
    found = trimmed(values, density)
    assert np.count_nonzero(found) <= max(1, num_kept)
    if num_kept:
        expected = magnitude_based_pruning(torch.from_numpy(values), density).numpy()
        np.testing.assert_array_equal(np.sort(np.abs(found), axis=None), np.sort(np.abs(expected), axis=None))


@settings(max_examples=50, deadline=None)
@given(density=st.floats(0.05, 1), seed=st.integers(0, 2**32))
def test_dare_keeps_the_sum_on_average(density: float, seed: int) -> None:
    delta = np.random.default_rng(1).standard_normal((60, 70)).astype(np.float32)
    found = dropped(delta, density, np.random.default_rng(seed))
    kept = found != 0
    np.testing.assert_allclose(found[kept], delta[kept] / np.float32(density))
    deviation = (density * (1 - density) / delta.size) ** 0.5
    assert abs(kept.mean() - density) <= 6 * deviation + 1e-9


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_drawn_from_its_seed(method: Any, made: Callable[[str], Path], tmp_path: Path) -> None:
    parts = [part(made("lora"), 0.7), part(made("lora 1"), 0.3)]
    merged = [merge(parts, Recipe(method, 0.2, seed), layout()) for seed in (5, 5, 6)]
    first, again, other = (deltas_of_merged(each) for each in merged)
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not any(np.array_equal(first[path], other[path]) for path in first)
    written(merged[0], tmp_path)
    assert_peft_computes(tmp_path, first)


@pytest.mark.parametrize("names", [("shira", "lora"), ("supertuning_lora", "c3a", "fourierft")])
def test_what_is_dense_adds_up_too(names: tuple[str, ...], made: Callable[[str], Path], tmp_path: Path) -> None:
    parts = [part(made(name), 0.5) for name in names]
    merged = merge(parts, Recipe("linear"), layout())
    found = [deltas_of(each.checkpoint) for each in parts]
    sums = {path: np.float32(0.5) * np.sum([each[path] for each in found], axis=0) for path in found[0]}
    for path, delta in deltas_of(written(merged, tmp_path)).items():
        np.testing.assert_allclose(delta, sums[path], atol=1e-5)
    assert_peft_computes(tmp_path, sums)


def test_a_rank_gives_the_nearest_lora_and_says_how_near(made: Callable[[str], Path], tmp_path: Path) -> None:
    parts = [part(made("lora"), 0.7), part(made("lora 1"), 0.3)]
    whole = merge(parts, Recipe("ties", 0.4), layout())
    merged = merge(parts, Recipe("ties", 0.4, rank=12), layout())
    checkpoint = written(merged, tmp_path)
    assert (checkpoint.method, checkpoint.max_rank) == ("LoRA", 12)
    deltas, found = deltas_of_merged(whole), deltas_of(checkpoint)
    norm = sum(np.square(delta).sum() for delta in deltas.values())
    lost = sum(np.square(delta - found[path]).sum() for path, delta in deltas.items())
    least = sum(np.square(np.linalg.svd(delta, compute_uv=False)[12:]).sum() for delta in deltas.values())
    assert merged.relative_error == pytest.approx((lost / norm) ** 0.5, rel=1e-4)
    assert (least / norm) ** 0.5 <= merged.relative_error <= 1.01 * (least / norm) ** 0.5
    assert_peft_computes(tmp_path, found)


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 40), height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 2**32))
def test_the_nearest_of_a_rank_is_nearly_the_nearest(rank: int, height: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    delta = generator.standard_normal((height, width)).astype(np.float32)
    rows = nearest_of_rank(delta, rank, generator)
    assert len(rows) == min(rank, height, width)
    least = np.square(np.linalg.svd(delta.astype(np.float64), compute_uv=False)[rank:]).sum() ** 0.5
    found = np.square(delta - rows.b.T @ rows.a).sum() ** 0.5
    assert found <= 1.01 * least + 1e-4 * np.linalg.norm(delta)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ia3", "scales channels"),
        ("lora_bias", "shifts outputs"),
        ("boft", "scales channels"),
        ("hira", "depends on the base's own weights"),
    ],
)
def test_refuses_what_does_more_than_add(kind: str, reason: str, made: Callable[[str], Path]) -> None:
    with pytest.raises(AdapterError, match=reason):
        merge([part(made("lora")), part(made(kind))], Recipe("linear"), layout())


def test_nothing_is_overwritten(made: Callable[[str], Path], tmp_path: Path) -> None:
    merged = merge([part(made("lora"))], Recipe("linear"), layout())
    written(merged, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(AdapterError, match="is there already"):
        written(merge([part(made("lora 1"))], Recipe("linear"), layout()), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


# The command


class Workplace:
    """A base's folder, a store with adapters, and the command over both."""

    def __init__(self, folder: Path) -> None:
        self.base, self.store, self.out = folder / "base", folder / "store", folder / "merged"
        save_tokenizer(self.base)
        model().config.save_pretrained(self.base)

    def register(self, name: str, folder: Path, **config: Any) -> None:
        fields = json.dumps(json.loads((folder / CONFIG).read_text()) | config).encode()
        with AdapterStore(self.store) as store:
            self.put(store, name, folder, fields)

    def put(self, store: AdapterStore, name: str, folder: Path, config: bytes) -> None:
        named = json.loads(config).get("heddle_base_fingerprint")
        base = layout() if named is None else BaseLayout("", named, "none", layout().sites, allows_dense=True)
        store.put(name, read_checkpoint(config, folder / WEIGHTS, base), config, folder / WEIGHTS)

    def merge(self, *arguments: str) -> Result:
        options = ("--base", str(self.base), "--store", str(self.store), "--out", str(self.out))
        return CliRunner().invoke(app, ["adapters", "merge", *options, *arguments])


@pytest.fixture
def workplace(tmp_path: Path, made: Callable[[str], Path]) -> Workplace:
    workplace = Workplace(tmp_path)
    workplace.register("sql", made("lora"))
    workplace.register("sql", made("lora 2"))
    workplace.register("chat", made("lora 1"))
    return workplace


def test_the_command_adds_loras(workplace: Workplace, made: Callable[[str], Path]) -> None:
    result = workplace.merge("--part", "sql@1=0.7", "--part", "chat=0.3")
    assert result.exit_code == 0, result.output
    assert "2 adapters are one LoRA of rank 7 at 14 modules, exact" in result.stdout
    assert f"heddle adapters push {workplace.out}" in result.stdout
    expected = merge([part(made("lora"), 0.7), part(made("lora 1"), 0.3)], Recipe("linear"), layout())
    sums = deltas_of_merged(expected)
    for path, delta in deltas_of(read_dense(model(), workplace.out)).items():
        np.testing.assert_allclose(delta, sums[path], atol=1e-6)


def test_the_command_merges_by_election_and_by_loss(workplace: Workplace) -> None:
    both = ("--part", "sql=0.7", "--part", "chat=0.3", "--density", "0.2")
    ties = workplace.merge("--method", "ties", *both)
    assert "of single elements: 3" in ties.stdout, ties.output
    assert read_dense(model(), workplace.out).is_dense
    workplace.out = workplace.out.with_name("of rank 8")
    dare = workplace.merge("--method", "dare_ties", "--seed", "3", "--rank", "8", *both)
    assert "one LoRA of rank 8 at 14 modules, relative error 0." in dare.stdout, dare.output
    assert read_dense(model(), workplace.out).max_rank == 8


def test_the_command_reads_beside_a_running_server(workplace: Workplace, made: Callable[[str], Path]) -> None:
    with AdapterStore(workplace.store) as store:
        workplace.put(store, "new", made("lora 3"), (made("lora 3") / CONFIG).read_bytes())
        before = store.list()
        result = workplace.merge("--part", "sql", "--part", "new@latest=2")
        assert result.exit_code == 0, result.output
        assert store.list() == before
        workplace.put(store, "after", made("lora"), (made("lora") / CONFIG).read_bytes())


def test_an_index_of_another_version_is_not_guessed_at(workplace: Workplace) -> None:
    with closing(sqlite3.connect(workplace.store / "index.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 1")
    result = workplace.merge("--part", "sql")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "index has version 1" in result.stderr
    (workplace.store / "index.sqlite3").write_bytes(b"no database at all" * 100)
    assert "cannot be read" in workplace.merge("--part", "sql").stderr


def test_damaged_content_is_not_merged(workplace: Workplace) -> None:
    [version] = next(
        record for record in read_records(workplace.store / "index.sqlite3") if record.name == "chat"
    ).versions
    weights = content_paths(workplace.store, version.digest).weights
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = workplace.merge("--part", "chat", "--part", "sql")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "is damaged" in result.stderr


def test_the_result_names_the_base_of_its_parts(workplace: Workplace, made: Callable[[str], Path]) -> None:
    one, two = ("sha256:" + digit * 64 for digit in "12")
    workplace.register("a", made("lora 1"), heddle_base_fingerprint=one)
    workplace.register("b", made("lora 2"), heddle_base_fingerprint=two)
    assert workplace.merge("--part", "a", "--part", "sql").exit_code == 0
    assert json.loads((workplace.out / CONFIG).read_text())["heddle_base_fingerprint"] == one
    result = workplace.merge("--part", "a", "--part", "b")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "b@1 was trained on another base than the others" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--part", "sql=much"), 2, "'much' is no weight"),
        (("--part", "sql=0"), 2, "'0' is no weight"),
        (("--part", "sql=nan"), 2, "'nan' is no weight"),
        (("--part", "sql", "--density", "0.2"), 2, "leave --density out"),
        (("--part", "sql", "--method", "ties"), 2, "ties needs --density"),
        (("--part", "sql", "--method", "ties", "--density", "2"), 2, "at most 1"),
        (("--part", "nothing"), 1, "local has no adapter 'nothing'"),
        (("--part", "sql@9"), 1, "local has no adapter 'sql@9'"),
        (("--part", "sql", "--owner", "team"), 1, "team has no adapter 'sql'"),
        (("--part", "sql", "--store", "/nowhere"), 1, "/nowhere is no adapter store"),
        (("--part", "sql", "--base", "/nowhere"), 1, "/nowhere is no directory"),
        (("--part", "ia3"), 1, "ia3@1 (IA3) cannot be merged"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: tuple[str, ...], status: int, message: str, workplace: Workplace, made: Callable[[str], Path]
) -> None:
    workplace.register("ia3", made("ia3"))
    result = workplace.merge(*arguments)
    assert result.exit_code == status
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not workplace.out.exists()
