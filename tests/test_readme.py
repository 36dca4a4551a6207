"""The README keeps its promises: each command and snippet is run, each name in it exists."""

import code
import functools
import re
import shlex
import shutil
import subprocess
import sys

import conftest
import numpy as np
import pytest
from conftest import ROOT, scripts
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
load = functools.cache(conftest.load)


def blocks(language, text=README):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def section(title):
    """The text under a heading, up to the next heading of the same or a higher level."""
    level = re.search(rf"(?m)^(#+) {re.escape(title)}$", README)[1]
    pattern = rf"(?ms)^{level} {re.escape(title)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)"
    return re.search(pattern, README)[1]


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if not line.startswith("#")]


def test_commands_name_files_that_exist_and_are_known():
    """Those that install are run by .ci/run, the scripts and programs below."""
    for command in commands():
        words = command.split()
        assert words[0] in ("python", "python3", "git", "source")
        for word in words:
            if re.search(r"\.(py|txt)$", word) or word == "tests":
                assert (ROOT / word).exists(), command
    assert commands()[0].endswith("01_ddpm_toy.py") and len(commands()) > 5


def test_programs_that_the_readme_starts_run(project, monkeypatch, real_figures):
    """They find `utils` by themselves, and leave pictures."""
    programs = sorted({*re.findall(r"`python (utils/\w+\.py)`", README)})
    assert len(programs) == 2
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in (str(ROOT), "")])
    for name in [name for name in sys.modules if re.match(r"utils\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    for name in programs:
        done = project.run_here(name)
        assert done.returncode == 0, (name, done.stderr)
        for saved in re.findall(r"(?m)^Saved (.*)$", done.stdout):
            with Image.open(saved) as picture:
                assert picture.width > (200 if saved.endswith(".gif") else 600)
                assert np.asarray(picture.convert("L")).std() > 5
    pictures = sorted(path.name for path in project.folder.glob("outputs/*/*"))
    names = "forward_process.png reverse_process.gif reverse_process.png why_slerp.png"
    assert pictures == names.split()


def test_the_differences_that_the_readme_shows_can_be_shown():
    shown = [c for c in commands() if c.startswith("git diff")]
    assert len(shown) == 3
    for command in shown:
        done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True)
        assert done.returncode == 1 and len(done.stdout) > 1000  # 1: they differ


def excerpts_and_snippets(text):
    """Python code of the scripts, which is indented, and code to try out."""
    found = blocks("python", text)
    return [b for b in found if b.startswith(" ")], [b for b in found if not b.startswith(" ")]


def test_code_that_it_shows_is_that_of_the_scripts():
    found, _ = excerpts_and_snippets(README)
    texts = [script.read_text(encoding="utf-8") for script in scripts()]
    assert len(found) == 5
    for block in found:
        assert any(block in text for text in texts), block


@pytest.mark.parametrize("script", scripts(), ids=lambda p: p.name)
def test_snippets_run(project, monkeypatch, capsys, script):
    """As a person types it into `python -i` after the run."""
    project.prepare(script.name, T=50)
    path = project.folder / script.name
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?m)^def (save_\w*figures)\(", text):  # they are tested elsewhere
        text = text.replace("\nif __name__", f"\n{name} = lambda *_: None\nif __name__")
    path.write_text(text, encoding="utf-8")
    done = project.run_here(script.name)
    assert done.returncode == 0, done.stderr
    _, found = excerpts_and_snippets(section(script.name))
    assert len(found) == (not script.name.startswith("02"))
    if found:
        console = code.InteractiveConsole(project.names)
        with conftest.inside(project.folder):
            for line in found[0].splitlines():
                console.push(line)
            assert not console.push("pass"), "nothing is left open"
        assert "Error" not in capsys.readouterr().err
    for name in re.findall(r"\"(\w+)\.png\"", "".join(found)):
        assert list(project.folder.glob(f"{name}.png"))


def test_a_7_without_training(project, monkeypatch):
    """The first snippet, as a program in a fresh copy of the repository."""
    (snippet,) = blocks("python", section("Run it"))
    (project.folder / "snippet.py").write_text(snippet, encoding="utf-8")
    shutil.copytree(ROOT / "tests" / "weights", project.folder / "tests" / "weights")
    monkeypatch.syspath_prepend(project.folder)
    monkeypatch.delitem(sys.modules, "03_conditional_ddpm", raising=False)
    done = project.run_here("snippet.py")
    assert done.returncode == 0 and "Training" not in done.stderr, done.stderr
    assert (project.folder / "sevens.png").exists()


@pytest.mark.parametrize("name", ["README.md", "tests/README.md", ".github/exercises.md"])
def test_links_lead_somewhere(name):
    def anchors(file):
        headings = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8"))
        return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}

    file = ROOT / name
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", file.read_text(encoding="utf-8"))
    for link in (a or b for a, b in links):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    assert len(links) > (25 if name == "README.md" else 2)


def test_constants_named_exist():
    for line in section("Change something").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([A-Z_]{1,20})`", cells[0])
        if not line.startswith("|") or not names:
            continue
        numbers = {"all": "12345", "02 to 05": "2345", "04, 05": "45"}.get(cells[1], cells[1][-1])
        for number in numbers:
            module = load(next(s.name for s in scripts() if s.name.startswith(f"0{number}")))
            for name in names:
                assert hasattr(module, name), f"{module.__name__} has no {name}"
    everywhere = set(re.findall(r"`([A-Z][A-Z_]+)`", README))
    known = {name for script in scripts() for name in dir(load(script.name))}
    known |= {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "USE_LIBUV", "CERTIFICATE_VERIFY_FAILED"}
    assert everywhere <= known, everywhere - known


def test_files_named_are_those_that_the_scripts_leave():
    visualize = (ROOT / "utils" / "visualize.py").read_text(encoding="utf-8")
    for script in scripts():
        text = script.read_text(encoding="utf-8") + visualize
        for name in re.findall(r"`([\w.]+\.(?:png|gif|pt))`", section(script.name)):
            assert name.split("001234")[0] in text, f"{script.name} leaves no {name}"


def test_tables_have_the_columns_of_the_benchmark():
    files = ROOT / "tests" / "benchmark.py", ROOT / "tests" / "ladder.py"
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    tables = re.findall(
        r"(?m)^\| (.+) \|\n\|---", MEASUREMENTS.split("**Which version")[1].split("## On a GPU")[0]
    )
    assert len(tables) > 6
    for header in tables:
        if header.startswith(("t ", "channels", "training images", "change ")):
            continue  # by hand, as the text says
        for column in header.split(" | "):
            assert f'"{column.strip("| ")}"' in text, column
