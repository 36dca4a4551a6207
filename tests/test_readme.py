"""The README keeps its promises: each command and snippet is run, each name in it exists."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT, load, scripts

from utils.visualize import draw_digits

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {"T": 10, "BASE_CH": 8, "EPOCHS": 1, "BATCH_SIZE": 50}
MORE = {
    "02": {"CHANNEL_MULT": (1, 2)},
    "03": {"CHANNEL_MULT": (1, 2), "SAMPLE_STEPS": 5},
    "04": {"CHANNEL_MULT": (1, 2), "DDIM_STEPS": 5, "T": 50},
    "05": {"VAE_CH": 4, "VAE_EPOCHS": 1, "DDIM_STEPS": 5, "T": 50},
}


def blocks(language, text=README):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def section(title):
    """The text under a heading, up to the next heading of the same or a higher level."""
    level = re.search(rf"(?m)^(#+) {re.escape(title)}$", README)[1]
    pattern = rf"(?ms)^{level} {re.escape(title)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)"
    return re.search(pattern, README)[1]


def prepare(project, *names):
    project.lay_mnist(*draw_digits(200, seed=1))
    for name in names:
        project.edit(name, **{**SMALL, **MORE.get(name[:2], {})})


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if not line.startswith("#")]


def test_commands_that_install_name_files_that_exist_and_the_rest_is_known():
    """Those that install are run by .ci/run; here what they name is looked at."""
    known = 0
    for command in commands():
        words = [part.split() for part in command.split(" && ")]
        for word in [w for part in words for w in part]:
            if re.search(r"\.(py|txt)$", word) or word == "tests":
                assert (ROOT / word).exists(), command
        first = words[0][0]
        known += first in ("python", "python3", "git", "source")
    assert known == len(commands()) and known > 8
    assert commands()[0].endswith("01_ddpm_toy.py")


def test_every_script_and_program_that_the_readme_starts_runs(project):
    started = [shlex.split(c)[1:] for c in commands() if c.startswith("python ")]
    names = [a[0] for a in started if a[0] in {s.name for s in scripts()}]
    programs = [a[0] for a in started if a[0].startswith("utils/")]
    assert len(programs) == 2
    prepare(project, *names)
    for name in [*names, *programs]:
        done = project.run_here(name)
        assert done.returncode == 0, (name, done.stderr)


def test_the_differences_that_the_readme_shows_can_be_shown():
    shown = [c for c in commands() if c.startswith("git diff")]
    assert len(shown) == 4
    for command in shown:
        done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True)
        assert done.returncode == 1 and len(done.stdout) > 1000  # 1: they differ


def test_code_in_the_ideas_is_that_of_the_scripts():
    found = blocks("python", section("The ideas in short"))
    texts = [script.read_text(encoding="utf-8") for script in scripts()]
    assert len(found) == 7
    for block in found:
        assert any(block in text for text in texts), block


def test_the_snippet_that_samples_without_training_runs(project):
    prepare(project, "02_ddpm.py")
    assert project.run_here("02_ddpm.py").returncode == 0
    before = section("The scripts one by one").split("\n### ")[0]
    (snippet,) = blocks("python", before)
    project.edit("02_ddpm.py", BASE_CH=16)  # the constants at the top do not matter
    (project.folder / "snippet.py").write_text(snippet, encoding="utf-8")
    done = project.run("snippet.py")
    assert done.returncode == 0, done.stderr
    assert len(list(project.folder.glob("digit_*.png"))) == 4


@pytest.mark.parametrize("script", scripts(), ids=lambda p: p.name)
def test_snippets_to_play_with_run(project, script):
    """As a person types them into `python -i`."""
    if script.name.startswith("02"):
        assert not blocks("python", section(script.name))
        return
    found = blocks("python", section(script.name))
    assert found
    prepare(project, script.name)
    typed = found[0] + "print('done', 'all')\n"
    done = project.run("-i", script.name, stdin=typed)
    assert "done all" in done.stdout, done.stderr
    errors = done.stderr.split(">>>", 1)[-1]
    assert "Error" not in errors, errors
    for name in re.findall(r"\"(\w+\.png)\"", found[0]):
        assert (project.folder / name).exists()
    for block in found[1:]:  # in a program of its own
        (project.folder / "snippet.py").write_text(block, encoding="utf-8")
        done = project.run("snippet.py")
        assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    headings = re.findall(r"(?m)^#+ (.+)$", README)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README)
    for link in (a or b for a, b in links):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link
    assert len(links) > 25


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
    for script in scripts():
        for name in re.findall(r"`([\w.]+\.(?:png|gif|pt))`", section(script.name)):
            stem = name.split("001234")[0]
            text = script.read_text(encoding="utf-8")
            text += (ROOT / "utils" / "visualize.py").read_text(encoding="utf-8")
            assert stem in text, f"{script.name} leaves no {name}"


def test_tables_have_the_columns_of_the_benchmark():
    files = ROOT / "tests" / "benchmark.py", ROOT / "tests" / "ladder.py"
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    tables = re.findall(r"(?m)^\| (.+) \|\n\|---", section("How good, how fast"))
    assert len(tables) == 6
    for header in tables:
        for column in header.split(" | "):
            assert f'"{column.strip("| ")}"' in text, column
