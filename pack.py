#!/usr/bin/env python3
"""Pack train_gpt.py into the two lines that are submitted and counted: packed/train_gpt.py.

    python pack.py                  write packed/train_gpt.py; print its sizes and what they leave
    python pack.py --check          fail, naming what differs, unless packed/train_gpt.py is current
    python pack.py --unpack FILE    print the program inside a packed FILE without running it

The packed file is the same program: comments, docstrings and annotations that only document are
gone and local names are short; asserts, parameters, attributes and module names are as written.
Its first line imports, its second unpacks a raw LZMA2 stream written in base85 and runs it as the
module that was started.  The program is entered in `linecache` under the packed file's own name:
tracebacks, `inspect.getsource` and Triton see real lines, numbered as `--unpack` prints them.

The bytes depend on the source text alone, and the program in them runs on Python 3.10 and later.
"""
import argparse
import ast
import base64
import contextlib
import hashlib
import io
import lzma
import os
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

LIMIT_BYTES = 16_000_000   # code and model together, by the challenge's rules
OLDEST = (3, 10)           # Python that the packed file must still run on
BAR_COLUMNS = 50
HERE = Path(__file__).resolve().parent


class PackError(Exception):
    """The input cannot be packed or unpacked; the message says why in one line."""


# ------------------------------------------------------------------------------------------------
# Minify: the same program without what only readers need
# ------------------------------------------------------------------------------------------------

# Literals stay where they are: named once at the top they make the text shorter but the stream
# longer, since LZMA stores a repeat in two or three bytes.  Every switch that may change what a
# program does (dropping asserts, renaming what other files can see) is off.
SWITCHES = dict(
    remove_literal_statements=True,
    remove_annotations=False,          # `Bare` has done it, with exceptions the library lacks
    hoist_literals=False,
    rename_locals=False,               # `shorten_locals` does it
    rename_globals=False,
    convert_posargs_to_args=False,
    remove_builtin_exception_brackets=False,
    preserve_shebang=False,
    remove_asserts=False,
    remove_debug=False,
)


class Bare(ast.NodeTransformer):
    """Drop annotations that only document: all but class fields' and Triton's `constexpr`."""

    def __init__(self):
        """Start at module level."""
        self.in_class = False

    def visit_within(self, node, in_class):
        """Transform what `node` holds, knowing whether its statements are a class body."""
        outside, self.in_class = self.in_class, in_class
        self.generic_visit(node)
        self.in_class = outside
        return node

    def visit_ClassDef(self, node):
        """Keep the fields' annotations: `dataclass` reads them."""
        return self.visit_within(node, in_class=True)

    def visit_FunctionDef(self, node):
        """Drop the annotation of the result."""
        node.returns = None
        return self.visit_within(node, in_class=False)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node):
        """Drop a parameter's annotation."""
        if not is_constexpr(node.annotation):
            node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        """Turn `x: int = 1` into `x = 1` and `x: int`, which makes x a local, into `x: 0`."""
        if self.in_class or is_constexpr(node.annotation):
            return node
        if node.value is None:
            node.annotation = ast.Constant(0)
            return node
        return ast.Assign([node.target], node.value)


def is_constexpr(annotation: "ast.expr | None") -> bool:
    """Tell whether an annotation is Triton's `constexpr`, which decides how a kernel compiles."""
    return annotation is not None and "constexpr" in ast.unparse(annotation)


def parse(source: str, what: str) -> ast.Module:
    """Parse `source`; raises PackError where the oldest supported Python could not."""
    try:
        tree = ast.parse(source, feature_version=OLDEST)
    except (SyntaxError, ValueError) as error:
        raise PackError(f"{what} is no Python {OLDEST[0]}.{OLDEST[1]} program: {error}") from None
    if line := line_of_new_fstring(source):
        raise PackError(f"{what}, line {line}: f-string needs Python 3.12 (PEP 701); "
                        "use other quotes or a variable")
    return tree


def line_of_new_fstring(source: str) -> int:
    """Return the first line with an f-string that only Python 3.12 and later read, 0 if none.

    Before 3.12 an f-string ended at the first quote like the one that opened it, and its
    expressions held no backslash and no comment.  Older tokenizers need no look: they refuse it.
    """
    if sys.version_info < (3, 12):
        return 0
    opened = []                                       # quotes of the f-strings around this token
    for part in tokenize.generate_tokens(io.StringIO(source).readline):
        if part.type == tokenize.FSTRING_END:
            opened.pop()
            continue
        outer = opened[:-1] if part.type == tokenize.FSTRING_MIDDLE else opened
        if outer and (part.type == tokenize.COMMENT or ends_early(part.string, outer)):
            return part.start[0]
        if part.type == tokenize.FSTRING_START:
            opened.append(part.string.lstrip("rRfF"))
    return 0


