"""Sections Training and Main: faults of data, disks, ranks, signals, terminals and streams.

Every fault is a real one: signals, file-size limits, closed streams, ranks in processes of their
own.  `-k faults_md` selects the examples by which the faults were first reported.
"""
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare_data
import train_gpt
from conftest import ARM, PROGRAM, ROOT, VOCAB, parse_line, prose, run_main, write_shard

# Forks a child for every order that it reads, so that a run starts without importing torch again.
NURSERY = ARM + """
import hashlib, json, os, resource, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
import brotli, sentencepiece, torch, torch._dynamo
import train_gpt
torch.set_num_threads(1)

def show_end_of_training(state, save=train_gpt.TrainState.save):
    digest = hashlib.sha256(state.run.flat.data.numpy()).hexdigest()
    print("trained", state.step, digest, file=sys.stderr)
    save(state)

def work(order):
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(os.open(order["console"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in order else signal.SIG_DFL)
    if "encoding" in order:
        sys.stdout.reconfigure(encoding=order["encoding"])
    if "dies_before" in order:
        step, count = order["dies_before"]
        arm([step], count)
    if "largest" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"],) * 2)
    if "dies_of_size" in order:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if "user" in order:
        os.setuid(order["user"])
    if "haste" in order:                        # a clock that runs faster than those of other ranks
        elapsed, train_gpt.READ_SECONDS = train_gpt.Clock.elapsed, 0.1
        train_gpt.Clock.elapsed = lambda clock: order["haste"] * elapsed(clock)
        train_gpt.TrainState.save = show_end_of_training
    os.environ.update(order["env"])
    sys.argv = ["train_gpt.py"]
    return train_gpt.main()

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitpid(order["wait"], 0)[1], flush=True)
        continue
    child = os.fork()
    if not child:
        code = 1
        try:
            code = work(order)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
"""


