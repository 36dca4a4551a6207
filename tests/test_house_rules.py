"""What holds for every file of the project."""

import ast
import re

import pytest
from conftest import ROOT, scripts

SECTIONS = "Settings", "Data", "Noise", "U-Net", "Loss and sampler", "Training", "Figures", "Run"


def definitions(path):
    """Yield the nodes of top-level functions, classes and tables: what section 1 sets is none."""
    text = path.read_text(encoding="utf-8")
    head = text.split("# %% 2. ")[0].count("\n")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign) and node.lineno > head:  # no `+=`: that extends a table
            for target in node.targets:
                yield ast.unparse(target), node


def different_twins(files):
    """Names that stand in two of the files with different text, including comments."""
    seen, different = {}, []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        for name, node in definitions(path):
            first = min([node, *getattr(node, "decorator_list", [])], key=lambda n: n.lineno)
            text = lines[first.lineno - 1 : node.end_lineno]
            other, other_text = seen.setdefault(name, (path.name, text))
            if text != other_text:
                different.append(f"{name} in {other} and {path.name}")
    return different


def test_same_name_same_bytes():
    assert different_twins(scripts()) == []


@pytest.mark.parametrize("text", ["def A():\n  # {}\n  pass", "@{}\nclass A:\n  b = 1", "A = {}"])
def test_the_check_above_notices_one_changed_word(tmp_path, text):
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    files[0].write_text(f"A = 1\n# %% 2. Data\n{text.format('one')}\nA += 1\n")
    for word, expected in ("one", []), ("two", ["A in a.py and b.py"]):
        files[1].write_text(f"A = 2\n# %% 2. Data\n{text.format(word)}\nA += 2\n")
        assert different_twins(files) == expected


@pytest.mark.parametrize("path", scripts()[2:], ids=lambda p: p.name)
def test_shared_definitions_stand_in_the_order_of_02(path):
    names, others = ([name for name, _ in definitions(p)] for p in (scripts()[1], path))
    shared = [name for name in names if name in others]
    assert len(shared) > 20 and shared == [name for name in others if name in names]


@pytest.mark.parametrize("path", scripts(), ids=lambda p: p.name)
def test_classes_and_tables_stand_above_their_first_use(path):
    """Functions may call one another in any order; whoever reads on must know what a name is."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    used = [(node.id, node.lineno) for node in nodes if isinstance(node, ast.Name)]
    for name, node in definitions(path):
        if not isinstance(node, ast.FunctionDef):
            assert all(n != name or line >= node.lineno for n, line in used), name


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
    assert last.end_lineno - last.lineno <= {"04": 60, "05": 65}.get(number, 45)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            longest = 75 if node.name == "train" else 45
            assert node.end_lineno - node.lineno < longest, f"{node.name} is too long"


def test_top_level_holds_nothing_else():
    wanted = {"utils", "tests", "requirements.txt", "README.md", *(s.name for s in scripts())}
    made_at_run_time = {"data", "outputs"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__pycache__"))}
    assert found - made_at_run_time == wanted


def test_pictures_are_small_and_used():
    files = (ROOT / name for name in ("README.md", "tests/README.md", ".github/exercises.md"))
    readme = "".join(file.read_text(encoding="utf-8") for file in files)
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
