"""Sections Training and Main: faults of disks, ranks and signals, and resumes that are forbidden.

Every fault is a real one: signals, file-size limits, ranks in processes of their own.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import submit
import train_gpt
from conftest import ARM, PROGRAM, ROOT, VOCAB, finish, prose, run_main

WRAPPER = """
import os, resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv[0] = {program!r}
runpy.run_path({program!r}, run_name="__main__")
"""
WITNESS = """
import os, sys
sys.path.insert(0, {folder!r})
sys.argv = ["train_gpt.py"]
import train_gpt
code = train_gpt.main()
names = [open(f"/proc/self/task/{{t}}/comm").read().strip() for t in os.listdir("/proc/self/task")]
print("threads left:", *[n for n in names if "gloo" in n], file=sys.stderr, flush=True)
os._exit(code)
"""

# Forks a child for every order that it reads, so that a run starts without importing torch again.
NURSERY = ARM + """
import json, os, resource, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
import brotli, sentencepiece, torch, torch._dynamo
import prepare_data, train_gpt
sys.modules["pack"] = None                      # packing for one log line takes seconds
torch.set_num_threads(1)

def work(order):
    console = os.open(order["console"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(console, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "dies_before" in order:
        step, count = order["dies_before"]
        arm([step], count)
    if "largest" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"],) * 2)
    if "dies_of_size" in order:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if "user" in order:
        os.setuid(order["user"])
    os.environ.update(order["env"])
    sys.argv = ["train_gpt.py"]
    return prepare_data.main(order["text"]) if "text" in order else train_gpt.main()

for line in sys.stdin:
    child = os.fork()
    if not child:
        code = 1
        try:
            code = work(json.loads(line))
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def files_under(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder but logs, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "logs" not in p.parts}


class Nursery:
    """Runs of the programs in processes of their own that start in no time; one at a time."""

    def __init__(self, folder: Path):
        """Start the process that imports all libraries and waits for orders."""
        clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.console = folder / "console"
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(ROOT)], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, env=dict(clean, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))

    def start(self, env: dict, **order) -> int:
        """Start a run and return the id of its process; `order` says what is to befall it."""
        order = dict(order, env=env, console=str(self.console))
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """(exit code, what it told) of the run; minus the number of the signal that killed it."""
        code = os.waitstatus_to_exitcode(int(self.process.stdout.readline()))
        return code, self.console.read_text()

    def run(self, env: dict, **order) -> tuple[int, str]:
        """The same of a whole run."""
        self.start(env, **order)
        return self.wait()


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


def outcome(folder: Path) -> SimpleNamespace:
    """All that a finished run in `folder` is worth: checkpoint, artifact, losses and scores."""
    meta, tensors = train_gpt.read_container(folder / "runs/r/checkpoint.golf", "checkpoint")
    log = submit.read_log(folder / "logs/r.txt")
    return SimpleNamespace(
        place=(meta["step"], meta["loader"], meta["expected_steps"]),
        tensors={name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        artifact=(folder / "runs/r/model.golf").read_bytes(),
        losses={e.values["n"]: e.values["train_loss"] for e in log.all("step")},
        scores={e.values["name"]: e.values["val_bpb"] for e in log.all("eval")})


@pytest.fixture(scope="module")
def undisturbed(nursery, toy_settings, tmp_path_factory) -> SimpleNamespace:
    """What comes out where nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert nursery.run(settings_for(toy_settings, folder)) == (0, "")
    return outcome(folder)


def all_whole(folder: Path):
    """Fail unless every file below `folder` is a whole one, or one whose name says that it is not.

    Returns: the names of those that are whole.
    """
    names = set()
    for path in filter(Path.is_file, folder.rglob("*")):
        if path.suffix == ".golf":
            train_gpt.read_container(path, dict(model="artifact").get(path.stem, path.stem))
            names.add(path.name)
        elif path.suffix == ".txt":
            assert not path.read_text() or path.read_text().endswith("\n")
        else:
            assert re.fullmatch(r"\w+\.golf\.\d+\.part", path.name), path
    return names


def one_line(told: str, *named: str):
    """Fail unless the program told one line of its own that names what it is about."""
    assert re.fullmatch(r"(train_gpt|prepare_data): [^\n]*\n", told), told
    assert all(name in told for name in named), told


def carry_on(nursery: Nursery, env: dict):
    """Resume a run, or begin it again where the program says that there is nothing to resume."""
    code, told = nursery.run({**env, "RESUME": "1"})
    if code:
        one_line(told, "checkpoint")
        assert code == 2
        code, told = nursery.run(env)
    assert (code, told) == (0, "")


# ------------------------------------------------------------------------------------------------
# kill -9
# ------------------------------------------------------------------------------------------------

MOMENTS = ("attention", "step n=2/", "step n=4/", "train_end", "hessians", "compress",
           "warm_up graph=scoring", "score chunk=2/")


def wait_for(log: Path, text: str):
    """Return as soon as the log says `text`."""
    for _ in range(30_000):
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.001)
    pytest.fail(f"{text!r} did not appear in 30 s")


def strike(nursery: Nursery, env: dict, moment: str, number: int) -> tuple[int, str]:
    """Start a run, signal it up to 20 ms after its log says `moment`; returns what became of it."""
    child = nursery.start(env)
    wait_for(Path(env["OUT_DIR"]) / "logs/r.txt", moment)
    time.sleep(0.02 * np.random.default_rng(len(moment)).random())
    with suppress(ProcessLookupError):                      # it was faster
        os.kill(child, number)
    return nursery.wait()


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_at_any_moment(nursery, undisturbed, toy_settings, tmp_path, moment):
    """Whenever a run is killed, what is left is whole, and the run that follows ends the same.

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

@pytest.fixture(scope="module")
def earlier(nursery, toy_settings, tmp_path_factory) -> Path:
    """The folder of an earlier run of the same name, whose files are there when another begins."""
    folder = tmp_path_factory.mktemp("earlier")
    env = settings_for(toy_settings, folder, SEED="7", STAGES="train,quantize")
    assert nursery.run(env) == (0, "")
    return folder


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


@pytest.fixture(scope="module")
def notes(nursery, tmp_path_factory) -> SimpleNamespace:
    """Files for `prepare_data.py text`: arguments of an old and a new dataset, and the new one."""
    folder = tmp_path_factory.mktemp("notes")
    rng, files = np.random.default_rng(0), [folder / f"{i}.txt" for i in range(24)]
    for path in files:
        path.write_text("\n".join(prose(rng) for _ in range(6)))
    usual = ["--name", "toy", "--vocab-size", str(VOCAB), "--shard-tokens", "1000", "--data-dir"]
    old, new = (["text", *map(str, files[:n]), *usual] for n in (20, 24))
    for arguments, name in ((old, "old"), (new, "new")):
        assert nursery.run({}, text=[*arguments, str(folder / name)]) == (0, "")
    return SimpleNamespace(new=new, before=folder / "old", after=files_under(folder / "new"))


def may_be_used(data_dir: Path) -> bool:
    """Whether train_gpt.py takes a folder for a dataset; if not, it says so in one line."""
    cfg = train_gpt.Config(data_dir=str(data_dir), dataset=f"toy_sp{VOCAB}", vocab_size=VOCAB)
    try:
        return bool(train_gpt.open_shards(cfg, "train", train_gpt.Clock(cfg), lambda *a, **k: None))
    except train_gpt.DataError as e:
        assert str(data_dir) in str(e) and "prepare_data.py" in str(e) and "\n" not in str(e)
        return False


STEPS = [("random", 0.1), ("random", 0.3), ("random", 0.6), ("random", 0.9), ("fsync", 5),
         ("unlink", 3), ("replace", 1), ("replace", 3), ("replace", 5), ("fsync", 12)]


@pytest.mark.parametrize("step, when", STEPS)
def test_kill_of_prepare_data(nursery, notes, tmp_path, step, when):
    """A dataset that is being made anew is the old one, the new one, or none that can be used."""
    data = tmp_path / "data"
    shutil.copytree(notes.before, data)
    old, arguments = files_under(data), [*notes.new, str(data)]
    child = nursery.start({}, text=arguments, **({} if step == "random" else {
        "dies_before": (step, when)}))
    if step == "random":
        time.sleep(when * np.random.default_rng(3).random())
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert nursery.wait()[0] in (0, -signal.SIGKILL)
    left = {name: data for name, data in files_under(data).items() if not name.endswith(".tmp")}
    for name, content in left.items():
        assert content in (old.get(name), notes.after.get(name)) or name.endswith(".lock"), name
    whole = all(left.items() >= files.items() for files in (old,)) or (
        left.items() >= notes.after.items())
    assert may_be_used(data) == whole
    assert nursery.run({}, text=arguments) == (0, "")
    assert files_under(data) == notes.after and may_be_used(data)


# ------------------------------------------------------------------------------------------------
# Ranks and signals
# ------------------------------------------------------------------------------------------------

def test_ranks_leave_no_thread_behind(toy_env, run_program, tmp_path):
    """At the end of a run the communication threads have ended: one alive at exit may abort it."""
    program = tmp_path / "witness.py"
    program.write_text(WITNESS.format(folder=str(PROGRAM.parent)))
    done = run_program({**toy_env, "SLIDING_ENABLED": "0", "TTT_ENABLED": "0"}, world=2,
                       program=program)
    assert done.stderr.count("threads left:") == 2, done.stderr
    assert "gloo" not in done.stderr.replace("_gloo", ""), done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_has_its_usual_effect(number):
    """The first asks training to end, the second is the handler's that was there before."""
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


@pytest.mark.parametrize("moment, number", [
    ("warm_up graph=plain", signal.SIGINT), ("hessians", signal.SIGINT),
    ("score chunk=1/", signal.SIGINT),
    ("hessians", signal.SIGTERM), ("score chunk=1/", signal.SIGTERM)])
def test_signals_outside_training_stop_the_run(nursery, toy_settings, tmp_path, moment, number):
    """Ctrl-C is told in one line, SIGTERM has its usual effect; files that are left are whole.

    In training the first one is a wish to end early: tests/test_train.py.
    """
    env = settings_for(toy_settings, tmp_path, TTT_EPOCHS="20", WARMUP_STEPS="50")
    code, told = strike(nursery, env, moment, number)
    if number == signal.SIGINT:
        one_line(told, "stopped")
        assert code == 130
    else:
        assert (code, told) == (-number, "")
    all_whole(tmp_path)


def rank_processes(launcher: int) -> dict[int, int]:
    """Process ids of the ranks that a torchrun has started, by rank."""
    found = {}
    for task in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((task / "stat").read_text().rpartition(")")[2].split()[1])
            rank = re.search(r"(?:^|\0)RANK=(\d+)", (task / "environ").read_text())
            if parent == launcher and rank:
                found[int(rank[1])] = int(task.name)
    return found


@pytest.mark.parametrize("moment, left", [
    ("step n=3/", {"checkpoint.golf"}), ("score chunk=1/", {"checkpoint.golf", "model.golf"})])
def test_a_rank_that_dies_ends_the_run(nursery, toy_settings, tmp_path, moment, left):
    """kill -9 of one of two ranks: all end, none with a traceback, and what is left is of use."""
    env = settings_for(toy_settings, tmp_path, TTT_EPOCHS="100", ITERATIONS=(
        "4000" if left == {"checkpoint.golf"} else "6"))
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, str(PROGRAM)], stdout=subprocess.DEVNULL, text=True,
        stderr=subprocess.PIPE, start_new_session=True,
        env=dict(clean, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **env))
    wait_for(tmp_path / "logs/r.txt", moment)
    os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
    told = finish(process, 30).stderr
    assert process.returncode and "[rank0]" not in told, told
    ours = [line for line in told.splitlines() if line.startswith("train_gpt: ")]
    assert len(ours) <= 1 and all("another rank has died" in line for line in ours), told
    assert all_whole(tmp_path) == left
    more = dict(STAGES="eval" if "model.golf" in left else "train", RESUME="1", ITERATIONS="6")
    assert nursery.run({**env, **more, "TTT_EPOCHS": "1"}) == (0, "")