def clean_environment() -> dict[str, str]:
    """The environment of a process that shall see no setting of the tests' own."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return dict(kept, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


class Nursery:
    """Runs of the program in processes of their own that start in no time."""

    def __init__(self, folder: Path):
        """Start the process that imports all libraries and waits for orders."""
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(ROOT)], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, env=clean_environment())

    def ask(self, **order) -> int:
        """Give an order and return the number that answers it."""
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, env: dict, **order) -> int:
        """Start a run and return the id of its process; `order` says what is to befall it."""
        console = self.folder / f"console{env.get('RANK', 0)}"
        return self.ask(env=env, console=str(console), **order)

    def wait(self, child: int, rank: int = 0) -> tuple[int, str]:
        """(exit code or minus a signal's number, stderr) of a run."""
        code = os.waitstatus_to_exitcode(self.ask(wait=child))
        return code, (self.folder / f"console{rank}").read_text()

    def run(self, env: dict, **order) -> tuple[int, str]:
        """The same of a whole run."""
        return self.wait(self.start(env, **order))

    def start_ranks(self, env: dict, *orders: dict) -> list[int]:
        """Start the ranks of one run, each with an order of its own, and return their ids."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        env = {**env, "WORLD_SIZE": str(len(orders)), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port}
        return [self.start({**env, "RANK": str(i), "LOCAL_RANK": str(i)}, **order)
                for i, order in enumerate(orders)]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Nursery:
    """The nursery of this file's tests."""
    started = Nursery(tmp_path_factory.mktemp("nursery"))
    yield started
    started.process.kill()
    started.process.wait()


def settings_for(toy_settings: dict, folder: Path, **more: str) -> dict[str, str]:
    """Environment of a small run in `folder` that logs and saves every step."""
    return {**toy_settings, "OUT_DIR": str(folder), "RUN_ID": "r", "TRAIN_LOG_EVERY": "1",
            "CHECKPOINT_SECONDS": "0.001", "NUM_LAYERS": "2", "MODEL_DIM": "32", "NUM_HEADS": "2",
            "NUM_KV_HEADS": "1", "SLIDING_ENABLED": "0", "EMA_HORIZON_FRAC": "0.5", **more}


def events_of(folder: Path) -> list[tuple[str, dict]]:
    """Events of the log of the run in `folder`."""
    return [parse_line(line) for line in (folder / "logs/r.txt").read_text().splitlines()]


def files_under(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder but logs, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "logs" not in p.parts}


def checkpoint(path: Path) -> tuple[dict, dict[str, bytes]]:
    """(meta, bytes of each tensor) of a checkpoint."""
    container = train_gpt.open_container(path, "checkpoint")
    tensors = container.tensors(container.layout)
    return container.meta, {name: t.numpy().tobytes() for name, t in tensors.items()}


def outcome(folder: Path) -> SimpleNamespace:
    """All that a finished run in `folder` is worth: checkpoint, artifact, losses and scores."""
    meta, tensors = checkpoint(folder / "runs/r/checkpoint.golf")
    events = events_of(folder)
    return SimpleNamespace(
        place=(meta["step"], meta["loader"], meta["expected_steps"]), tensors=tensors,
        artifact=(folder / "runs/r/model.golf").read_bytes(),
        losses={v["n"]: v["train_loss"] for e, v in events if e == "step"},
        scores={v["name"]: v["val_bpb"] for e, v in events if e == "eval"})


@pytest.fixture(scope="module")
def undisturbed(nursery, toy_settings, tmp_path_factory) -> SimpleNamespace:
    """The outcome where nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert nursery.run(settings_for(toy_settings, folder)) == (0, "")
    return outcome(folder)


@pytest.fixture(scope="module")
def earlier(nursery, toy_settings, tmp_path_factory) -> Path:
    """The folder of an earlier run of the same name, whose files are there when another begins."""
    folder = tmp_path_factory.mktemp("earlier")
    env = settings_for(toy_settings, folder, SEED="7", STAGES="train,quantize")
    assert nursery.run(env) == (0, "")
    return folder


def all_whole(folder: Path) -> set[str]:
    """Names of the whole files below `folder`; fails for a file that is neither whole nor .part."""
    names = set()
    for path in filter(Path.is_file, folder.rglob("*")):
        if path.suffix == ".golf":
            train_gpt.open_container(path, dict(model="artifact").get(path.stem, path.stem))
            names.add(path.name)
        elif path.suffix == ".txt":
            assert not path.read_text() or path.read_text().endswith("\n")
        else:
            assert re.fullmatch(r"\w+\.golf\.part", path.name), path
    return names


def one_line(printed: str, *named: str):
    """Fail unless the program printed one line of its own that names its subject."""
    assert re.fullmatch(r"train_gpt: [^\n]*\n", printed), printed
    assert all(name in printed for name in named), printed


# ------------------------------------------------------------------------------------------------
# kill -9
# ------------------------------------------------------------------------------------------------

MOMENTS = ("model params", "step n=2/", "step n=4/", "train_end", "hessians", "compress",
           "warm_up graph=scoring", "score chunk=2/")


def wait_for(log: Path, text: str):
    """Return as soon as the log says `text`."""
    for _ in range(10_000):
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.003)
    pytest.fail(f"{text!r} did not appear in 30 s")


def strike(nursery: Nursery, env: dict, moment: str, number: int, **order) -> tuple[int, str]:
    """Start a run, signal it up to 20 ms after its log says `moment`; returns how it ended."""
    child = nursery.start(env, **order)
    wait_for(Path(env["OUT_DIR"]) / "logs/r.txt", moment)
    time.sleep(0.02 * np.random.default_rng(len(moment)).random())
    with suppress(ProcessLookupError):                      # it was faster
        os.kill(child, number)
    return nursery.wait(child)


def carry_on(nursery: Nursery, env: dict):
    """Resume a run, or begin it again where the program says that there is nothing to resume."""
    code, printed = nursery.run({**env, "RESUME": "1"})
    if code:
        one_line(printed, "checkpoint")
        assert code == 2
        code, printed = nursery.run(env)
    assert (code, printed) == (0, "")


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_at_any_moment(nursery, undisturbed, toy_settings, tmp_path, moment):
    """Whenever a run is killed, its files are whole, and the run that follows ends the same.

    To the bit: weights, average, optimiser, place in the data, losses, artifact and scores.
    """
    env = settings_for(toy_settings, tmp_path)
    assert strike(nursery, env, moment, signal.SIGKILL)[0] in (0, -signal.SIGKILL)
    left = all_whole(tmp_path)
    if "model.golf" in left:                                # so quantization was over
        assert nursery.run({**env, "STAGES": "eval"}) == (0, "")
        assert undisturbed.scores.items() >= outcome(tmp_path).scores.items()
    carry_on(nursery, env)
    found = outcome(tmp_path)
    assert found.losses.items() <= undisturbed.losses.items()
    assert (found.place, found.tensors) == (undisturbed.place, undisturbed.tensors)
    assert (found.artifact, found.scores) == (undisturbed.artifact, undisturbed.scores)


WRITES = {  # what a write is cut short by: before the n-th sync or rename, or in its middle
    "sync of a checkpoint": dict(dies_before=("fsync", 1)),
    "rename of a checkpoint": dict(dies_before=("replace", 1)),
    "middle of a checkpoint": dict(largest=50_000, dies_of_size=True),
    "sync of the artifact": dict(dies_before=("fsync", 2)),
    "rename of the artifact": dict(dies_before=("replace", 2))}


@pytest.mark.parametrize("write", WRITES)
def test_kill_in_a_write(nursery, undisturbed, earlier, toy_settings, tmp_path, write):
    """Where a write is cut short the file of the earlier run is still there, whole."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    old = files_under(tmp_path)
    env = settings_for(toy_settings, tmp_path, STAGES="train,quantize", CHECKPOINT_SECONDS="0")
    assert nursery.run(env, **WRITES[write])[0] < 0
    assert all_whole(tmp_path) == {"checkpoint.golf", "model.golf"}
    kept = {name for name, data in files_under(tmp_path).items() if old.get(name) == data}
    assert kept == set(old) - ({"runs/r/checkpoint.golf"} if "artifact" in write else set())
    carry_on(nursery, env)
    assert outcome(tmp_path).artifact == undisturbed.artifact


# ------------------------------------------------------------------------------------------------
# Signals and ranks
# ------------------------------------------------------------------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_has_its_usual_effect(number):
    """The first asks training to end; the second calls the handler that was there before."""
    heard, before = [], signal.signal(number, lambda *_: heard.append(number))
    try:
        with train_gpt.StopRequest() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked and not heard
            os.kill(os.getpid(), number)
            assert heard == [number]
        assert signal.getsignal(number) is not stop.ask
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_training_early_and_still_ships(nursery, toy_settings, tmp_path, number):
    """After one signal the artifact is written and scored, and the log gives the reason."""
    env = settings_for(toy_settings, tmp_path, ITERATIONS="100000", CHECKPOINT_SECONDS="0")
    assert strike(nursery, env, "step n=3/", number) == (0, "")
    assert [v["reason"] for e, v in events_of(tmp_path) if e == "train_end"] == ["signal"]
    assert "ttt" in outcome(tmp_path).scores


def test_nohup_stays_in_force(nursery, toy_settings, tmp_path):
    """A SIGHUP that is ignored at the start, as by nohup, ends nothing."""
    env = settings_for(toy_settings, tmp_path, ITERATIONS="30", STAGES="train")
    assert strike(nursery, env, "step n=3/", signal.SIGHUP, nohup=True) == (0, "")
    assert [v["reason"] for e, v in events_of(tmp_path) if e == "train_end"] == ["iterations"]


@pytest.mark.parametrize("moment, number", [
    ("warm_up graph=plain", signal.SIGINT), ("hessians", signal.SIGINT),
    ("score chunk=1/", signal.SIGINT),
    ("hessians", signal.SIGTERM), ("score chunk=1/", signal.SIGHUP)])
def test_signals_outside_training_stop_the_run(nursery, toy_settings, tmp_path, moment, number):
    """Ctrl-C prints one line, other signals have their usual effect; files that exist are whole."""
    env = settings_for(toy_settings, tmp_path, TTT_EPOCHS="20",
                       WARMUP_STEPS="30" if "warm_up" in moment else "0")
    code, printed = strike(nursery, env, moment, number)
    if number == signal.SIGINT:
        one_line(printed, "stopped")
        assert code == 130
    else:
        assert (code, printed) == (-number, "")
    all_whole(tmp_path)


@pytest.mark.parametrize("moment, left", [
    ("step n=3/", {"checkpoint.golf"}), ("score chunk=1/", {"checkpoint.golf", "model.golf"})])
def test_a_rank_that_dies_ends_the_run(nursery, toy_settings, tmp_path, moment, left):
    """kill -9 of one of two ranks: the other prints one line, and the files are of use."""
    env = settings_for(toy_settings, tmp_path, TTT_EPOCHS="100", ITERATIONS=(
        "4000" if left == {"checkpoint.golf"} else "6"))
    ranks = nursery.start_ranks(env, {}, {})
    wait_for(tmp_path / "logs/r.txt", moment)
    os.kill(ranks[1], signal.SIGKILL)
    assert nursery.wait(ranks[1], 1)[0] == -signal.SIGKILL
    code, printed = nursery.wait(ranks[0])
    ours = [line for line in printed.splitlines() if line.startswith("train_gpt: ")]
    assert len(ours) == 1 and "another rank has died" in ours[0], printed
    assert "Traceback" not in printed
    assert code == 2 and all_whole(tmp_path) == left
    more = dict(STAGES="eval" if "model.golf" in left else "train", RESUME="1", ITERATIONS="6")
    assert nursery.run({**env, **more, "TTT_EPOCHS": "1"}) == (0, "")


def test_ranks_with_unequal_clocks_take_the_same_steps(nursery, toy_settings, tmp_path):
    """Where one rank's clock runs half as fast again, all end at one step with equal weights."""
    env = settings_for(toy_settings, tmp_path, MAX_WALLCLOCK_SECONDS="6", WARMUP_STEPS="3",
                       ITERATIONS="100000", TRAIN_LOG_EVERY="100000", CHECKPOINT_SECONDS="0",
                       STAGES="train")
    ranks = nursery.start_ranks(env, dict(haste=1.0), dict(haste=1.5))
    ends = [nursery.wait(child, rank) for rank, child in enumerate(ranks)]
    trained = [re.findall(r"^trained (\d+) (\w+)$", printed, re.M) for _, printed in ends]
    assert [code for code, _ in ends] == [0, 0] and trained[0] == trained[1], ends
    steps = int(trained[0][0][0])
    [end] = [v for e, v in events_of(tmp_path) if e == "train_end"]
    assert (end["reason"], int(end["steps"])) == ("wallclock", steps)
    assert steps > 10       # so that most were taken between two readings of the clock


# ------------------------------------------------------------------------------------------------
# Disks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, file, largest", [
    ("train", "checkpoint.golf", 50_000), ("quantize", "model.golf", 10_000)])