def ends_early(text: str, quotes: "list[str]") -> bool:
    """Tell whether `text`, inside f-strings opened by `quotes`, stops a Python before 3.12."""
    one_line = any(len(quote) == 1 for quote in quotes)
    return "\\" in text or one_line and "\n" in text or any(quote in text for quote in quotes)


@contextlib.contextmanager
def old_fstrings() -> Iterator[None]:
    """Make python-minifier quote f-strings as 3.10 reads them, not as the running Python does."""
    from python_minifier.f_string import OuterFString
    start = OuterFString.__init__
    OuterFString.__init__ = lambda self, node, pep701=False: start(self, node, pep701=False)
    try:
        yield
    finally:
        OuterFString.__init__ = start


def minify_source(source: str) -> str:
    """Return a shorter text of the same program; raises PackError for what is no program."""
    try:
        import python_minifier
    except ImportError:
        raise PackError("needs python-minifier: pip install -r requirements.txt") from None
    bare = ast.fix_missing_locations(Bare().visit(parse(source, "the source")))
    try:
        with old_fstrings():
            text = shorten_locals(python_minifier.minify(bare, **SWITCHES))
    except (ValueError, RuntimeError) as error:
        raise PackError(f"python-minifier gave up: {error}") from None
    parse(text, "the minified source")
    if len(text.splitlines()) != text.count("\n") + 1:
        raise PackError("a string holds \\x1c-\\x1e, \\x85, \\u2028 or \\u2029, which would break "
                        "line numbers; write it as chr(...)")
    return text


def shorten_locals(text: str) -> str:
    """Give locals short names, but leave parameters alone that a caller may pass by keyword.

    The library's own switch gives a long parameter an alias (`A=arg`, first in the function).
    That costs bytes, keeps tensors alive that the function lets go of by rebinding the name, and
    makes a tensor of a Triton `constexpr`.  Its analysis of scopes is used all the same.
    """
    from python_minifier import unparse
    from python_minifier.ast_annotation import add_parent
    from python_minifier.rename import (add_namespace, allow_rename_globals, allow_rename_locals,
                                        bind_names, rename, resolve_names)
    from python_minifier.rename.renamer import all_bindings
    module = ast.parse(text)
    for analyse in (add_parent, add_namespace, bind_names, resolve_names):
        analyse(module)
    if module.tainted:                       # exec, locals() and the like see names: none changes
        return text
    for _, binding in all_bindings(module):
        if any(is_keyword(node) for node in binding.references):
            binding.disallow_rename()
    allow_rename_locals(module, True, module.preserved)
    allow_rename_globals(module, False)
    rename(module, prefix_globals=True, preserved_globals=module.preserved)
    return unparse(module)


def is_keyword(node: ast.AST) -> bool:
    """Tell whether `node` is a parameter that callers may name: not self, *args or **kwargs."""
    from python_minifier.rename import util
    return isinstance(node, ast.arg) and not util.arg_rename_in_place(node)


# ------------------------------------------------------------------------------------------------
# Pack: compress, and frame the stream with the two lines that run it
# ------------------------------------------------------------------------------------------------

# 3 is lzma.FORMAT_RAW and 33 lzma.FILTER_LZMA2; the stream itself carries lc, lp and pb.  Up to
# Python 3.12 the interpreter's own printer of tracebacks reads files, never linecache: hence the
# hook.  Two blank lines come first in the program, since a traceback begins with the frame of
# line 2 of this file and would print whatever line 2 of the program is beside it.
LINE_1 = "import base64,linecache,lzma,sys,traceback\n"
LINE_2 = ("s=lzma.decompress(base64.b85decode('", "'),3,None,[{'id':33}]).decode();"
          "linecache.cache[__file__]=len(s),None,s.splitlines(1),__file__;"
          "sys.excepthook=traceback.print_exception;exec(compile(s,__file__,'exec'))\n")
BLANK = "\n\n"


