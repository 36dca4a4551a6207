"""Files that are no checkpoints, in the place of one: a clear line, and nothing is touched.

Of 02 see test_02_as_a_user.py.
"""

import torch
from conftest import scripts

from utils.visualize import draw_digits

SMALL = {"T": 5, "BASE_CH": 8, "CHANNEL_MULT": (1, 2), "EPOCHS": 1, "BATCH_SIZE": 20}
MORE = {"04": {"DDIM_STEPS": 5}, "05": {"DDIM_STEPS": 5, "VAE_CH": 4, "VAE_EPOCHS": 1}}


class Malicious:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


def test_every_script_refuses_files_that_are_no_checkpoints_of_its_own(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    project.lay_mnist(*draw_digits(65, seed=1))
    files = {}
    for path in scripts()[1:]:
        project.edit(path.name, **{**SMALL, **MORE.get(path.name[:2], {})})
        done = project.run_here(path.name)
        assert done.returncode == 0, done.stderr
        folder = project.folder / "outputs" / path.stem
        files |= {(path.name, file.name): file for file in sorted(folder.glob("*.pt"))}
    assert len(files) == 5  # of 02, 03, 04; of 05 two
    torch.save({"settings": Malicious()}, "malicious.pt")
    malicious = (project.folder / "malicious.pt").read_bytes()
    good = {key: file.read_bytes() for key, file in files.items()}
    for (script, name), file in files.items():
        other = "03_conditional_ddpm.py" if script != "03_conditional_ddpm.py" else "02_ddpm.py"
        bad = {
            "malicious": malicious,
            "half": good[script, name][: len(good[script, name]) // 2],
            "another script's": good[other, "checkpoint.pt"],
            "another stage's": good["05_latent_diffusion.py", "checkpoint.pt"],
        }
        for kind, contents in bad.items():
            if contents == good[script, name]:
                continue
            file.write_bytes(contents)
            before = {p: p.read_bytes() for p in file.parent.iterdir()}
            done = project.run_here(script)
            message = done.stderr.strip().splitlines()[-1]
            assert done.returncode == 1, (script, kind)
            assert str(file) in message and "To start anew" in message, (script, kind, message)
            assert "Traceback" not in done.stderr
            after = {p: p.read_bytes() for p in file.parent.iterdir()}
            if name == "vae.pt" or not script.startswith("05"):
                assert after == before, (script, kind)
            assert after[file] == contents
        file.write_bytes(good[script, name])
        assert project.run_here(script).returncode == 0, "with its own it goes on"
    assert not (project.folder / "executed").exists()