def test_a_disk_that_fills_up_leaves_the_old_files(
        nursery, earlier, toy_settings, tmp_path, stage, file, largest):
    """A file that does not fit: one line and exit code 2; the old files stay as they were."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    (tmp_path / "logs/r.txt").unlink()
    old = files_under(tmp_path)
    env = settings_for(toy_settings, tmp_path, SEED="7", STAGES=stage)
    code, printed = nursery.run(env, largest=largest)
    one_line(printed, f"{file}: cannot be written (File too large)")
    assert code == 2 and files_under(tmp_path) == old


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user whom modes bind")
@pytest.mark.parametrize("closed, mode, stage", [
    ("runs/r", 0o555, "train"), ("runs/r", 0o555, "quantize"), ("logs/r.txt", 0o444, "train"),
    ("runs/r/checkpoint.golf", 0, "quantize"), ("runs/r/model.golf", 0, "eval"),
    ("data/datasets", 0, "train"), ("data/tokenizers", 0, "eval")])
def test_folders_and_files_that_are_closed(nursery, earlier, toy_settings, closed, mode, stage):
    """A path that may not be read, entered or written is named in one line; nothing changes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(earlier, folder, dirs_exist_ok=True)
        shutil.copytree(toy_settings["DATA_DIR"], folder / "data")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        old = files_under(folder / "runs")
        (folder / closed).chmod(mode)
        env = settings_for(toy_settings, folder, SEED="7", STAGES=stage,
                           DATA_DIR=str(folder / "data"))
        code, printed = nursery.run(env, user=65534)
        (folder / closed).chmod(0o777)
        one_line(printed, closed.partition("/")[0])
        assert code == 2 and files_under(folder / "runs") == old