def lzma2(data: bytes, **settings: int) -> bytes:
    """Compress `data` to a raw LZMA2 stream for a decoder with the default 8 MiB dictionary."""
    window = min(max(len(data), 1 << 12), 1 << 23)
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    return lzma.compress(data, lzma.FORMAT_RAW, filters=[{**options, **settings}])


def compress(data: bytes) -> bytes:
    """Return the shortest stream over a fixed list of settings, the first of equals.

    What to model (lc, lp, pb) is settled before how to search (match finder, nice length): the
    two hardly meet, and all pairs would take twenty times as long for at most a byte or two.
    """
    models = [dict(lc=lc, lp=lp, pb=pb) for lc in range(5) for lp in range(5 - lc) for pb in (0, 1)]
    model = min(models, key=lambda m: len(lzma2(data, **m, nice_len=273)))
    finders = (lzma.MF_BT2, lzma.MF_BT3, lzma.MF_BT4)
    lengths = (12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 273)
    searches = [dict(mf=mf, nice_len=length) for mf in finders for length in lengths]
    return min((lzma2(data, **model, **search) for search in searches), key=len)


def frame(program: str) -> bytes:
    """Return the packed file that runs `program`."""
    stream = compress((BLANK + program).encode())
    return (LINE_1 + base64.b85encode(stream).decode().join(LINE_2)).encode()


def pack_source(source: str) -> bytes:
    """Return the packed file for a source text, always the same; raises PackError."""
    program = minify_source(source)
    if is_packed(source.encode()):
        raise PackError("the source is packed already")
    return frame(program)


# ------------------------------------------------------------------------------------------------
# Unpack and check: packed files are read as data, never run
# ------------------------------------------------------------------------------------------------

def payload(packed: bytes) -> bytes:
    """Return the compressed stream in a packed file: its longest literal, out of base85."""
    try:
        constants = [n.value for n in ast.walk(ast.parse(packed)) if isinstance(n, ast.Constant)]
        texts = [value for value in constants if isinstance(value, (str, bytes))]
        return base64.b85decode(max(texts, key=len, default=""))
    except (SyntaxError, ValueError) as error:
        raise PackError(f"holds no base85 text: {error}") from None


