"""Sections Training and Main: whole runs, in this process and in real ones, and their results."""
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pack
import prepare_data
import train_gpt
from conftest import PARTS, PROGRAM, VOCAB, WORDS, parse_line, run_main, write_shard

# From the readable program on x86-64, torch 2.13, one thread.  Other kernels may sum in another
# order, hence 1e-4; a change of algorithm moves the later ones by far more.
PINNED = [
    5.766332, 5.241420, 4.196985, 3.507880, 3.292173, 3.326179, 3.140144, 3.215480,
    3.171672, 2.911921, 2.863419, 2.851796, 2.727521, 2.775334, 2.868071, 2.590135,
    2.540982, 2.555452, 2.581455, 2.455287]

# train_gpt.py as a library, for each rank; prints the communication threads that outlive the run.
WITNESS = """
import os, sys
sys.path.insert(0, {folder!r})
sys.argv = ["train_gpt.py"]
import train_gpt
code = train_gpt.main()
names = [open(f"/proc/self/task/{{t}}/comm").read().strip() for t in os.listdir("/proc/self/task")]
os.write(2, f"threads left: {{[n for n in names if 'gloo' in n]}}\\n".encode())
os._exit(code)
"""


def steps(events):
    """{step: training loss} of a log."""
    return {int(v["n"].split("/")[0]): float(v["train_loss"]) for e, v in events if e == "step"}


def scores(events, key="val_bpb"):
    """{pass: bits per byte} of a log, or another value of its eval lines."""
    return {v["name"]: float(v[key]) for e, v in events if e == "eval"}


def log_path(env) -> Path:
    """Path of the log that a run with `env` wrote."""
    return Path(env["OUT_DIR"]) / "logs" / f"{env.get('RUN_ID', 'pr1876_seed1337')}.txt"


def artifact_of(env) -> Path:
    """Path of the artifact that a run with `env` wrote."""
    return Path(env["OUT_DIR"]) / "runs" / env.get("RUN_ID", "pr1876_seed1337") / "model.golf"