def test_a_loss_that_is_not_finite_leaves_the_old_files(earlier, toy_settings, tmp_path,
                                                        monkeypatch, capsys):
    """Steps that are too large: one line with the step and the settings to lower; files stay."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    old = files_under(tmp_path)
    env = settings_for(toy_settings, tmp_path, SEED="7", RESUME="1", ITERATIONS="40",
                       CHECKPOINT_SECONDS="0", TIED_EMBED_LR="1e18", SCALAR_LR="1e18")
    code, _, printed = run_main(monkeypatch, capsys, env)
    one_line(printed, "step", "loss", "TIED_EMBED_LR")
    assert code == 2 and files_under(tmp_path) == old


def test_a_log_on_a_full_disk(toy_env, tmp_path, monkeypatch, capsys):
    """The log is the first to meet a full disk: one line that names it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))    # of every file
    try:
        code, _, printed = run_main(monkeypatch, capsys, toy_env)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_line(printed, "pr1876_seed1337.txt", "File too large")
    assert code == 2


def test_a_disk_too_small_for_the_checkpoint(toy_env, monkeypatch, capsys):
    """Before its first step a run makes sure that its files will fit."""
    usage = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(train_gpt.shutil, "disk_usage", lambda path: usage)
    code, out, printed = run_main(monkeypatch, capsys, toy_env)
    one_line(printed, "1 MiB free", "OUT_DIR")
    assert code == 2 and "\nstep " not in out