# ------------------------------------------------------------------------------------------------
# Disks
# ------------------------------------------------------------------------------------------------

def test_a_disk_that_fills_up_later_leaves_the_old_files(nursery, earlier, toy_settings, tmp_path):
    """An artifact that does not fit: one line, and the old one stays, as does the checkpoint."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    (tmp_path / "logs/r.txt").unlink()
    old = files_under(tmp_path)
    env = settings_for(toy_settings, tmp_path, SEED="7", STAGES="quantize")
    code, told = nursery.run(env, largest=len(old["runs/r/model.golf"]) - 1)
    one_line(told, "model.golf: cannot be written (File too large)")
    assert code == 2 and files_under(tmp_path) == old


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user whom modes bind")
@pytest.mark.parametrize("closed, mode, stage", [
    ("runs/r", 0o555, "train"), ("runs/r", 0o555, "quantize"), ("logs/r.txt", 0o444, "train"),
    ("runs/r/checkpoint.golf", 0, "quantize"), ("runs/r/model.golf", 0, "eval"),
    ("data/datasets", 0, "train"), ("data/tokenizers", 0, "eval")])
def test_folders_and_files_that_are_closed(nursery, earlier, toy_settings, closed, mode, stage):
    """What may not be read, entered or written is named in one line, and nothing changes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(earlier, folder, dirs_exist_ok=True)
        shutil.copytree(toy_settings["DATA_DIR"], folder / "data")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        old = files_under(folder)
        (folder / closed).chmod(mode)
        env = settings_for(toy_settings, folder, SEED="7", STAGES=stage,
                           DATA_DIR=str(folder / "data"))
        code, told = nursery.run(env, user=65534)
        (folder / closed).chmod(0o777)
        one_line(told, closed.partition("/")[0])
        assert code == 2 and files_under(folder) == old


