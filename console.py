"""What the scripts beside train_gpt.py share: command lines, streams, files, one-line errors.

train_gpt.py does not import this: it is submitted as one file and carries what it needs itself.
The scripts import it before any library that takes long, so that Ctrl-C ends that in one line too.
"""
import argparse
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

STOPPED = "stopped; run the same command again"


class Failure(Exception):
    """Base class for expected failures; `run` prints them as one line and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises Failure instead of printing its usage and exiting.

    Lines of the description stay as they are, so that it can be a module's docstring.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise Failure(f"{message}; see --help")


def run(name: str, work: Callable[[], int], *expected: type[Exception]) -> int:
    """Return the exit code of `work`, or print one line for a failure that a user can cause.

    Exit codes: 1 stdout's reader has gone, 2 a Failure, OSError or one of `expected`, 130 Ctrl-C.
    """
    open_streams()
    code = 2
    try:
        try:
            if signal.getsignal(signal.SIGINT) is leave:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            return work()
        except SystemExit as e:                 # argparse after --help
            return e.code or 0
        finally:
            sys.stdout.flush()                  # a full disk must fail here, not in Python's exit
    except BrokenPipeError:                     # the reader, for example `head`, has gone
        discard(sys.stdout)
        return 1
    except (Failure, *expected) as e:
        problem = str(e)
    except OSError as e:
        problem = f"{e.filename or 'the console'}: {e.strerror}"
        discard(sys.stdout)
    except KeyboardInterrupt:
        code, problem = 130, STOPPED
    try:
        print(f"{name}: {one_line(problem)}", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)                     # else Python's exit would make the code 120
    return code


def one_line(text: str) -> str:
    """`text` without control characters, at most 1,000 characters: messages may quote any file."""
    return "".join(c if c.isprintable() else " " for c in text)[:1000]


def open_streams():
    """Make all standard streams usable: closed ones become /dev/null, odd encodings escape.

    Without this the next file that is opened would take the number of a closed stream, and whatever
    is printed would be written into that file.
    """
    for number, name, mode in (0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):      # absent where a test has replaced the stream
            stream.reconfigure(errors="backslashreplace")


def discard(stream: TextIO):
    """Send what is still buffered in `stream`, and all later output, nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_regular(path: Path):
    """Raise Failure unless `path` is a regular file: opening a FIFO could block forever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:          # ValueError: a NUL character in the name
        raise Failure(f"{path}: cannot be read ({getattr(e, 'strerror', e)})") from None
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise Failure(f"{path}: a {kind}, needed a regular file")


def read_file(path: Path, most: int | None = None) -> bytes:
    """Bytes of a regular file; raises Failure if it cannot be read or is longer than `most`."""
    check_regular(path)
    try:
        with open(path, "rb") as f:
            data = f.read(-1 if most is None else most + 1)
    except OSError as e:
        raise Failure(f"{path}: cannot be read ({e.strerror})") from None
    if most is not None and len(data) > most:
        raise Failure(f"{path}: more than {most:,} bytes")
    return data


def utf8(text: str) -> str:
    """`text`, for example an argument; raises ValueError for bytes that were not UTF-8."""
    text.encode()
    return text


def load_json(text: bytes | str, where: object):
    """Value of a JSON text; raises Failure naming `where`, also for depths Python cannot parse."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:   # bad UTF-8 and 4,301 digits are ValueErrors
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise Failure(f"{where}: not JSON ({reason})") from None


def write_atomic(path: Path, parts: Iterable[bytes]):
    """Write byte strings to `path`, which appears whole or not at all; raises Failure."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise Failure(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        with suppress(OSError):                 # it is gone if the rename succeeded
            part.unlink()


# ------------------------------------------------------------------------------------------------
# The time before `run`: importing NumPy and PyTorch takes seconds
# ------------------------------------------------------------------------------------------------

def leave(*_):
    """Handle Ctrl-C until `run` does: an exception in a library's import may get lost there."""
    with suppress(OSError):
        os.write(2, f"{Path(sys.argv[0]).stem}: {STOPPED}\n".encode(errors="replace"))
    os._exit(130)


def is_script(path: str | None) -> bool:
    """Whether a process was started by one of the scripts, not, for example, by pytest."""
    here = Path(__file__).resolve().parent
    folders = here, here / "bench", here / "experiments"
    return path is not None and Path(path).resolve().parent in folders


if is_script(getattr(sys.modules["__main__"], "__file__", None)):
    open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:       # else it is ignored
        signal.signal(signal.SIGINT, leave)