@pytest.mark.parametrize("name", ["logs/pr1876_seed1337.txt", "runs/pr1876_seed1337/model.golf",
                                  "runs/pr1876_seed1337/checkpoint.golf"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_something_else_where_a_file_will_be(toy_env, tmp_path, monkeypatch, capsys, name, make):
    """A FIFO or a folder under the name of an output is refused before training, not waited for."""
    (tmp_path / name).parent.mkdir(parents=True)
    make(tmp_path / name)
    code, out, printed = run_main(monkeypatch, capsys, toy_env)
    one_line(printed, name, "no regular file")
    assert code == 2 and "\nstep " not in out


def test_two_runs_of_one_name(make_cfg):
    """The second run that would write a log is refused, and the first one's log stays whole."""
    dist, cfg = train_gpt.Dist({}), make_cfg()
    first = train_gpt.Log(cfg, dist)
    first("note", text="mine")
    with pytest.raises(train_gpt.GolfError, match="another run is writing it"):
        train_gpt.Log(cfg, dist)
    assert first.path.read_text() == "note text=mine\n"


def test_a_shard_that_changes_in_training(nursery, toy_settings, tmp_path):
    """A byte of a training shard that changes while training runs: no artifact is written."""
    shutil.copytree(toy_settings["DATA_DIR"], tmp_path / "data")
    env = settings_for(toy_settings, tmp_path, DATA_DIR=str(tmp_path / "data"), ITERATIONS="50")
    child = nursery.start(env)
    wait_for(tmp_path / "logs/r.txt", "step n=3/")
    flip_bit(tmp_path / "data/datasets" / f"toy_sp{VOCAB}" / "toy_train_000001.bin", 2000)
    code, printed = nursery.wait(child)
    one_line(printed, f"toy_sp{VOCAB}", "changed while training ran")
    assert code == 2 and not (tmp_path / "runs/r/model.golf").exists()
    assert any(event == "train_end" for event, _ in events_of(tmp_path))


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, named", [
    (dict(SEED="8"), "SEED"), (dict(HELD_OUT_EVERY="9"), "HELD_OUT_EVERY"),
    (dict(TRAIN_BATCH_TOKENS="128"), "TRAIN_BATCH_TOKENS"),
    (dict(SEQ_LEN="16", ROPE_BASE="10000.0"), "SEQ_LEN"), (dict(NUM_HEADS="4"), "NUM_HEADS"),
    (dict(), "shards")], ids=["seed", "held out", "batch", "length", "model", "data"])