def test_a_loss_that_is_no_number_leaves_the_old_files(nursery, toy_settings, tmp_path):
    """Steps that are too large: one line with the step and the settings to lower; files stay."""
    env = settings_for(toy_settings, tmp_path, ITERATIONS="3", CHECKPOINT_SECONDS="0")
    assert nursery.run(env) == (0, "")
    old = files_under(tmp_path)
    code, told = nursery.run({**env, "RESUME": "1", "ITERATIONS": "40", "TIED_EMBED_LR": "1e30",
                              "SCALAR_LR": "1e30"})
    one_line(told, "step", "loss", "TIED_EMBED_LR")
    assert code == 2 and files_under(tmp_path) == old


def test_a_disk_that_fills_up_leaves_the_old_files(toy_env, run_program, tmp_path):
    """A checkpoint larger than what is left: one line, exit code 2, the old one as it was."""
    folder = tmp_path / "runs" / "pr1876_seed1337"
    folder.mkdir(parents=True)
    (folder / "checkpoint.golf").write_bytes(b"old")
    program = tmp_path / "wrapper.py"
    program.write_text(WRAPPER.format(program=str(PROGRAM)))
    before = files_under(tmp_path)
    done = run_program(toy_env, program=program)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "checkpoint.golf: cannot be written (File too large)" in done.stderr
    assert files_under(tmp_path) == before


