"""Hostile files: thousands of changed shards, manifests, tokenizers, artifacts, checkpoints, logs.

Each is either read as what it then is, or refused in one line: no traceback, no endless work, no
memory beyond a small multiple of the file, nothing in it executed.  tests/test_artifact.py does the
same for the container format alone, tests/test_use_artifact.py for compressed texts.

Run alone: python -m pytest -q tests/test_hostile.py
"""
import contextlib
import io
import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_data
import submit
import train_gpt
import use_artifact
from conftest import ROOT, TINY, VOCAB, memory_below, prose, set_stage
from test_artifact import ODD, Held, forge, split, twist
from test_submit import public_log

EACH = 400              # changed files of each of the six kinds, at least
LONGEST = 1100          # characters of a refusal, file name included
SPARE = 24 << 20        # bytes of memory beyond twice the file: libraries, models, messages


# ------------------------------------------------------------------------------------------------
# Changes
# ------------------------------------------------------------------------------------------------

CHANGES = (     # of bytes i to j of a file `d`; `o` is another file of its kind
    lambda rng, d, o, i, j: d[:i] + bytes([d[i] ^ 1 << int(rng.integers(8))]) + d[i + 1:],
    lambda rng, d, o, i, j: d[:i] + rng.bytes(1) + d[i + 1:],
    lambda rng, d, o, i, j: d[:i] + rng.bytes(j - i) + d[j:],
    lambda rng, d, o, i, j: d[:i] + rng.bytes(int(rng.integers(1, 9))) + d[i:],
    lambda rng, d, o, i, j: d[:i] + d[j:],
    lambda rng, d, o, i, j: d[:i],
    lambda rng, d, o, i, j: d[:i] + d[i:j] * int(rng.integers(2, 5)) + d[j:],
    lambda rng, d, o, i, j: d[:i] + bytes([rng.choice([0, 255])]) * (j - i) + d[j:],
    lambda rng, d, o, i, j: d[:i] + d[i:j][::-1] + d[j:],
    lambda rng, d, o, i, j: d[:i] + o[i:],
    lambda rng, d, o, i, j: d[:i] + o[i:j] + d[j:],
    lambda rng, d, o, i, j: o[:i] + d[i:],
    lambda rng, d, o, i, j: d[i:] + d[:i])

NUMBERS = ("-1", "0", "1", "9" * 30, "9" * 5000, "-" + "9" * 400, "1e999", "-1e308", "1e-320",
           "nan", "NaN", "-Infinity", "inf", "0.5", "-0.0", "0x10", "1_0", "\u0663", "true", "null",
           '""', '"a\\nb"', "[]", "{}", "[[1]]", "5/0")


def changed(rng: np.random.Generator, data: bytes, other: bytes, near: int) -> bytes:
    """`data` with one change, half of the time in its first `near` bytes."""
    reach = min(len(data), near if rng.random() < 0.5 else len(data))
    i, j = sorted(map(int, rng.integers(reach, size=2)))
    if rng.random() < 0.5:
        j = min(j, i + 20)
    return CHANGES[rng.integers(len(CHANGES))](rng, data, other, i, j)


def changed_text(rng: np.random.Generator, text: bytes, other: bytes) -> bytes:
    """A text with one to three changes: bytes, numbers that become odd ones, lines."""
    for _ in range(rng.integers(1, 4)):
        kind, lines = rng.choice(["bytes", "number", "line"], p=[0.3, 0.5, 0.2]), text.split(b"\n")
        found = list(re.finditer(rb"[0-9]+(\.[0-9]+)?", text))
        if kind == "bytes" or not found:
            text = changed(rng, text, other, 200) or b"x"
        elif kind == "number":
            match = found[rng.integers(len(found))]
            number = NUMBERS[rng.integers(len(NUMBERS))].encode()
            text = text[:match.start()] + number + text[match.end():]
        else:
            at, to = rng.integers(len(lines), size=2)
            lines[at:at + 1] = [lines[to]] * int(rng.integers(3))
            text = b"\n".join(lines)
    return text


# ------------------------------------------------------------------------------------------------
# What is asked, and what may be answered
# ------------------------------------------------------------------------------------------------