@pytest.fixture(scope="module")
def long_run(toy_settings, run_program, read_log, tmp_path_factory):
    """(environment, events) of a run of 20 steps, every loss logged, in a process of its own."""
    env = {**toy_settings, "OUT_DIR": str(tmp_path_factory.mktemp("long")), "ITERATIONS": "20",
           "TRAIN_LOG_EVERY": "1"}
    done = run_program(env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == log_path(env).read_text()
    return env, read_log(log_path(env))


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function of an environment that runs in this process and returns the run's events."""
    def run(env: dict) -> list[tuple[str, dict]]:
        code, out, err = run_main(monkeypatch, capsys, env)
        assert (code, err) == (0, "")
        return [parse_line(line) for line in out.splitlines()]
    return run


# ------------------------------------------------------------------------------------------------
# The results of a run, and what they do not depend on
# ------------------------------------------------------------------------------------------------

def test_first_losses_are_pinned(long_run):
    """20 losses on the CPU: proof that a change meant to move no number moves none."""
    losses = steps(long_run[1])
    assert losses == pytest.approx(dict(enumerate(PINNED, 1)), abs=1e-4)
    assert losses[1] == pytest.approx(math.log(VOCAB), abs=0.01)


def test_a_run_leaves_everything(long_run):
    """Log, checkpoint and artifact are there, no temporary file is; every pass was scored."""
    env, events = long_run
    names = {p.name for p in Path(env["OUT_DIR"]).rglob("*") if p.is_file()}
    assert names == {"pr1876_seed1337.txt", "checkpoint.golf", "model.golf"}
    assert set(scores(events)) == {"raw", "ema", "quantized", "sliding", "ttt"}


def test_the_final_block_repeats_the_log(long_run):
    """The block after --- names the headline score and the sizes on disk."""
    env, events = long_run
    text = log_path(env).read_text()
    block = dict(line.split(":") for line in text.split("---\n")[1].splitlines())
    block = {k: v.strip() for k, v in block.items()}
    assert block["score"] == "ttt"
    assert float(block["val_bpb"]) == scores(events)["ttt"]
    assert int(block["model_bytes"]) == artifact_of(env).stat().st_size
    assert int(block["code_bytes"]) == PROGRAM.stat().st_size
    assert int(block["artifact_bytes"]) == int(block["model_bytes"]) + int(block["code_bytes"])
    assert "counts" not in block


def test_another_seed_gives_other_bytes(long_run, run_here, tmp_path):
    """The artifact depends on the seed; the tests below show that it depends on nothing else."""
    other = {**long_run[0], "OUT_DIR": str(tmp_path), "SEED": "7", "RUN_ID": "s7",
             "STAGES": "train,quantize"}
    run_here(other)
    assert artifact_of(other).read_bytes() != artifact_of(long_run[0]).read_bytes()


def test_recurrence_that_never_ran_is_not_scored(toy_env, run_here, tmp_path):
    """Weights that were never trained looped are calibrated and scored as a model without loops."""
    env = {**toy_env, "STAGES": "train,quantize,eval", "TTT_ENABLED": "0", "SLIDING_ENABLED": "0"}
    late = scores(run_here({**env, "RUN_ID": "late", "ENABLE_LOOPING_AT": "2"}))
    never = scores(run_here({**env, "RUN_ID": "never", "NUM_LOOPS": "0"}))
    assert late == never


def test_stages_one_by_one(long_run, run_here, tmp_path):
    """train, quantize and eval alone, in another process and folder: the same bytes and scores.

    eval needs neither checkpoint nor training shards.
    """
    env, events = long_run
    data = tmp_path / "data"
    shutil.copytree(env["DATA_DIR"], data)
    parts, mine = {**env, "OUT_DIR": str(tmp_path), "DATA_DIR": str(data)}, []
    for stage in ("train", "quantize", "eval"):
        if stage == "eval":
            (tmp_path / "runs" / "pr1876_seed1337" / "checkpoint.golf").unlink()
            for shard in data.rglob("*_train_*"):
                shard.unlink()
        mine += run_here({**parts, "STAGES": stage})
    assert artifact_of(parts).read_bytes() == artifact_of(env).read_bytes()
    theirs = scores(events)
    assert scores(mine) == {name: theirs[name] for name in ("quantized", "sliding", "ttt")}


def test_micro_batches_change_nothing(long_run, run_here, tmp_path):
    """One sequence at a time gives the losses of four at a time."""
    env, events = long_run
    small = {**env, "OUT_DIR": str(tmp_path), "MICRO_BATCH_SEQS": "1", "STAGES": "train"}
    assert steps(run_here(small)) == pytest.approx(steps(events), abs=1e-4)


def test_two_processes_give_what_one_gives(long_run, run_program, read_log, tmp_path):
    """torchrun with two ranks: 20 losses to 1e-4, the scores to 1e-4, and the order of the data.

    Their communication threads have ended before they exit: one that is alive then may abort it.
    """
    env, events = long_run
    pair, program = {**env, "OUT_DIR": str(tmp_path)}, tmp_path / "witness.py"
    program.write_text(WITNESS.format(folder=str(PROGRAM.parent)))
    done = run_program(pair, world=2, timeout=120, program=program)
    assert done.returncode == 0, done.stderr
    both = read_log(log_path(pair))
    assert steps(both) == pytest.approx(steps(events), abs=1e-4)
    assert scores(both) == pytest.approx(scores(events), abs=1e-4)
    plans = [v["plan"] for e, v in [*events, *both] if e == "train_end"]
    assert plans[0] == plans[1]
    assert done.stderr.count("threads left: []") == 2, done.stderr


def test_packed_program_gives_the_same_losses(long_run, run_program, read_log, tmp_path):
    """The packed source trains like the readable one and leaves a model of the same bytes."""
    env, events = long_run
    packed, program = {**env, "OUT_DIR": str(tmp_path)}, tmp_path / "packed.py"
    program.write_bytes(pack.pack_source(PROGRAM.read_text(encoding="utf-8")))
    done = run_program(packed, program=program)
    assert done.returncode == 0, done.stderr
    assert steps(read_log(log_path(packed))) == steps(events)
    assert artifact_of(packed).read_bytes() == artifact_of(env).read_bytes()


@pytest.mark.parametrize("recipe", PARTS)
def test_each_recipe_runs_end_to_end(recipe, toy_env, run_here):
    """Each system trains, quantizes and scores, and its log shows which one it is."""
    shared = "seq_len", "rope_dims"                         # with the toy's other recipes
    own = {name.upper() for name in train_gpt.RECIPES[recipe] if name not in shared}
    env = {name: value for name, value in toy_env.items() if name not in own}
    env |= {name.upper(): str(value) for name, value in PARTS[recipe].items()}
    if "TTT_DOCUMENTS" in own:
        env |= dict(TTT_DOCUMENTS="1", TTT_LR="1", TTT_CHUNK_TOKENS="8")    # 48 exceed the context
    events = run_here({**env, "RECIPE": recipe})
    config = {k.lstrip("*"): v for event, values in events if event == "config"
              for k, v in values.items()}
    assert config["recipe"] == recipe
    for name, value in PARTS[recipe].items():
        assert config[name] == train_gpt.format_value(name, value)
    wanted = ["raw", "ema", "quantized", "sliding", "ttt"]
    assert list(scores(events)) == wanted[:4 + int(config["ttt_enabled"])]
    below_mean = [float(v["below_mean_frac"]) for event, v in events if event == "weights"]
    assert len(below_mean) == 1 and 0.3 < below_mean[0] < 1             # #1858's diagnostic
    assert any(event == "loop_on" for event, _ in events) == (config["num_loops"] != "0")


def test_overfits_one_batch(make_cfg, make_run):
    """The model, its gradients and all optimisers together can learn one batch by heart."""
    run = make_run(make_cfg())
    optimizers = train_gpt.TrainState(run, 1, False).optimizers
    rows = torch.randint(VOCAB, (4, 33), generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        train_gpt.forward_backward(run, rows, True)
        for optimizer in optimizers.values():
            optimizer.step(1.0, 0.95)
    assert run.flat.loss.item() < 1.0 < math.log(VOCAB)


# ------------------------------------------------------------------------------------------------
# Clocks and consoles
# ------------------------------------------------------------------------------------------------

def test_the_wall_clock_ends_training(toy_env, run_here):
    """A budget of two seconds stops training in time and leaves room for calibration."""
    env = {**toy_env, "MAX_WALLCLOCK_SECONDS": "2", "WARMUP_STEPS": "2", "ITERATIONS": "100000",
           "STAGES": "train,quantize"}
    events = dict(run_here(env))
    assert events["train_end"]["reason"] == "wallclock"
    assert float(events["data_closed"]["elapsed_s"]) <= 2
    assert 0 < int(events["budget"]["expected_steps"]) < 100000


def test_overtime_names_each_clock_that_was_exceeded(make_cfg):
    """Training data and scoring have budgets of their own; 0 is no limit."""
    clock = train_gpt.Clock(make_cfg(max_wallclock_seconds=600.0, warmup_steps=2))
    clock.close_training_data(590.0, 599.9)
    assert clock.overtime() == []
    clock.close_training_data(590.0, 600.1)
    clock.eval_seconds = 600.5
    assert clock.overtime() == [("data", 600.1, 600.0), ("eval", 600.5, 600.0)]
    clock.cfg = make_cfg(max_wallclock_seconds=0.0, eval_wallclock_seconds=0.0)
    assert clock.overtime() == []


def test_scoring_over_its_budget_does_not_count(toy_env, run_here, tmp_path):
    """A run whose scoring takes too long ends well; its log and final block name the clock."""
    events = run_here({**toy_env, "EVAL_WALLCLOCK_SECONDS": "0.0001"})
    assert [v["clock"] for e, v in events if e == "overtime"] == ["eval"]
    text = log_path(toy_env).read_text().split("---\n")[1]
    assert "val_bpb:" in text and re.search(r"^counts: +\W?0 \(eval clock: ", text, re.M)


def test_the_training_clock_counts_the_seconds_of_the_run_before(make_cfg):
    """A resumed clock goes on from the seconds of the killed run."""
    now = iter([100.0, 107.5])
    clock = train_gpt.Clock(make_cfg(), now=lambda: next(now))
    clock.start(30.0)
    assert clock.elapsed() == 37.5


def test_held_out_losses_are_off_the_clock(make_cfg, make_run, quiet, monkeypatch):
    """Every second step the loss of the weights on windows that no batch holds, in no time."""
    run, seconds = make_run(make_cfg(held_out_every=2)), [0.0]

    def taking(function, time):
        def timed(*args):
            seconds[0] += time
            return function(*args)
        return timed
    run.rt.clock.now = lambda: seconds[0]
    for name, time in dict(forward_backward=1.0, held_out_loss=1000.0).items():
        monkeypatch.setattr(train_gpt, name, taking(getattr(train_gpt, name), time))
    identity = train_gpt.check_data(run.cfg, run.rt)
    state, _ = train_gpt.train_stage(run, identity)
    assert state.seconds == 6.0 and seconds == [3006.0]
    assert [(e["n"], e["elapsed_s"]) for e in quiet.of("held_out")] == [(2, 2), (4, 4), (6, 6)]
    T, path = run.cfg.seq_len, train_gpt.find_shards(run.cfg, "train")[-1]
    tokens = torch.from_numpy(train_gpt.read_shard(path).tokens[-64 * T - 1:].astype(np.int64))
    inputs, targets = tokens[:-1].view(64, T), tokens[1:].view(64, T)
    with torch.no_grad():
        loss = run.model(inputs, targets, state.looped).double().mean().item()
    assert quiet.of("held_out")[-1]["loss"] == pytest.approx(loss, rel=1e-6)


def on_a_terminal(env, folder, struck_at):
    """(exit code, output) of a real run whose stderr is a terminal; Ctrl-C once it shows a text.

    Ctrl-C has its usual effect there, also where the tests' own parent ignores it.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    env = {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    drawn, heard = b"", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with (folder / "console").open("wb") as console:
        process = subprocess.Popen([sys.executable, str(PROGRAM)], env=env, cwd=folder,
                                   stdout=console, stderr=theirs, preexec_fn=heard)
    os.close(theirs)
    with suppress(OSError):                                 # nobody writes to it any more
        while data := os.read(ours, 4096):
            drawn += data
            if struck_at and struck_at in drawn:
                process.send_signal(signal.SIGINT)
                struck_at = b""
    os.close(ours)
    return process.wait(), drawn.decode()


def test_a_terminal_shows_progress_and_the_log_does_not(toy_env, tmp_path):
    """Bars show share, time left, step and loss within 80 columns; the log and stdout are clean.

    They take no escape sequences, so that TERM=dumb shows them too, and Ctrl-C in the middle of a
    bar leaves its line empty before the program's last word.
    """
    env = {**toy_env, "WARMUP_STEPS": "2", "ITERATIONS": "60", "TTT_EPOCHS": "50", "TERM": "dumb"}
    # Not at the first sign of a bar: until its constructor returns, tqdm cannot clear its line.
    code, drawn = on_a_terminal(env, tmp_path, b"\rscoring  17 %")
    assert code == 130 and "\x1b" not in drawn
    lines = re.split(r"[\r\n]+", drawn)
    for what in ("warming up", "training", "calibrating", "quantizing", "scoring"):
        assert any(line.startswith(what) for line in lines), what
    assert max(map(len, lines)) <= 80
    shape = r"training +\d+ % .* [\d:?]+ left, step \d+, loss \d+\.\d{3} *"
    assert any(re.fullmatch(shape, line) for line in lines), lines
    before, last = re.search(r"\r( *)\r(train_gpt: stopped[^\r\n]*)\r\n$", drawn).groups()
    log = log_path(env).read_text()
    assert "\r" not in log and "warming up" not in log and "█" not in log
    assert log == (tmp_path / "console").read_text()


@pytest.mark.parametrize("settings, complaint", [
    ({}, "no GPU"), (dict(on_cuda=True, compile_enabled=False), "compiler is off"),
    (dict(on_cuda=True, fused=False), "kernels do not run"), (dict(on_cuda=True), None)])
def test_the_log_names_what_slows_a_machine_down(settings, complaint):
    """Each thing that keeps a machine from its best is named with a remedy, and nothing else."""
    dist = SimpleNamespace(on_cuda=settings.get("on_cuda", False))
    run = SimpleNamespace(
        cfg=train_gpt.Config(compile_enabled=settings.get("compile_enabled", True)),
        rt=SimpleNamespace(dist=dist), model=SimpleNamespace(fused=settings.get("fused", True)),
        flat=SimpleNamespace(data=torch.empty(1, device="meta").expand(36_000_000)))
    found = list(train_gpt.slow_parts(run))
    assert len(found) == (complaint is not None) and all(complaint in text for text in found)


# ------------------------------------------------------------------------------------------------
# Bad input: one line that names the thing, exit code 2, nothing half-written
# ------------------------------------------------------------------------------------------------

def shard_of(env, split, index=0) -> Path:
    """Path of a shard of the toy corpus."""
    folder = Path(env["DATA_DIR"]) / "datasets" / f"toy_sp{VOCAB}"
    return folder / f"toy_{split}_{index:06d}.bin"


def lone(env, split, ids):
    """Replace all shards of `split` by one with these ids."""
    for old in shard_of(env, split).parent.glob(f"toy_{split}_*"):
        old.unlink()
    write_shard(shard_of(env, split), ids)


def swap_tokenizer(env):
    """Leave a tokenizer of another vocabulary in the place of the right one."""
    model = Path(env["DATA_DIR"]) / "tokenizers" / f"toy_{VOCAB}_bpe.model"
    model.rename(model.with_name("toy_384_bpe.model"))


def truncate(env):
    """Cut one token off the second training shard."""
    shard = shard_of(env, "train", 1)
    shard.write_bytes(shard.read_bytes()[:-2])


def block_output(env):
    """Leave a file where the folder of all output has to be."""
    Path(env["OUT_DIR"]).write_text("a file")


HEADER = np.zeros(256, "<i4").tobytes()
DAMAGE = {
    "no data directory": (lambda env: shutil.rmtree(env["DATA_DIR"]), {}, "no toy_train_*.bin"),
    "empty data directory": (lambda env: [p.unlink() for p in Path(env["DATA_DIR"]).rglob("*.bin")],
                             {}, "no toy_train_*.bin"),
    "wrong magic": (lambda env: shard_of(env, "train").write_bytes(HEADER), {},
                    "toy_train_000000.bin"),
    "empty shard": (lambda env: shard_of(env, "train").write_bytes(b""), {},
                    "toy_train_000000.bin"),
    "truncated shard": (truncate, {}, "toy_train_000001.bin"),
    "id beyond the vocabulary": (lambda env: lone(env, "train", np.full(5000, VOCAB)), {},
                                 f"token id {VOCAB}"),
    "shard shorter than a window": (lambda env: lone(env, "train", np.ones(9, int)), {}, "SEQ_LEN"),
    "short validation": (lambda env: lone(env, "val", np.ones(9, int)), {}, "9 validation tokens"),
    "other tokenizer": (swap_tokenizer, dict(VOCAB_SIZE="384"), "384"),
    "output that cannot be written": (block_output, {}, "out"),
    "unknown recipe": (None, dict(RECIPE="pr9999"), "RECIPE=pr9999"),
    "not a number": (None, dict(MATRIX_LR="nan"), "MATRIX_LR"),
    "no checkpoint": (None, dict(STAGES="quantize"), "checkpoint.golf"),
    "no artifact": (None, dict(STAGES="eval"), "model.golf"),
    "too large": (None, dict(TARGET_BYTES="1000"), "TARGET_BYTES=1000"),
    "too little time": (None, dict(MAX_WALLCLOCK_SECONDS="0.01", WARMUP_STEPS="2"),
                        "MAX_WALLCLOCK_SECONDS=0.01"),
    "exploding loss": (None, dict(TIED_EMBED_LR="1e18", SCALAR_LR="1e18", ITERATIONS="40"), "loss"),
}


def rejected(monkeypatch, capsys, env, *named):
    """Fail unless a run with `env` ends with exit code 2 and one line that names its subject."""
    code, _, err = run_main(monkeypatch, capsys, env)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("train_gpt: "), lines
    assert all(text in lines[0] for text in named), lines


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_input_is_one_line(case, toy_env, tmp_path, monkeypatch, capsys):
    """The fault is named in one line, and no artifact is left, except by a fault of scoring."""
    breakage, settings, named = DAMAGE[case]
    data = tmp_path / "data"
    shutil.copytree(toy_env["DATA_DIR"], data)
    env = {**toy_env, "DATA_DIR": str(data), "OUT_DIR": str(tmp_path / "out"), **settings}
    if breakage:
        breakage(env)
    rejected(monkeypatch, capsys, env, named)
    assert not list(tmp_path.rglob("*.part"))
    assert case == "other tokenizer" or not list(tmp_path.rglob("model.golf"))


def test_another_tokenizer_of_the_same_size(long_run, tmp_path, monkeypatch, capsys):
    """An artifact is scored with the tokenizer it was made with; made without one, with any."""
    env = {**long_run[0], "OUT_DIR": str(tmp_path), "DATA_DIR": str(tmp_path / "data")}
    shutil.copytree(long_run[0]["DATA_DIR"], env["DATA_DIR"])
    shutil.copytree(Path(long_run[0]["OUT_DIR"]) / "runs", tmp_path / "runs")
    model = tmp_path / "data" / "tokenizers" / f"toy_{VOCAB}_bpe.model"
    other = prepare_data.train_tokenizer([" ".join(WORDS[i:]) for i in range(20)], VOCAB)
    model.write_bytes(other)
    rejected(monkeypatch, capsys, {**env, "STAGES": "eval"}, f"{model}: not the tokenizer")
    model.unlink()
    assert run_main(monkeypatch, capsys, {**env, "STAGES": "quantize"})[0] == 0
    model.write_bytes(other)
    assert run_main(monkeypatch, capsys, {**env, "STAGES": "eval"})[0] == 0


def test_damaged_artifact_and_foreign_checkpoint(long_run, tmp_path, monkeypatch, capsys):
    """A flipped byte, a cut, another model's checkpoint: each is one line, and nothing changes."""
    env = {**long_run[0], "OUT_DIR": str(tmp_path)}
    shutil.copytree(Path(long_run[0]["OUT_DIR"]) / "runs", tmp_path / "runs")
    artifact, whole = artifact_of(env), artifact_of(env).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
    for damaged in (flipped, whole[:-1]):
        artifact.write_bytes(damaged)
        rejected(monkeypatch, capsys, {**env, "STAGES": "eval"}, "model.golf", "damaged")
        assert artifact.read_bytes() == damaged
    rejected(monkeypatch, capsys, {**env, "STAGES": "quantize", "MLP_MULT": "3.0"}, "MLP_MULT=2.0")
    assert artifact.read_bytes() == damaged


def test_other_arguments_are_rejected(run_program):
    """An argument other than --help gets a pointer to it."""
    done = run_program({}, args=["--iterations=5"])
    assert done.returncode == 2 and "--help" in done.stderr


def test_log_lines_can_be_read_back(tmp_path, make_cfg, read_log):
    """Values with blanks and quotes survive the log."""
    log = train_gpt.Log(make_cfg(), train_gpt.Dist({}))
    log("run", device='NVIDIA "H200"', flag=True, loss=1.5, items=[1, 2], empty="")
    [(event, values)] = read_log(tmp_path / "logs" / "pr1876_seed1337.txt")
    assert event == "run" and values == dict(device='NVIDIA "H200"', flag="1", loss="1.50000000",
                                             items="1,2", empty="")
