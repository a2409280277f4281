"""What the tests of train_gpt.py share: a tiny model, a toy corpus, real runs, logs read back.

Fixtures: cfg, make_cfg, toy_data, toy_settings, toy_env, run_program, read_log, quiet, make_run.
"""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the claims are about the CPU, wherever tests run
os.environ["TRITON_INTERPRET"] = "1"        # kernels, too, run on it

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train_gpt  # noqa: E402

torch.set_num_threads(1)
# In the background (`&`, nohup) signals are ignored, which the programs that tests start inherit.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

PROGRAM = ROOT / "train_gpt.py"
TEST_SECONDS = 180      # no test takes a tenth of it
VOCAB = 320             # 256 byte pieces, 4 control pieces, the letters, and a few merged pieces
TRAIN_SIZES, VAL_SIZE = (6000, 4501, 3002), 1501
TINY = dict(
    recipe="pr1876",
    dataset=f"toy_sp{VOCAB}", vocab_size=VOCAB, seq_len=32, num_layers=3, model_dim=64, num_heads=4,
    num_kv_heads=2, mlp_mult=2.0, rope_dims=8, xsa_last_n=2, num_loops=1, loop_start=1, loop_end=1,
    parallel_residual_start=2, iterations=6, max_wallclock_seconds=0.0, train_batch_tokens=256,
    micro_batch_seqs=4, warmup_steps=0, train_log_every=2, gptq_calibration_batches=2,
    code_step=0.4145, eval_stride=8, eval_batch_seqs=16, ttt_chunk_tokens=256)
# What makes a recipe's model and scoring its own, at a size for tests.
SMALL = dict(dataset=f"toy_sp{VOCAB}", vocab_size=VOCAB, mlp_mult=2.0, parallel_residual_start=2,
             two_lanes=1, looping_min_steps=0, train_batch_tokens=256, micro_batch_seqs=4)
# Tests have their own.
LEFT_OUT = "seq_len", "rope_dims", "ttt_documents", "ttt_lr", "ttt_chunk_tokens"
PARTS = {name: {**{k: v for k, v in values.items() if k not in LEFT_OUT},
                **{k: v for k, v in SMALL.items() if k in values}}
         for name, values in train_gpt.RECIPES.items() if name != "demo"}
WORDS = ("the model reads a page and learns from every line that it has scored before any weight "
         "may move while the clock runs and bytes are counted in the open").split()


# ------------------------------------------------------------------------------------------------
# Configurations and data
# ------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def seeded():
    """Let every test draw the same random tensors, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def limited():
    """Make a test that waits for something that never comes fail, instead of waiting with it."""
    def stop(number, frame):
        pytest.fail(f"no end after {TEST_SECONDS} s")
    usual = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TEST_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


def prose(rng: np.random.Generator) -> str:
    """A made-up document of some dozens of words, one in ten of them with a digit."""
    words = rng.choice(WORDS, int(rng.integers(20, 80)))
    return " ".join(f"{w}{rng.integers(10)}" if rng.random() < 0.1 else w for w in words) + "."


def write_shard(path: Path, ids: np.ndarray):
    """Write token ids as a shard in the challenge's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(prepare_data.shard_header(len(ids)) + np.asarray(ids, "<u2").tobytes())


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """A data_dir: three train shards of different lengths, one val shard and their tokenizer."""
    data_dir, rng = tmp_path_factory.mktemp("toy") / "data", np.random.default_rng(5)
    texts = [prose(rng) for _ in range(500)]
    model = prepare_data.train_tokenizer(texts, VOCAB)
    tokenizer = prepare_data.load_tokenizer(model)
    ids = np.concatenate(list(prepare_data.encode(tokenizer, texts, set())))
    layout = prepare_data.Layout(data_dir, "toy", f"toy_sp{VOCAB}", VOCAB)
    cuts = np.cumsum([VAL_SIZE, *TRAIN_SIZES])
    assert len(ids) >= cuts[-1], "the toy corpus is too short for its shards"
    val, *train, _ = np.split(ids, cuts)
    for split, shards in dict(val=[val], train=train).items():
        for i, part in enumerate(shards):
            write_shard(layout.shard(split, i), part)
    layout.tokenizer.parent.mkdir(parents=True)
    layout.tokenizer.write_bytes(model)
    return data_dir


@pytest.fixture
def make_cfg(toy_data, tmp_path):
    """A function of overrides: a tiny `Config` on the toy corpus that writes to tmp_path."""
    def make(**overrides) -> train_gpt.Config:
        return train_gpt.Config(**{**TINY, "data_dir": str(toy_data), "out_dir": str(tmp_path),
                                   **overrides})
    return make


@pytest.fixture
def cfg(make_cfg) -> train_gpt.Config:
    """The tiny `Config`: 3 layers, 64 wide, 32 tokens of context, 8 sequences a step."""
    return make_cfg()


# ------------------------------------------------------------------------------------------------
# Runs in this process
# ------------------------------------------------------------------------------------------------