def check_message(text: str):
    """Fail unless `text` is one line of sane length that a terminal can show."""
    assert text and text.isprintable() and len(text) <= LONGEST, repr(text[:LONGEST])


def answer(question, *args):
    """What a function returns, or None where it refuses with one of the programs' own errors."""
    try:
        return question(*args)
    except (train_gpt.GolfError, prepare_data.DataError, submit.SubmitError) as e:
        check_message(str(e))
        return None


def told(main, *args, env=None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a program's main under `env`; a refusal must be one line."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        set_stage(patch, env or {})
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(*args)
    if code == 2:
        check_message(err.getvalue().removesuffix("\n"))
    return code, out.getvalue(), err.getvalue()


def bounded_memory(size: int):
    """Fail if more memory is taken inside than twice `size`, that of the file, and some."""
    return memory_below(2 * size + SPARE)


@pytest.fixture(scope="module")
def golf(toy_data, tmp_path_factory) -> SimpleNamespace:
    """A run of the smallest model: its environment, and its artifact, checkpoint and log.

    Their bytes are read before any test can get at the folder, whichever runs first.
    """
    values = dict(TINY, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4,
                  sliding_enabled=0, ttt_epochs=1, data_dir=toy_data, run_id="r")
    env = {name.upper(): value for name, value in values.items()}
    out = env["OUT_DIR"] = tmp_path_factory.mktemp("hostile")
    assert told(train_gpt.main, env=env)[::2] == (0, "")
    paths = dict(artifact=out / "runs/r/model.golf", checkpoint=out / "runs/r/checkpoint.golf")
    return SimpleNamespace(**paths, data={kind: path.read_bytes() for kind, path in paths.items()},
                           env=env, log=(out / "logs/r.txt").read_bytes())


@pytest.fixture(scope="module")
def settings(golf) -> dict:
    """Environment of that run, which has left all of its files in OUT_DIR."""
    return golf.env


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> SimpleNamespace:
    """A dataset of `prepare_data.py text`: its layout, its command and the bytes of its files."""
    folder, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    files = [folder / f"{i}.txt" for i in range(24)]
    for path in files:
        path.write_text("\n".join(prose(rng) for _ in range(4)))
    argv = ["text", *map(str, files), "--name", "toy", "--vocab-size", str(VOCAB),
            "--shard-tokens", "2000", "--data-dir", str(folder / "data")]
    assert told(prepare_data.main, argv)[0] == 0
    layout = prepare_data.Layout(folder / "data", "toy", f"toy_sp{VOCAB}", VOCAB)
    return SimpleNamespace(layout=layout, argv=argv, files=contents(layout),
                           manifest=layout.manifest.read_bytes())


def contents(layout: prepare_data.Layout) -> dict[str, bytes]:
    """What train_gpt.py would read of a dataset."""
    return {path.name: path.read_bytes() for path in [*layout.shards_present(), layout.tokenizer]}


# ------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------

def changed_shard(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A shard with a change, or with another number in its header."""
    if rng.random() < 0.3:
        at, value = 4 * int(rng.integers(4)), rng.choice([0, 1, 2, -1, 2 ** 31 - 1, -2 ** 31, 1024])
        return data[:at] + int(value).to_bytes(4, "little", signed=True) + data[at + 4:]
    return changed(rng, data, other, 1100)


def test_shards(toy_data, make_cfg, tmp_path):
    """A shard is its ids or is refused: by training, by scoring and by prepare_data alike."""
    folder = toy_data / "datasets" / f"toy_sp{VOCAB}"
    data, other = ((folder / f"toy_train_00000{i}.bin").read_bytes() for i in (1, 2))
    cfg, rng, outcomes = make_cfg(data_dir=str(tmp_path)), np.random.default_rng(1), Counter()
    path = cfg.dataset_dir / "toy_val_000000.bin"
    path.parent.mkdir(parents=True)
    clock = train_gpt.Clock(cfg)
    clock.phase = "eval"
    for _ in range(EACH):
        bad = changed_shard(rng, data, other)
        path.write_bytes(bad)
        ids = np.frombuffer(bad[1024:len(bad) // 2 * 2], "<u2")
        with bounded_memory(len(bad)):
            shard = answer(train_gpt.read_shard, path)
            entry = answer(prepare_data.inspect_shard, path, VOCAB)
            tokens = answer(train_gpt.load_validation, cfg, clock, lambda *a, **k: None)
        assert shard is None or shard.tokens.tolist() == ids.tolist()
        assert entry is None or entry["tokens"] == len(ids)
        assert tokens is None or (tokens == ids[:len(tokens)]).all() and tokens.max() < VOCAB
        assert (shard is None) <= (tokens is None)
        outcomes[shard is None] += 1
    assert min(outcomes.values()) > EACH / 20, outcomes


# ------------------------------------------------------------------------------------------------
# Manifests
# ------------------------------------------------------------------------------------------------

def dataset_of(layout: prepare_data.Layout) -> list:
    """The files that a manifest vouches for; raises DataError unless they are what is there."""
    manifest = prepare_data.read_manifest(layout)
    prepare_data.check_dataset(layout, manifest)
    return [manifest["tokenizer"], *(manifest[split]["files"] for split in ("train", "val"))]


def verdict(prepared: SimpleNamespace, data: bytes):
    """What `dataset_of` says of a manifest of these bytes, in one line if it refuses."""
    prepared.layout.manifest.write_bytes(data)
    try:
        return dataset_of(prepared.layout)
    except prepare_data.DataError as e:                     # main makes one line of any message
        assert len(str(e)) <= LONGEST
        return None


def test_manifests(prepared):
    """A manifest lists exactly the files that are there, or is refused."""
    whole, rng, outcomes = json.loads(prepared.manifest), np.random.default_rng(2), Counter()
    truth = verdict(prepared, prepared.manifest)
    assert truth
    for n in range(EACH):
        text = json.dumps(twist(rng, whole)).encode() if n % 2 else changed_text(
            rng, prepared.manifest, b'{"format": 1, "train": ' + prepared.manifest)
        with bounded_memory(len(text)):
            found = verdict(prepared, text)
        # Python holds 1, 1.0 and true for equal, and so do both of these comparisons.
        assert found is None or found == truth, text
        outcomes[found is None] += 1
    assert min(outcomes.values()) > EACH / 20, outcomes


def rename(manifest: dict, name):
    """Give the first training shard another name."""
    manifest["train"]["files"][0]["name"] = name


def repeat(manifest: dict, *entry: dict):
    """List the first training shard, or what stands for it, a second time, before the first."""
    files = manifest["train"]["files"]
    files[:0] = entry or files[:1]
    with contextlib.suppress(KeyError):
        manifest["train"].update(prepare_data.describe_split(files))


LIES = {
    "number for a name": lambda m: rename(m, 5), "null for a name": lambda m: rename(m, None),
    "list for a name": lambda m: rename(m, [1]), "no name": lambda m: rename(m, ""),
    "name of elsewhere": lambda m: rename(m, "../../../etc/passwd"),
    "name of many lines": lambda m: rename(m, "a\nb\x1b[2Jc"),
    "name of a megabyte": lambda m: rename(m, "x" * 1_000_000),
    "file twice": lambda m: repeat(m), "name without a file": lambda m: repeat(
        m, dict(name=m["train"]["files"][0]["name"])),
    "format of many lines": lambda m: m.update(format="a\nb"), "no split": lambda m: m.pop("val"),
    "split is a text": lambda m: m.update(train="files"), "totals": lambda m: m["val"].update(
        tokens=10 ** 400), "huge": lambda m: m["val"]["files"][0].update(bytes=1e308)}


@pytest.mark.parametrize("lie", [*LIES, "brackets", "braces", "bytes", "empty"])
def test_commands_mend_what_a_manifest_gets_wrong(prepared, lie):
    """`text` rebuilds a dataset whose manifest lies, `fineweb --offline` refuses in one line."""
    manifest = json.loads(prepared.manifest)
    data = dict(brackets=b"[" * 200_000, braces=b'{"a":' * 200_000, empty=b"",
                bytes=bytes(range(256))).get(lie)
    if data is None:
        LIES[lie](manifest)
        data = json.dumps(manifest).encode()
    fineweb = prepare_data.Layout(prepared.layout.data_dir, "fineweb", "fineweb10B_sp1024", 1024)
    fineweb.directory.mkdir(exist_ok=True)
    for layout in (prepared.layout, fineweb):
        layout.manifest.write_bytes(data)
    with bounded_memory(20 * len(data)):
        code = told(prepare_data.main, ["fineweb", "--offline", "--variant", "sp1024", "--data-dir",
                                        str(fineweb.data_dir)])[0]
    assert code == 2 and told(prepare_data.main, prepared.argv)[0] == 0
    assert contents(prepared.layout) == prepared.files
    assert prepared.layout.manifest.read_bytes() == prepared.manifest


# ------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------

def taste(model: str, folder: str):
    """Load EACH changed tokenizers, and use those that load; prints what became of each.

    Runs in a process of its own, so that a crash of the library is seen, and what memory it takes.
    """
    data, rng, path = Path(model).read_bytes(), np.random.default_rng(3), Path(folder) / "model"
    other = data[:len(data) // 3] + data[len(data) // 2:]
    cfg = SimpleNamespace(tokenizer_path=path, vocab_size=VOCAB, dataset="toy")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(EACH):
        path.write_bytes(changed(rng, data, other, 6000))
        print(n, end=" ", flush=True)
        tokenizer = answer(train_gpt.load_tokenizer, cfg)
        print("refused" if tokenizer is None else use(tokenizer), flush=True)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 2 * len(data) + 3 * SPARE, grown


def use(tokenizer) -> str:
    """Do with a tokenizer all that the programs do with theirs."""
    sizes = train_gpt.target_bytes(np.arange(VOCAB).repeat(2), tokenizer)
    assert 0 <= sizes.min() and len(sizes) == 2 * VOCAB - 1
    assert isinstance(tokenizer.decode(list(range(VOCAB))), str)
    coder = answer(use_artifact.TextCoder, tokenizer)
    assert coder is None or coder.decode(coder.encode(b"the model\nreads")) == b"the model\nreads"
    return "used"


def test_tokenizers(toy_data, tmp_path):
    """A SentencePiece model that was changed is refused or of use; the library does not crash."""
    model = toy_data / "tokenizers" / f"toy_{VOCAB}_bpe.model"
    code = f"import test_hostile; test_hostile.taste({str(model)!r}, {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join(
                              [str(ROOT), str(ROOT / "tests")])))
    outcomes = Counter(line.split()[-1] for line in done.stdout.splitlines())
    assert done.returncode == 0, (done.stdout[-40:], done.stderr[-2000:])
    assert outcomes.total() == EACH and min(outcomes[k] for k in ("used", "refused")) > EACH / 20


def test_paths_of_tokenizers(toy_data, tmp_path):
    """What is no file, or no file of a tokenizer, is named in one line."""
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "empty", "loop", "pipe", ".", "empty/x", "new\nline"):
        cfg = SimpleNamespace(tokenizer_path=tmp_path / name, vocab_size=VOCAB, dataset="toy")
        with pytest.raises(train_gpt.DataError, match=re.escape(str(tmp_path))):
            train_gpt.load_tokenizer(cfg)


@pytest.mark.parametrize("where", [dict(DATA_DIR="x" * 300), dict(DATA_DIR="x" * 5000),
                                   dict(DATASET=f"toy_sp{'3' * 300}"), dict(RUN_ID="r" * 300),
                                   dict(OUT_DIR="x" * 300), dict(DATA_DIR="a\nb\x1b[2J")], ids=repr)
@pytest.mark.parametrize("stage", ["train", "eval"])
def test_paths_of_a_run(settings, tmp_path, stage, where):
    """Names that no system takes, or no terminal, end a run in one line."""
    env = {**settings, "OUT_DIR": tmp_path, **where, "STAGES": stage}
    if stage == "eval" and "OUT_DIR" not in where and "RUN_ID" not in where:
        env["OUT_DIR"] = settings["OUT_DIR"]                # where there is an artifact
    assert told(train_gpt.main, env=env)[0] == 2


# ------------------------------------------------------------------------------------------------
# Artifacts and checkpoints
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_damage_of_containers(golf, kind):
    """With checksums as they are, any change is refused, and takes no memory to speak of."""
    data, rng = golf.data[kind], np.random.default_rng(4)
    other = golf.data["checkpoint" if kind == "artifact" else "artifact"]
    with bounded_memory(3 * len(data)):
        for _ in range(EACH):
            bad = changed(rng, data, other, 700)
            try:
                train_gpt.read_container(Held(bad), kind)
                assert bad == data
            except train_gpt.ArtifactError:
                assert bad != data


def forged(rng: np.random.Generator, data: bytes) -> bytes:
    """A container with right checksums and a lie in its meta data, listing or numbers."""
    header, payload = split(data)
    kind = rng.choice(["meta", "number", "header", "payload"], p=[0.3, 0.3, 0.2, 0.2])
    if kind == "meta":
        header = dict(header, meta=twist(rng, header["meta"]))
    elif kind == "number":
        meta = dict(header["meta"])
        name = rng.choice([n for n, v in meta.items() if type(v) in (int, float)])
        header = dict(header, meta={**meta, str(name): ODD[rng.integers(len(ODD))]})
    elif kind == "header":
        header = twist(rng, header)
    elif header["compress"]:
        payload = changed(rng, payload, payload, 700)
        header = dict(header, segments=[len(payload)])
    else:                       # same length, so that it is the numbers in it that change
        at = 4 * int(rng.integers(len(payload) // 4 - 4))
        value = rng.choice([np.nan, np.inf, -1.0, -1e38, 1e38, 0.0])
        payload = payload[:at] + np.float32(value).tobytes() * 4 + payload[at + 16:]
    return forge(header, payload)


def test_forged_artifacts(settings, golf, tmp_path):
    """With right checksums, an artifact is scored or refused, and opened or refused to be used."""
    rng, outcomes, path = np.random.default_rng(5), Counter(), tmp_path / "model.golf"
    env = {**settings, "STAGES": "eval", "TTT_ENABLED": 0}
    for n in range(EACH // 4):
        bad = forged(rng, golf.data["artifact"])
        path.write_bytes(bad)
        golf.artifact.write_bytes(bad)
        code, out, _ = told(train_gpt.main, env=env)
        if code == 0:
            bpb = float(re.search(r"^val_bpb: +(\S+)$", out, re.M)[1])
            assert math.isfinite(bpb)
        with bounded_memory(len(bad)):
            opened = tried(use_artifact.open_artifact, path, str(settings["DATA_DIR"]))
        assert opened is None or opened[0].flat.data.isfinite().all()
        outcomes["eval", code] += 1
        outcomes["use", opened is None] += 1
    golf.artifact.write_bytes(golf.data["artifact"])
    assert outcomes.keys() == {("eval", 0), ("eval", 2), ("use", True), ("use", False)}


def tried(question, *args):
    """What a function returns, or None where it refuses; its program makes one line of that."""
    try:
        return question(*args)
    except train_gpt.GolfError:
        return None


LOADERS = ([300, 0, 0], [0, 0, 10 ** 6], [-1, 0, 0], [1e3, 0, 0], [True, 0, 0], [[]], [], "abc")
TENSORS = {"step.0": (-1.0, -1e38, np.nan), "step.1": (-0.5,), "weights": (np.nan, np.inf),
           "average": (np.nan,), "exp_avg.0": (np.inf,), "momentum": (np.nan,)}
IMPOSSIBLE = [(name, value) for name in ("step", "seconds", "expected_steps")
              for value in (math.nan, math.inf, -5, -1e9, 10 ** 400, 1e300, True, "1", None)]


def impossible(data: bytes):
    """Yield checkpoints with right checksums that hold what no training leaves."""
    header, payload = split(data)
    meta = header["meta"]
    for name, value in IMPOSSIBLE:
        yield forge(header, payload, meta={**meta, name: value})
    for taken in LOADERS:
        yield forge(header, payload, meta=dict(meta, loader=dict(meta["loader"], taken=taken)))
    _, tensors = train_gpt.parse_container(data, "checkpoint")
    for name, values in TENSORS.items():
        for value in values:
            bad = {**tensors, name: tensors[name].clone().fill_(value)}
            yield b"".join(train_gpt.pack_tensors("checkpoint", meta, bad, compress=False))


def test_impossible_checkpoints(settings, golf):
    """Counts, seconds and tensors that no training leaves are refused by all that reads them."""
    for bad in impossible(golf.data["checkpoint"]):
        golf.checkpoint.write_bytes(bad)
        for more in (dict(STAGES="quantize"), dict(STAGES="train", RESUME=1, ITERATIONS=8)):
            code, _, err = told(train_gpt.main, env={**settings, **more})
            assert code == 2 and "checkpoint" in err
    golf.checkpoint.write_bytes(golf.data["checkpoint"])


def test_forged_checkpoints(settings, golf):
    """With right checksums, a checkpoint is gone on from or refused; whichever, training ends."""
    rng, outcomes = np.random.default_rng(6), Counter()
    for n in range(EACH // 4):
        golf.checkpoint.write_bytes(forged(rng, golf.data["checkpoint"]))
        more = dict(STAGES="quantize") if n % 4 == 0 else dict(STAGES="train", RESUME=1,
                                                               ITERATIONS=7)
        outcomes[told(train_gpt.main, env={**settings, **more})[0]] += 1
    for path, data in ((golf.checkpoint, "checkpoint"), (golf.artifact, "artifact")):
        path.write_bytes(golf.data[data])
    assert outcomes.keys() == {0, 2}


# ------------------------------------------------------------------------------------------------
# Logs
# ------------------------------------------------------------------------------------------------

def test_logs(golf, tmp_path, monkeypatch):
    """A log is judged, or refused with its name and line; what is written holds numbers only."""
    monkeypatch.chdir(tmp_path)
    comparisons = (), ("--baseline", "pr1493")              # which is of the public log's text
    logs, outcomes = (golf.log, public_log(42).encode()), Counter()
    for n in range(EACH):
        # Our log's length differs from run to run, with its times: the other half stays the same.
        rng = np.random.default_rng((7, n))
        bad = changed_text(rng, logs[n % 2], logs[1 - n % 2])
        Path("log.txt").write_bytes(bad)
        with bounded_memory(len(bad)):
            code, out, err = told(submit.main, ["log.txt", "--no-plots", *comparisons[n % 2]])
        assert code in (0, 1, 2) and (code == 2 or not err)
        assert all(line.isprintable() for line in out.split("\n"))
        assert code < 2 or re.match(r"submit: (log.txt|line [0-9]+)[,:] ", err), err
        if Path("submission.json").exists():
            json.loads(Path("submission.json").read_bytes(), parse_constant=pytest.fail)
            Path("submission.json").unlink()
        outcomes[code] += 1
    assert outcomes[1] > EACH / 20 and outcomes[2] > EACH / 20, outcomes


# ------------------------------------------------------------------------------------------------
# Nothing is executed
# ------------------------------------------------------------------------------------------------

class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        """The file to leave."""
        self.path = path

    def __reduce__(self):
        """What unpickling calls."""
        return Path.touch, (self.path,)


READERS = {
    "shard": train_gpt.read_shard,
    "prepared shard": lambda path: prepare_data.inspect_shard(path, VOCAB),
    "manifest": lambda path: prepare_data.read_manifest(SimpleNamespace(manifest=path)),
    "tokenizer": lambda path: train_gpt.load_tokenizer(
        SimpleNamespace(tokenizer_path=path, vocab_size=VOCAB, dataset="toy")),
    "artifact": lambda path: train_gpt.read_container(path, "artifact"),
    "used artifact": lambda path: use_artifact.open_artifact(path, "data"),
    "checkpoint": lambda path: train_gpt.read_container(path, "checkpoint"),
    "log": submit.read_log}


@pytest.mark.parametrize("kind", READERS)
def test_nothing_is_executed(tmp_path, golf, kind):
    """A pickle that does something is no file of any kind, bare or behind a true beginning."""
    trap, path = tmp_path / "sprung", tmp_path / "file"
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        data = pickle.dumps(Trap(trap), protocol)
        for beginning in (b"", golf.data["artifact"][:700], prepare_data.shard_header(7)[:1022]):
            path.write_bytes(beginning + data)
            with pytest.raises((train_gpt.GolfError, prepare_data.DataError, submit.SubmitError)):
                READERS[kind](path)
    assert not trap.exists()
    pickle.loads(data)
    assert trap.exists()                                    # it would have been
