"""Sections Training and Main: faults of disks, ranks and signals, and resumes that are forbidden.

Every fault is a real one: signals, file-size limits, ranks in processes of their own.
"""
import os
import shutil
import signal
from pathlib import Path

import pytest

import train_gpt
from conftest import PROGRAM, VOCAB, run_main

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


def files_under(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder but logs, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "logs" not in p.parts}


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


# ------------------------------------------------------------------------------------------------
# Disks
# ------------------------------------------------------------------------------------------------

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