class QuietLog:
    """Stands in for train_gpt.Log: prints nothing and remembers `events` and raw `lines`."""

    def __init__(self):
        """Nothing has been logged."""
        self.events, self.lines = [], []

    def __call__(self, event: str, **values):
        """Remember an event and its values as they are, not as text."""
        self.events.append((event, values))

    def line(self, text: str):
        """Remember a raw line."""
        self.lines.append(text)

    def track(self, items, what: str, total: float):
        """A progress bar that draws nothing."""
        return tqdm(items, disable=True)

    def of(self, event: str) -> list[dict]:
        """The values of all events of one name, in order."""
        return [values for name, values in self.events if name == event]


@pytest.fixture
def quiet() -> QuietLog:
    """A log that prints nothing and remembers its events."""
    return QuietLog()


@pytest.fixture
def make_run(quiet):
    """A function of a `Config` that returns a `Run` of one process with a quiet log."""
    def make(cfg: train_gpt.Config, dist=None) -> train_gpt.Run:
        return train_gpt.build_run(cfg, dist or train_gpt.Dist({}), quiet)
    return make


def stirred(run: train_gpt.Run, seed: int = 0) -> train_gpt.Run:
    """The same run with weights that make every part of the model matter."""
    rng = torch.Generator().manual_seed(seed)
    run.flat.data.mul_(0.5).add_(0.08 * torch.randn(len(run.flat.data), generator=rng))
    return run


def stream(cfg: train_gpt.Config, n: int, seed: int = 0) -> train_gpt.Stream:
    """A random stream of n targets, each of 0 to 9 bytes."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(cfg.vocab_size, size=n + 1).astype(np.int32))
    sizes = torch.from_numpy(rng.integers(10, size=n).astype(np.int16))
    return train_gpt.Stream(tokens, sizes)


def set_stage(patch: pytest.MonkeyPatch, env: dict, *args: str):
    """Let this process be one that was started under `env` alone, as train_gpt.py with `args`."""
    for name in set(os.environ) - {"PATH", "HOME"}:
        patch.delenv(name)
    for name, value in env.items():
        patch.setenv(name, str(value))
    patch.setattr(sys, "argv", ["train_gpt.py", *args])


def run_main(monkeypatch, capsys, env: dict, *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `main()` in this process under `env` alone."""
    set_stage(monkeypatch, env, *args)
    code = train_gpt.main()
    return code, *capsys.readouterr()


@contextmanager
def memory_below(most: int):
    """Fail if what happens inside takes `most` bytes of memory or more."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak} bytes"


# ------------------------------------------------------------------------------------------------
# Runs in processes of their own
# ------------------------------------------------------------------------------------------------

# For programs that tests start with `python -c`: die by SIGKILL right before the count-th call of
# any of some functions of `os`.
ARM = """
import os, signal
def arm(steps, count):
    for step in steps:
        def count_down(*args, real=getattr(os, step), **kwargs):
            nonlocal count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, step, count_down)
"""

@pytest.fixture(scope="session")
def toy_settings(toy_data) -> dict[str, str]:
    """Environment of a complete tiny run of all stages; OUT_DIR is the caller's to set."""
    values = {**TINY, "data_dir": toy_data}
    return {name.upper(): str(value) for name, value in values.items()}


@pytest.fixture
def toy_env(toy_settings, tmp_path) -> dict[str, str]:
    """Environment of a complete tiny run of all stages, writing to tmp_path."""
    return {**toy_settings, "OUT_DIR": str(tmp_path)}


@pytest.fixture(scope="session", name="run_program")
def run_program_fixture(tmp_path_factory):
    """A function (env, *, args, world, timeout, program, cwd) that runs train_gpt.py for real."""
    folder = tmp_path_factory.mktemp("cwd")

    def run_program(env: dict, *, args=(), world: int = 1, timeout: float = 60.0,
                    program: Path = PROGRAM, cwd: Path = folder) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        command = [sys.executable, *(launcher if world > 1 else ()), str(program), *args]
        clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        clean |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **env)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen(command, env=clean, cwd=cwd, start_new_session=True, **pipes)
        return finish(process, timeout)
    return run_program


@contextmanager
def imported(path: Path):
    """The program at `path` as a module of its own; what importing it changed is put back."""
    spec = importlib.util.spec_from_file_location("imported_program", path)
    module, hook = importlib.util.module_from_spec(spec), sys.excepthook
    sys.modules[spec.name] = module                         # where its dataclasses look
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]
        sys.excepthook = hook


def finish(process: subprocess.Popen, timeout: float) -> subprocess.CompletedProcess:
    """Wait for a process that leads its own group; fail, and end the whole group, on a timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end after {timeout} s\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def parse_line(line: str) -> tuple[str, dict[str, str]]:
    """(event, values) of a log line `event key=value ...`; a value with spaces is a JSON string."""
    event, _, rest = line.partition(" ")
    pairs = re.findall(r'(\S+?)=("(?:[^"\\]|\\.)*"|\S*)', rest)
    return event, {k: json.loads(v) if v.startswith('"') else v for k, v in pairs}


@pytest.fixture(scope="session", name="read_log")
def read_log_fixture():
    """A function of a log's path that returns its lines as (event, values), values being text."""
    return lambda path: [parse_line(line) for line in Path(path).read_text().splitlines()]