def test_no_resume_under_other_settings(earlier, toy_settings, tmp_path, monkeypatch, capsys,
                                        settings, named):
    """What decides the order of the data must be as it was, or the run is no continuation."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    shutil.copytree(toy_settings["DATA_DIR"], tmp_path / "data")
    if not settings:
        (tmp_path / "data/datasets" / f"toy_sp{VOCAB}" / "toy_train_000002.bin").unlink()
    before = files_under(tmp_path / "runs")
    env = settings_for(toy_settings, tmp_path, SEED="7", RESUME="1", ITERATIONS="8",
                       DATA_DIR=str(tmp_path / "data"))
    code, _, printed = run_main(monkeypatch, capsys, {**env, **settings})
    one_line(printed, named)
    assert code == 2 and files_under(tmp_path / "runs") == before


def test_resume_at_the_end_changes_nothing(earlier, toy_settings, tmp_path, monkeypatch, capsys):
    """Resuming a training that is over takes no step and leaves the same tensors."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs/r/checkpoint.golf"
    before = checkpoint(path)[1]
    env = settings_for(toy_settings, tmp_path, SEED="7", STAGES="train", RESUME="1")
    assert run_main(monkeypatch, capsys, env)[0] == 0
    assert checkpoint(path)[1] == before


@pytest.mark.parametrize("settings", [
    dict(NUM_LAYERS="1", NUM_LOOPS="0", PARALLEL_RESIDUAL_START="0"), dict(NUM_LAYERS="2"),
    dict(NUM_LOOPS="0", SKIP_GATES_ENABLED="0", XSA_LAST_N="0", ROPE_DIMS="0"),
    dict(GRAD_CLIP_NORM="0", EMA_HORIZON_FRAC="0", WARMDOWN_FRAC="0", HELD_OUT_EVERY="2")])
def test_any_allowed_model_runs_to_the_end(toy_env, tmp_path, monkeypatch, capsys, settings):
    """The smallest settings that are accepted train, quantize, load and score."""
    code, _, err = run_main(monkeypatch, capsys, {**toy_env, **settings})
    assert (code, err) == (0, "")
    assert (tmp_path / "runs" / "pr1876_seed1337" / "model.golf").is_file()


# ------------------------------------------------------------------------------------------------
# The examples of faults.md, by row, on its own data and model
# ------------------------------------------------------------------------------------------------

