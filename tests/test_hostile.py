"""Damaged files of every kind that train_gpt.py reads: one line says which, or nothing is changed.

Hundreds of random changes each to artifacts, checkpoints, shards, manifests, the cache of digests
and tokenizers.  No damage ends in a traceback, in other data or weights, or in code being run.

Run alone: python -m pytest -q tests/test_hostile.py
"""
import contextlib
import io
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, VOCAB, QuietLog, set_stage

import prepare_data
import train_gpt
from train_gpt import GolfError

EACH = 120              # changed files of each kind
KINDS = "artifact", "checkpoint", "train shard", "val shard", "tokenizer", "manifest", "cache"


# ------------------------------------------------------------------------------------------------
# Changes
# ------------------------------------------------------------------------------------------------

CHANGES = (     # of bytes i to j of a file `d`; `o` is another file
    lambda rng, d, o, i, j: d[:i] + bytes([d[i] ^ 1 << int(rng.integers(8))]) + d[i + 1:],
    lambda rng, d, o, i, j: d[:i] + rng.bytes(j - i) + d[j:],
    lambda rng, d, o, i, j: d[:i] + rng.bytes(int(rng.integers(1, 9))) + d[i:],
    lambda rng, d, o, i, j: d[:i] + d[j:],
    lambda rng, d, o, i, j: d[:i],
    lambda rng, d, o, i, j: d[:j] + d[i:j] + d[j:],
    lambda rng, d, o, i, j: d[:i] + bytes(j - i) + d[j:],
    lambda rng, d, o, i, j: d[:i] + d[i:j][::-1] + d[j:],
    lambda rng, d, o, i, j: d[:i] + o[i:j] + d[j:],
    lambda rng, d, o, i, j: o[:i] + d[i:])
ODD = [b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b'""', b'"a"', b"[]", b"{}", b"[[1]]",
       b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000, b"\xff"]