def test_a_log_on_a_full_disk(toy_env, tmp_path, monkeypatch, capsys):
    """The log is the first to meet a full disk: one line that names it."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "pr1876_seed1337.txt").symlink_to("/dev/full")
    code, _, err = run_main(monkeypatch, capsys, toy_env)
    assert code == 2 and len(err.splitlines()) == 1
    assert "pr1876_seed1337.txt" in err and "No space left" in err


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

def drop_a_shard(data: Path):
    """Take the last training shard away."""
    (data / "datasets" / f"toy_sp{VOCAB}" / "toy_train_000002.bin").unlink()


@pytest.mark.parametrize("settings, named", [
    (dict(SEED="7"), "SEED"), (dict(LOADER="shuffled"), "LOADER"),
    (dict(TRAIN_BATCH_TOKENS="128"), "TRAIN_BATCH_TOKENS"),
    (dict(SEQ_LEN="16", ROPE_BASE="10000.0"), "SEQ_LEN"), (dict(NUM_HEADS="2"), "NUM_HEADS"),
    (None, "shards")], ids=["seed", "loader", "batch", "length", "model", "data"])
def test_no_resume_under_other_settings(toy_env, tmp_path, monkeypatch, capsys, settings, named):
    """What decides the order of the data must be as it was, or the run is no continuation."""
    data = tmp_path / "data"
    shutil.copytree(toy_env["DATA_DIR"], data)
    env = {**toy_env, "DATA_DIR": str(data), "RUN_ID": "r", "STAGES": "train", "ITERATIONS": "2"}
    assert run_main(monkeypatch, capsys, env)[0] == 0
    if settings is None:
        drop_a_shard(data)
    before = files_under(tmp_path / "runs")
    code, _, err = run_main(monkeypatch, capsys, {
        **env, **(settings or {}), "RESUME": "1", "ITERATIONS": "4"})
    assert code == 2 and len(err.splitlines()) == 1 and named in err
    assert files_under(tmp_path / "runs") == before


def test_resume_at_the_end_changes_nothing(toy_env, tmp_path, monkeypatch, capsys):
    """Resuming a training that is over takes no step and leaves the same checkpoint tensors."""
    env = {**toy_env, "STAGES": "train"}
    assert run_main(monkeypatch, capsys, env)[0] == 0
    path = tmp_path / "runs" / "pr1876_seed1337" / "checkpoint.golf"
    before = train_gpt.read_container(path, "checkpoint")[1]
    assert run_main(monkeypatch, capsys, {**env, "RESUME": "1"})[0] == 0
    after = train_gpt.read_container(path, "checkpoint")[1]
    assert before.keys() == after.keys() and all((before[n] == after[n]).all() for n in before)


@pytest.mark.parametrize("settings", [
    dict(NUM_LAYERS="1", NUM_LOOPS="0", PARALLEL_RESIDUAL_START="0"), dict(NUM_LAYERS="2"),
    dict(NUM_LOOPS="0", SKIP_GATES_ENABLED="0", XSA_LAST_N="0", ROPE_DIMS="0"),
    dict(GRAD_CLIP_NORM="0", EMA_HORIZON_FRAC="0", WARMDOWN_FRAC="0", LOADER="shuffled")])
def test_any_allowed_model_runs_to_the_end(toy_env, tmp_path, monkeypatch, capsys, settings):
    """The smallest settings that are accepted train, quantize, load and score."""
    code, _, err = run_main(monkeypatch, capsys, {**toy_env, **settings})
    assert (code, err) == (0, "")
    assert (tmp_path / "runs" / "pr1876_seed1337" / "model.golf").is_file()


def test_scoring_over_its_budget_is_refused(toy_env, tmp_path, monkeypatch, capsys):
    """A whole run whose scoring takes too long ends in one line and prints no score block."""
    env = {**toy_env, "EVAL_WALLCLOCK_SECONDS": "0.0001"}
    code, _, err = run_main(monkeypatch, capsys, env)
    assert code == 2 and len(err.splitlines()) == 1 and "scoring" in err
    text = (tmp_path / "logs" / "pr1876_seed1337.txt").read_text()
    assert "val_bpb:" not in text
