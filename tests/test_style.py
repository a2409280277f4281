"""The house style, measured: sizes of functions, prose, names that nobody reads, README commands."""
import ast
import re
import statistics
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))
COMPOUND = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)

SECTION_TESTS = {
    "Configuration": "test_config", "Ranks and logging": "test_data", "Tokens": "test_data",
    "Batches": "test_data", "Model": "test_model", "Kernels": "test_kernels",
    "Optimizer": "test_optim",
    "Quantization": "test_quantize", "Artifact": "test_artifact", "Evaluation": "test_eval",
    "Test-time training": "test_ttt", "Training": "test_train", "Main": "test_train"}


def functions(tree):
    """Every function of a module, layout removed, as (name, code lines, parameters)."""
    flat = ast.parse(ast.unparse(tree))
    for node in ast.walk(flat):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= doc.end_lineno - doc.lineno + 1 if doc else 0
            # A kernel sees nothing but its arguments; no other function may have as many.
            kernel = "jit" in map(ast.unparse, node.decorator_list)
            count = len(node.args.args) + len(node.args.kwonlyargs)
            yield node.name, lines, 0 if kernel else count


def depth(node, above=0):
    """Deepest chain of compound statements below `node`."""
    below = (depth(c, above + isinstance(c, COMPOUND)) for c in ast.iter_child_nodes(node))
    return max(below, default=above)


def prose_share(path):
    """Part of the lines of a file that hold a comment or belong to a docstring."""
    text = path.read_text(encoding="utf-8")
    lines = set()
    with path.open("rb") as f:
        lines |= {t.start[0] for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines |= set(range(node.lineno, node.end_lineno + 1))
    return len(lines) / len(text.splitlines())


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_are_short_and_shallow(name):
    """Functions: median at most 9 code lines, p90 30, longest 60, 6 parameters; nesting 5."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    found = list(functions(tree))
    sizes = sorted(lines for _, lines, _ in found)
    assert statistics.median(sizes) <= 9
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 30
    assert sizes[-1] <= 60
    assert max(args for _, _, args in found) <= 6
    assert depth(ast.parse(ast.unparse(tree))) <= 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_everything_is_documented(name):
    """Every module, class and function has a docstring; no line is wider than 100 columns."""
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bare = [n for n in ast.walk(tree) if isinstance(n, kinds) and not ast.get_docstring(n)]
    assert not bare, [getattr(n, "name", name) for n in bare]
    assert max(map(len, text.splitlines())) <= 100


def test_sections_and_their_tests():
    """train_gpt.py has its banners in the order of its header, each with a test file."""
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    banners = re.findall(r"^# -{90,}\n# ([\w -]+): .*\n# -{90,}$", text, re.M)
    assert banners == list(SECTION_TESTS)
    header = text.split('"""')[1]
    listed = re.search(r"Sections: (.*), in the order", header, re.S).group(1)
    assert re.split(r",\s+", listed) == banners
    for name in set(SECTION_TESTS.values()):
        assert (ROOT / "tests" / f"{name}.py").is_file()


def test_train_gpt_is_a_quarter_prose():
    """train_gpt.py explains itself: at least a fifth of its lines are comments or docstrings."""
    assert prose_share(ROOT / "train_gpt.py") >= 0.20


def test_readme_names_what_exists():
    """Every script and folder of the repository is in the README, and every named one exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in SCRIPTS:
        assert name in readme, name
    for name in re.findall(r"python (\w+\.py)", readme):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(tests/\w+\.py)`", readme):
        assert (ROOT / name).is_file(), name


def test_every_requirement_is_pinned_and_explained():
    """requirements.txt holds exact versions, and the README says what each is for."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for line in filter(lambda text: text and not text.startswith("#"), lines):
        name, version = line.split("==")
        assert re.fullmatch(r"[\d.]+", version), line
        assert f"`{name}`" in readme, name


def test_nothing_names_this_machine():
    """No script contains an absolute path of a user's machine or a mark of unfinished work."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "README.md"]:
        if path.name != Path(__file__).name:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(work|home|root|Users)/\w", text), path.name
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path.name
