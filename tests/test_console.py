"""console.py: how the scripts beside train_gpt.py end, with real signals and a full disk.

Run alone: python -m pytest -q tests/test_console.py
"""
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import console  # noqa: E402


@pytest.mark.parametrize("delay", [0, 20, 80])
@pytest.mark.parametrize("script", [
    "prepare_data.py", "use_artifact.py", "experiments/byte_mixture.py", "bench/step_time.py"])
def test_ctrl_c_during_the_imports_is_one_line(script, delay):
    """A SIGINT when console.py and `delay` more modules have been imported ends so, with 130."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / script], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not process.stderr.readline().endswith(" console\n"):
        assert process.poll() is None
    for _ in range(delay):
        process.stderr.readline()
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=60)[1].splitlines()
    told = [line for line in lines if not line.startswith("import time:")]
    assert process.returncode == 130
    assert told == [f"{Path(script).stem}: stopped; run the same command again"]


def test_ctrl_c_is_ignored_where_the_caller_said_so():
    """As for a job in the background of a shell without job control."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / "pack.py", "--help"], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    while not process.stderr.readline().endswith(" console\n"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_pytest_keeps_its_own_handler():
    """Only a process that a script started gets the handler."""
    assert signal.getsignal(signal.SIGINT) is not console.leave


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("work, code", [
    ("raise console.Failure('bad')", 2), ("raise OSError(5, 'bad')", 2),
    ("raise KeyboardInterrupt", 130), ("print('x'); return 1", 1)])
def test_a_full_stderr_does_not_change_the_exit_code(work, code):
    """The line is lost, but not the code, neither to a traceback nor to Python's exit."""
    program = f"import console, sys\ndef work():\n {work}\nsys.exit(console.run('x', work))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=full,
                              stdout=subprocess.DEVNULL, timeout=60)
    assert done.returncode == code
