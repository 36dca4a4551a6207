"""What holds for every file of the project."""

import ast
import re

import pytest
from conftest import ROOT, scripts

SECTIONS = "Settings", "Data", "Noise", "U-Net", "Loss and sampler", "Training", "Figures", "Run"


def definitions(path):
    """Top-level functions and classes of a file with their exact text, decorators included."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield node.name, "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def different_twins(files):
    """Names that stand in two of the files with different text."""
    seen, different = {}, []
    for path in files:
        for name, text in definitions(path):
            other, other_text = seen.setdefault(name, (path.name, text))
            if text != other_text:
                different.append(f"{name} in {other} and {path.name}")
    return different


def test_same_name_same_bytes():
    assert different_twins(scripts()) == []


def test_the_check_above_notices_one_changed_comment(tmp_path):
    text = "def f():\n    # {}\n    return 1\n"
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    files[0].write_text(text.format("one"))
    files[1].write_text(text.format("one"))
    assert different_twins(files) == []
    files[1].write_text(text.format("two"))
    assert different_twins(files) == ["f in a.py and b.py"]


@pytest.mark.parametrize("path", [*scripts(), *ROOT.glob("utils/*.py")], ids=lambda p: p.name)
def test_imports_stay_inside_the_promise(path):
    """The five packages, the standard library and utils; utils itself imports no script."""
    allowed = {"torch", "torchvision", "matplotlib", "numpy", "tqdm", "utils", "PIL"}
    allowed |= set(__import__("sys").stdlib_module_names)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", scripts(), ids=lambda p: p.name)
def test_layout_of_a_script(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    number, sections = path.name[:2], list(SECTIONS)
    if number == "01":
        sections.remove("Figures")
    if number == "05":
        sections.insert(4, "VAE")
    headings = re.findall(r"(?m)^# %% (\d+)\. (.+)$", text)
    assert [int(n) for n, _ in headings] == list(range(1, len(sections) + 1))
    for (_, title), section in zip(headings, sections):
        assert re.match(rf"{section}\b", title), f"{title} should be {section}"
    assert max(len(line) for line in text.splitlines()) <= 100
    assert 20 <= len(ast.get_docstring(tree).splitlines()) <= 45
    last = tree.body[-1]
    assert isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)
    assert last.end_lineno - last.lineno <= (60 if number in ("04", "05") else 45)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            assert node.end_lineno - node.lineno < 45, f"{node.name} is too long"


def test_top_level_holds_nothing_else():
    wanted = {"utils", "tests", "requirements.txt", "README.md", *(s.name for s in scripts())}
    made_at_run_time = {"data", "outputs"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__pycache__"))}
    assert found - made_at_run_time == wanted


def test_pictures_of_the_readme_exist_and_are_small():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", readme)
    for link in (a or b for a, b in links):
        assert (ROOT / link).exists(), f"the README points to {link}"
    pictures = list((ROOT / ".github" / "images").glob("*"))
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 300_000, f"{picture.name} is too large"
        assert picture.name in readme, f"{picture.name} is not used"


def test_torch_load_never_runs_foreign_code():
    for path in [*scripts(), *ROOT.glob("utils/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno}"


def test_ci_runs_the_test_command_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep --max-count=1 'pytest' README.md" in ci
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if "pytest" in line]
    assert commands and commands[0].startswith("python3 -m venv .venv && ")