def flip_bit(path: Path, at: int):
    """Change the lowest bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def notes_data(tmp_path_factory) -> Path:
    """A data_dir with manifest: 12 files of 6 kB and a vocabulary of 320."""
    folder, rng = tmp_path_factory.mktemp("notes"), np.random.default_rng(0)
    files = [folder / f"d{i}.txt" for i in range(12)]
    for path in files:
        path.write_text(" ".join(prose(rng) for _ in range(30))[:6000])
    assert prepare_data.main(["text", *map(str, files), "--name", "notes", "--vocab-size", "320",
                              "--data-dir", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture
def notes(notes_data, tmp_path) -> SimpleNamespace:
    """A copy of these data with the paths of its files, and the settings to train on it."""
    data = tmp_path / "data"
    shutil.copytree(notes_data, data)
    env = dict(RECIPE="demo", DATASET="notes_sp320", VOCAB_SIZE="320", MAX_WALLCLOCK_SECONDS="0",
               ITERATIONS="3", TTT_ENABLED="0", SLIDING_ENABLED="0", NUM_LAYERS="2", LOOP_END="1",
               MODEL_DIM="64", GPTQ_CALIBRATION_BATCHES="2", EVAL_BATCH_SEQS="8",
               WARMUP_STEPS="2", DATA_DIR=str(data), OUT_DIR=str(tmp_path), RUN_ID="r")
    folder = data / "datasets/notes_sp320"
    return SimpleNamespace(
        env=env, tokenizer=data / "tokenizers/notes_320_bpe.model",
        train=folder / "notes_train_000000.bin", val=folder / "notes_val_000000.bin")


def exchange_tokenizer(notes):
    """Row 1: a tokenizer of the same size, trained on other text."""
    words = "quick brown foxes jump over lazy dogs while five boxing wizards watch".split()
    texts = [" ".join(words[i % 12:] + words[:i % 7]) for i in range(40)]
    notes.tokenizer.write_bytes(prepare_data.train_tokenizer(texts, 320))


def halve_validation(notes):
    """Row 2: half of the validation shard, with a header that fits."""
    ids = train_gpt.read_shard(notes.val).tokens
    write_shard(notes.val, np.array(ids[:len(ids) // 2]))


def shorten_validation(notes):
    """Row 22: data without a manifest whose validation split is too short for one window."""
    write_shard(notes.val, np.ones(200, int))
    for name in ("manifest.json", ".lock"):
        notes.val.with_name(name).unlink()


@pytest.mark.parametrize("damage, settings, named", [
    (exchange_tokenizer, {}, ["notes_320_bpe.model", "SHA-256", "prepare_data.py"]),
    (halve_validation, {}, ["notes_val_000000.bin", "SHA-256", "prepare_data.py"]),
    (lambda notes: flip_bit(notes.train, 3000), {}, ["notes_train_000000.bin", "prepare_data.py"]),
    (lambda notes: flip_bit(notes.val, 2000), {}, ["notes_val_000000.bin", "prepare_data.py"]),
    (None, dict(WORLD_SIZE="2"), ["WORLD_SIZE=2", "torchrun"]),
    (shorten_validation, {}, ["notes_val_000000.bin", "200 validation tokens", "SEQ_LEN=256"]),
    (None, dict(MATRIX_LR="1e30", ITERATIONS="1"), ["MATRIX_LR"]),
    (None, dict(MATRIX_LR="1e18", ITERATIONS="1"), ["MATRIX_LR"]),
    (None, dict(TRAIN_SEQ_LEN="1024"), ["TRAIN_SEQ_LEN", "SEQ_LEN"]),
    (None, dict(TOKENIZER_PATH="x.model"), ["TOKENIZER_PATH", "DATA_DIR"]),
], ids=["1", "2", "3-train", "3-val", "20", "22", "25", "25-allowed", "26-length", "26-tokenizer"])
def test_faults_md(notes, tmp_path, monkeypatch, capsys, damage, settings, named):
    """One line that names the fault and its remedy, exit code 2, no artifact.

    Data are damaged between two starts, the first of which succeeds, and the second ends before its
    first step.
    """
    if damage:
        code, out, _ = run_main(monkeypatch, capsys, {**notes.env, "STAGES": "train"})
        assert code == 0 and "manifest=checked" in out
        damage(notes)
    code, out, err = run_main(monkeypatch, capsys, {**notes.env, **settings})
    one_line(err, *named)
    assert code == 2 and not list(tmp_path.rglob("model.golf"))
    assert "GPTQ_DAMPING" not in err
    assert "step n=" not in out or "MATRIX_LR" in settings


def test_faults_md_5_a_missing_hessian(make_cfg, make_run, quiet):
    """Quantization without the Hessian of one matrix raises an error that names the matrix."""
    run = make_run(make_cfg())
    names = run.flat.groups["muon"] + run.flat.groups["embed"]
    hessians = {n: torch.eye(run.flat.shapes[n][1]) for n in names}
    del hessians["layers.1.mlp.fc.weight"]
    with pytest.raises(train_gpt.GolfError, match="layers.1.mlp.fc.weight"):
        steps = train_gpt.wanted_steps(run.cfg, run.flat, run.flat.data, {}, 0.4)
        train_gpt.quantize_model(run.cfg, run.flat, run.flat.data, hessians, steps, quiet)


@pytest.mark.parametrize("folder, order", [
    ("\u00e9t\u00e9", dict(encoding="ascii")), ("not-utf8-\udcff", {})])
def test_faults_md_21_names_that_cannot_be_encoded(nursery, notes, tmp_path, folder, order):
    """A folder in e-acute on an ASCII console, or with a name that is not UTF-8, is no obstacle."""
    assert nursery.run({**notes.env, "OUT_DIR": str(tmp_path / folder)}, **order) == (0, "")
    [text] = [p.read_text() for p in (tmp_path / folder / "logs").iterdir()]
    assert "artifact file=" in text and "val_bpb:" in text


@pytest.mark.parametrize("redirection, printed", [
    ("2>&-", ""), (">&-", ""), (">/dev/full", "No space left on device"),
    ("| true", "Broken pipe")])
def test_faults_md_23_streams_that_are_closed_or_full(notes, tmp_path, redirection, printed):
    """Without stderr or stdout a run leaves whole files; its log says when the console went."""
    command = f'set -o pipefail; "{sys.executable}" "{PROGRAM}" {redirection}'
    done = subprocess.run(["bash", "-c", command], env={**clean_environment(), **notes.env},
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done
    assert all_whole(tmp_path / "runs") == {"checkpoint.golf", "model.golf"}
    log = (tmp_path / "logs/r.txt").read_text()
    assert "val_bpb:" in log and printed in log


def test_faults_md_19_a_lost_terminal(notes, tmp_path):
    """A terminal that closes in training, as of a lost ssh session: the run ends with a score."""
    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(PROGRAM)],
                  {**clean_environment(), **notes.env, "ITERATIONS": "100000"})
    wait_for(tmp_path / "logs/r.txt", "step n=1/")
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    log = (tmp_path / "logs/r.txt").read_text()
    assert "reason=signal" in log and "the console is gone" in log and "val_bpb:" in log


@pytest.mark.parametrize("module", ["brotli", "numpy", "torch.nn.functional"])
def test_ctrl_c_while_starting(toy_env, module):
    """Ctrl-C during imports ends the process with 130 and without a traceback.

    Python itself says when a module has been imported: a delay would depend on the machine.
    """
    process = subprocess.Popen([sys.executable, "-X", "importtime", str(PROGRAM)], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env={**clean_environment(), **toy_env})
    next(line for line in process.stderr if line.split("|")[-1].strip() == module)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 130 and "Traceback" not in printed


def test_faults_md_23_a_reader_that_goes_away(tmp_path):
    """`--help | head -1` prints the first line and nothing on stderr."""
    command = f'"{sys.executable}" "{PROGRAM}" --help | head -1'
    done = subprocess.run(["sh", "-c", command], env=clean_environment(), capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.stdout.startswith("usage:") and done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_faults_md_26_names_of_other_programs(notes, monkeypatch, capsys):
    """An exported MODEL_DIR, which resembles MODEL_DIM, stops nothing."""
    env = {**notes.env, "MODEL_DIR": "/models", "STAGES": "train"}
    assert run_main(monkeypatch, capsys, env)[0] == 0


def test_faults_md_29_windows(notes, monkeypatch, capsys):
    """On Windows one line names the remedy."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        code = train_gpt.main()
    err = capsys.readouterr().err
    one_line(err, "Windows", "WSL")
    assert code == 2