def changed(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """`data` with one change of some bytes, half of the time in its first 700 bytes."""
    reach = min(len(data), 700 if rng.random() < 0.5 else len(data))
    i, j = sorted(map(int, rng.integers(reach, size=2)))
    if rng.random() < 0.5:
        j = min(j, i + 20)
    return CHANGES[rng.integers(len(CHANGES))](rng, data, other, i, j)


def changed_json(rng: np.random.Generator, text: bytes, other: bytes) -> bytes:
    """A JSON text with one change of some bytes, or with an odd value in place of another."""
    if rng.random() < 0.3:
        return changed(rng, text, other)
    values = list(re.finditer(rb'"[^"]*"|\b[0-9]+', text))
    value = values[rng.integers(len(values))]
    return text[:value.start()] + ODD[rng.integers(len(ODD))] + text[value.end():]


# ------------------------------------------------------------------------------------------------
# One whole run
# ------------------------------------------------------------------------------------------------

def told(env: dict) -> tuple[int, str]:
    """(exit code, stderr) of train_gpt.py under `env`; an error must be one line of sane length."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        set_stage(patch, env)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train_gpt.main()
    line = err.getvalue().removesuffix("\n")
    assert code == 0 and not line or code == 2 and line.isprintable() and 0 < len(line) < 1100, line
    return code, line


@pytest.fixture(scope="module")
def golf(toy_data, tmp_path_factory) -> SimpleNamespace:
    """A run of the smallest model: its settings, and its files by kind as paths and as bytes."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(toy_data, folder / "data")
    layout = prepare_data.layout_of(folder / "data", f"toy_sp{VOCAB}")
    prepare_data.write_manifest(layout, prepare_data.describe(layout, {}))
    values = dict(TINY, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4,
                  sliding_enabled=0, ttt_enabled=0, run_id="r", data_dir=folder / "data",
                  out_dir=folder)
    env = {name.upper(): str(value) for name, value in values.items()}
    assert told(env) == (0, "")
    paths = folder / "runs/r/model.golf", folder / "runs/r/checkpoint.golf", *(
        layout.shard(split, 0) for split in ("train", "val")), layout.tokenizer, layout.manifest, (
        layout.directory / ".sha256.json")
    paths = dict(zip(KINDS, paths))
    return SimpleNamespace(env=env, paths=paths, data={k: p.read_bytes() for k, p in paths.items()})


@pytest.fixture
def cfg(golf) -> train_gpt.Config:
    """The settings of that run, whose files are put back after each test."""
    yield train_gpt.config_from_env(golf.env)[0]
    for kind, path in golf.paths.items():
        path.write_bytes(golf.data[kind])


def damaged(golf, kind: str, seed: int):
    """Write changed files of one kind, and yield their bytes; no digest is cached of the others."""
    data, rng = golf.data[kind], np.random.default_rng(seed)
    other = golf.data["checkpoint" if kind == "artifact" else "artifact"]
    change = changed_json if kind in ("manifest", "cache") else changed
    for _ in range(EACH):
        bad = change(rng, data, other)
        if kind != "cache":
            golf.paths["cache"].unlink(missing_ok=True)
        golf.paths[kind].write_bytes(bad)
        yield bad


# ------------------------------------------------------------------------------------------------
# Random damage
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_damaged_containers(golf, cfg, kind):
    """Any change of an artifact or checkpoint is an error; no tensor of it is ever read."""
    path, whole = golf.paths[kind], golf.data[kind]
    layout = train_gpt.open_container(path, kind).layout
    for bad in damaged(golf, kind, 1):
        if bad != whole:
            with pytest.raises(GolfError, match=re.escape(str(path))):
                train_gpt.open_container(path, kind).tensors(layout)


@pytest.mark.parametrize("kind", ["train shard", "val shard", "tokenizer", "manifest", "cache"])
def test_damaged_data(golf, cfg, kind):
    """Data of a manifest is as listed, or an error names a file: a score is of this data alone.

    A damaged cache of digests changes nothing: the files are hashed again.
    """
    rt = train_gpt.Runtime(train_gpt.Dist({}), QuietLog(), train_gpt.Clock(cfg))
    truth, outcomes = train_gpt.check_data(cfg, rt), Counter()
    assert truth.manifest == "checked"
    for bad in damaged(golf, kind, 2):
        same = bad == golf.data[kind]
        try:
            assert train_gpt.check_data(cfg, rt) == truth
            assert same or kind in ("manifest", "cache")
            outcomes["read"] += 1
        except GolfError as e:
            assert not same and kind != "cache"
            assert golf.paths[kind].name in str(e) or kind == "manifest"
            outcomes["error"] += 1
    assert kind != "manifest" or min(outcomes["read"], outcomes["error"]) > EACH / 10, outcomes


def test_damaged_shards_without_a_manifest(golf, cfg):
    """A shard is its ids below the vocabulary, or an error names it."""
    golf.paths["manifest"].unlink()
    path, outcomes = golf.paths["val shard"], Counter()
    for bad in damaged(golf, "val shard", 3):
        rt = train_gpt.Runtime(train_gpt.Dist({}), QuietLog(), train_gpt.Clock(cfg))
        ids = np.frombuffer(bad[1024:len(bad) // 2 * 2], "<u2")
        try:
            identity = train_gpt.check_data(cfg, rt)
            rt.clock.close_training_data()
            tokens = train_gpt.load_validation(cfg, rt, identity)
            assert identity.manifest == "none" and tokens.max() < VOCAB
            assert tokens.tolist() == ids[:len(tokens)].tolist()
            assert len(tokens) + cfg.seq_len > len(ids)
            outcomes["read"] += 1
        except GolfError as e:
            assert path.name in str(e)
            outcomes["error"] += 1
    assert min(outcomes["read"], outcomes["error"]) > EACH / 10, outcomes


def taste(golf, outcomes: Counter):
    """Load changed tokenizers, and count the bytes of all tokens by those that load."""
    for _ in damaged(golf, "tokenizer", 4):
        try:
            tokenizer = train_gpt.load_tokenizer(golf.paths["tokenizer"], VOCAB)
            sizes = train_gpt.bytes_per_target(np.arange(VOCAB).repeat(2), tokenizer)
            assert 0 <= sizes.min() and len(sizes) == 2 * VOCAB - 1
            outcomes["read"] += 1
        except GolfError as e:
            assert golf.paths["tokenizer"].name in str(e)
            outcomes["error"] += 1


def test_damaged_tokenizers_without_a_manifest(golf, cfg):
    """A changed SentencePiece model is of use or an error names it; the library does not crash.

    A process of its own would show such a crash.
    """
    outcomes, child = Counter(), os.fork()
    if child == 0:
        try:
            taste(golf, outcomes)
            os._exit(min(outcomes["read"], outcomes["error"]) <= EACH / 20)
        finally:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------------------------------------
# Whole stages
# ------------------------------------------------------------------------------------------------

TRAIN, QUANTIZE, EVAL = (dict(STAGES=stage) for stage in ("train", "quantize", "eval"))
READERS = {"artifact": [EVAL], "checkpoint": [QUANTIZE, dict(TRAIN, RESUME="1")],
           "train shard": [TRAIN, QUANTIZE], "val shard": [EVAL], "tokenizer": [EVAL],
           "manifest": [TRAIN, EVAL], "cache": [EVAL]}


@pytest.mark.parametrize("kind", KINDS)
def test_stages_end_in_one_line(golf, cfg, kind):
    """Every stage that reads an empty, halved or flipped file, or one of another kind, ends so.

    A cache of no use is the exception: it is written anew.
    """
    data, middle = golf.data[kind], len(golf.data[kind]) // 2
    at = data.index(b"sha256") + 12 if kind == "manifest" else middle
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
    other = golf.data["checkpoint" if kind == "artifact" else "artifact"]
    for bad in (b"", data[:middle], flipped, other):
        if kind != "cache":
            golf.paths["cache"].unlink(missing_ok=True)
        golf.paths[kind].write_bytes(bad)
        for stage in READERS[kind]:
            code, line = told({**golf.env, **stage})
            assert code == (0 if kind == "cache" else 2), (bad[:20], stage, line)


@pytest.mark.parametrize("where", [dict(DATA_DIR="x" * 300), dict(DATASET=f"toy_sp{'3' * 300}"),
                                   dict(RUN_ID="r" * 300), dict(OUT_DIR="x" * 5000),
                                   dict(DATA_DIR="a\nb\x1b[2J")], ids=repr)
def test_paths_that_no_system_takes_end_in_one_line(golf, tmp_path, where):
    """Names that no file system takes, or no terminal, end every stage in one line."""
    for stage in (TRAIN, QUANTIZE, EVAL):
        assert told({**golf.env, "OUT_DIR": str(tmp_path), **where, **stage})[0] == 2


# ------------------------------------------------------------------------------------------------
# Nothing is executed
# ------------------------------------------------------------------------------------------------

class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_executed(golf, cfg, tmp_path, kind):
    """A pickle that does something is no file of any kind, bare or behind a true beginning."""
    trap = tmp_path / "sprung"
    for protocol in (0, pickle.HIGHEST_PROTOCOL):
        data = pickle.dumps(Trap(trap), protocol)
        for beginning in (b"", golf.data[kind][:1024]):
            golf.paths[kind].write_bytes(beginning + data)
            code, line = told({**golf.env, **READERS[kind][0]})
            assert code == (0 if kind == "cache" else 2), line
    assert not trap.exists()
    pickle.loads(data)
    assert trap.exists()                                    # it would have been