def decompress(stream: bytes) -> bytes:
    """Decompress raw LZMA2, or .xz as in some public entries; raises PackError for part of it."""
    raw = dict(format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    for options in (raw, dict(format=lzma.FORMAT_XZ)):
        decoder = lzma.LZMADecompressor(**options)
        with contextlib.suppress(lzma.LZMAError):
            data = decoder.decompress(stream)
            if decoder.eof and not decoder.unused_data:
                return data
    raise PackError("holds no whole LZMA stream")


def unpack_source(packed: bytes) -> str:
    """Return the program inside a packed file, ours or a public entry's; raises PackError."""
    try:
        return decompress(payload(packed)).decode()
    except UnicodeDecodeError as error:
        raise PackError(f"holds no text: {error}") from None


def is_packed(data: bytes) -> bool:
    """Tell whether a file wraps a program in a compressed literal."""
    try:
        return bool(unpack_source(data))
    except PackError:
        return data.startswith(LINE_1.encode())


def first_change(old: ast.Module, new: ast.Module) -> str:
    """Name the first statement in which two programs differ; empty if they are equal."""
    for before, after in zip(old.body, new.body):
        if ast.dump(before) != ast.dump(after):
            return f"`{getattr(after, 'name', None) or ast.unparse(after).splitlines()[0]}` differs"
    return "" if len(old.body) == len(new.body) else "it ends elsewhere"


def check(source: str, packed: bytes) -> str:
    """Return what is wrong with `packed` as the packed form of `source`, empty if nothing is."""
    program = minify_source(source)
    try:
        inside = parse(unpack_source(packed), "the program inside")
    except PackError as error:
        return f"is damaged: {error}"
    if change := first_change(inside, ast.parse(program)):
        return f"is stale: {change}; run pack.py"
    fresh = frame(program)
    same = len(os.path.commonprefix([packed, fresh]))
    if packed == fresh:
        return ""
    return f"holds the right program in other bytes, the first at offset {same}; run pack.py"


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def read(path: Path) -> bytes:
    """Return a file's bytes; raises PackError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackError(f"{path}: {error.strerror}") from None


def read_source(path: Path) -> str:
    """Return a source file's text, refusing a packed file; raises PackError."""
    data = read(path)
    if is_packed(data):
        raise PackError(f"{path} is packed already; --source must be the readable program")
    try:
        return io.TextIOWrapper(io.BytesIO(data), "utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is no UTF-8 text: {error}") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before."""
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(data)
        os.replace(half, path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise PackError(f"cannot write {path}: {error.strerror}") from None


def bar(part: float, mark: str = "#") -> str:
    """Draw a share of 0 to 1 as text."""
    return mark * round(BAR_COLUMNS * min(max(part, 0), 1))


def size_lines(source: str, packed: bytes) -> "Iterator[str]":
    """Yield a line and a bar for each step from source to packed file."""
    whole = len(source.encode())
    steps = dict(source=whole, minified=len(unpack_source(packed).encode()),
                 compressed=len(payload(packed)), packed=len(packed))
    for name, size in steps.items():
        yield f"{name:<10} {size:>10,} bytes  {bar(size / whole)}"
    yield f"{'sha256':<10} {hashlib.sha256(packed).hexdigest()}"


def newest_artifact(folder: Path) -> "Path | None":
    """Return the last written runs/*/model.golf under `folder`, if there is any."""
    found = [(path.stat().st_mtime_ns, path) for path in folder.glob("runs/*/model.golf")]
    return max(found)[1] if found else None


def budget_lines(code_bytes: int, model: "Path | None", folder: Path) -> "Iterator[str]":
    """Yield how code and model fill the limit, and the same as a bar."""
    model_bytes = model.stat().st_size if model else 0
    name = model.relative_to(folder) if model else "model (no runs/*/model.golf yet)"
    left = LIMIT_BYTES - code_bytes - model_bytes
    rest = f"{left:,} left" if left >= 0 else f"OVER BY {-left:,}"
    yield f"{LIMIT_BYTES:,} bytes: {code_bytes:,} code + {model_bytes:,} {name}, {rest}"
    used = bar(1 - left / LIMIT_BYTES)
    yield f"[{used:.<{BAR_COLUMNS}}]"


def report(source: str, packed: bytes, folder: Path) -> None:
    """Print sizes, hash and what is left beside the newest artifact under `folder`."""
    for line in size_lines(source, packed):
        print(line)
    for line in budget_lines(len(packed), newest_artifact(folder), folder):
        print(line)


def run_unpack(path: Path) -> int:
    """Print the program inside a packed file."""
    try:
        text = unpack_source(read(path))
    except PackError as error:
        raise PackError(f"{path} {error}" if path.exists() else str(error)) from None
    sys.stdout.buffer.write(text.encode() + b"\n" * (not text.endswith("\n")))
    return 0


def run_check(source_path: Path, out: Path) -> int:
    """Say whether the packed file is what the source packs to; 0 if it is, else 1."""
    source = read_source(source_path)
    if not out.exists():
        print(f"{out} is missing; run pack.py", file=sys.stderr)
        return 1
    packed = read(out)
    if fault := check(source, packed):
        print(f"{out} {fault}", file=sys.stderr)
        return 1
    print(f"{out} is current: {source_path} packs to these bytes")
    report(source, packed, source_path.parent)
    return 0


def run_pack(source_path: Path, out: Path) -> int:
    """Write the packed file and print its sizes."""
    if source_path.resolve() == out.resolve():
        raise PackError(f"--out {out} would overwrite the source")
    source = read_source(source_path)
    packed = pack_source(source)
    write_whole(out, packed)
    print(f"{source_path} -> {out}")
    report(source, packed, source_path.parent)
    return 0


def arguments(argv: "list[str] | None") -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="pack.py", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if the packed file is stale")
    action.add_argument("--unpack", metavar="FILE", type=Path, help="print the program inside FILE")
    beside = Path(os.path.relpath(HERE / "train_gpt.py"))
    parser.add_argument("--source", type=Path, default=beside, help="readable program to pack")
    parser.add_argument("--out", type=Path, help="packed file (packed/ beside the source)")
    return parser.parse_args(argv)


def main(argv: "list[str] | None" = None) -> int:
    """Do what the command line asks; 0 done, 1 stale or nobody reads on, 2 bad input."""
    args = arguments(argv)
    out = args.out or args.source.parent / "packed" / args.source.name
    try:
        code = run_unpack(args.unpack) if args.unpack else (
            run_check(args.source, out) if args.check else run_pack(args.source, out))
        sys.stdout.flush()
        return code
    except PackError as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                                 # the reader, say `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