def test_faults_md_31_overtime(notes, tmp_path, monkeypatch, capsys):
    """A run that took too long is quantized and scored; log and final block name the clock."""
    # The machine stalls for 40 s before each reading of the clock.
    stalls = iter(range(40, 4000, 40))
    monkeypatch.setattr(train_gpt.Clock, "elapsed", lambda clock: next(stalls))
    env = {**notes.env, "MAX_WALLCLOCK_SECONDS": "90", "ITERATIONS": "100000"}
    code, out, err = run_main(monkeypatch, capsys, env)
    assert (code, err) == (0, "")
    events = [parse_line(line) for line in out.splitlines()]
    [over] = [v for e, v in events if e == "overtime"]
    assert over["clock"] == "data" and float(over["seconds"]) > float(over["limit_s"]) == 90
    block = dict(line.split(":", 1) for line in out.split("---\n")[1].splitlines())
    assert float(block["val_bpb"]) > 0 and (tmp_path / "runs/r/model.golf").is_file()
    assert re.fullmatch(r"\W+0 \(data clock: [\d.]+ s of 90 s\)\W?", block["counts"])


def test_faults_md_32_calibration_that_a_slow_machine_cannot_afford(notes, monkeypatch, capsys):
    """64 batches of 2.93 s in a budget of 90 s: as many as fit in a fifth of it, with a note."""
    monkeypatch.setattr(train_gpt, "median_seconds", lambda dist, times, work: 187.7 / 64)
    env = {**notes.env, "MAX_WALLCLOCK_SECONDS": "90", "STAGES": "train,quantize",
           "GPTQ_CALIBRATION_BATCHES": "64"}
    code, out, err = run_main(monkeypatch, capsys, env)
    assert (code, err) == (0, "")
    events = [parse_line(line) for line in out.splitlines()]
    assert [v["text"] for e, v in events if e == "note" and "5 of 64 batches" in v["text"]]
    assert [v["batches"] for e, v in events if e == "hessians"] == ["5"]
