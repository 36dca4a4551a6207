"""05_latent_diffusion.py as a person meets it; what it shares with 02 is tested there."""

import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from utils.visualize import draw_digits

SCRIPT = "05_latent_diffusion.py"
FILES = [
    "autoencoder.png",
    "checkpoint.pt",
    "cost.png",
    "denoising.gif",
    "denoising.png",
    "interpolation.png",
    "latent_scale.png",
    "latents.png",
    "loss.png",
    "samples.png",
    "vae.pt",
]
SMALL = {
    "T": 20,
    "DDIM_STEPS": 5,
    "BASE_CH": 8,
    "VAE_CH": 4,
    "VAE_EPOCHS": 2,
    "EPOCHS": 2,
    "BATCH_SIZE": 50,
    "PREVIEW_EVERY": 1,
}
OTHERS = ["checkpoint.pt", "vae.pt"]


def prepare(project, count=200, **constants):
    if not (project.folder / "data").exists():
        project.lay_mnist(*draw_digits(count, seed=1))
    project.edit(SCRIPT, **{**SMALL, **constants})


def folder_of(project):
    return project.folder / "outputs" / "05_latent_diffusion"


def test_from_start_to_pictures_and_again(project):
    prepare(project)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert project.outputs(SCRIPT) == sorted([*FILES, "samples_epoch_001.png"])
    project.check_pictures(SCRIPT, others=OTHERS)
    assert "Stage 1 of 2" in done.stdout and "Stage 2 of 2" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.rstrip().endswith(" x")]
    assert len(table) == 4 and " ".join(table[0].split()) == "values per image 784 256 3.1 x"
    before = {name: (folder_of(project) / name).read_bytes() for name in FILES}
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "Epoch" not in again.stderr
    for name in FILES:
        if name != "cost.png":  # but the times, all is repeated
            assert (folder_of(project) / name).read_bytes() == before[name], name
    # Other settings of stage 2 leave stage 1 alone, and are refused for its own checkpoint.
    project.edit(SCRIPT, BASE_CH=16)
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1 and "BASE_CH was 8 and now is 16" in refused.stderr
    assert "checkpoint.pt" in refused.stderr.splitlines()[-1]
    project.edit(SCRIPT, BASE_CH=8, KL_WEIGHT=0.5)
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1 and "KL_WEIGHT was" in refused.stderr
    assert "vae.pt" in refused.stderr.splitlines()[-1]
    project.edit(SCRIPT, KL_WEIGHT=0.002, VAE_EPOCHS=3)
    assert "VAE_EPOCHS was 2 and now is 3" in project.run_here(SCRIPT).stderr
    # A stage 2 does not go on with the latents of another VAE.
    project.edit(SCRIPT, VAE_EPOCHS=2)
    state = torch.load(folder_of(project) / "vae.pt", weights_only=True)
    state["averaged"]["encoder.conv_out.weight"] *= 1.001
    torch.save(state, folder_of(project) / "vae.pt")
    refused = project.run_here(SCRIPT)
    assert refused.returncode == 1 and "VAE was" in refused.stderr


def finished_weights(project):
    return [torch.load(folder_of(project) / name, weights_only=True)["averaged"] for name in OTHERS]


@pytest.mark.parametrize("stage", [1, 2])
def test_stopped_in_either_stage_it_goes_on_there(project, stage):
    prepare(project, VAE_EPOCHS=3, EPOCHS=3)
    assert project.run_here(SCRIPT).returncode == 0
    wanted = finished_weights(project)
    for name in OTHERS:
        (folder_of(project) / name).unlink()
    # As if Ctrl-C had come after step 5 of 12 of this stage.
    path = project.folder / SCRIPT
    text = path.read_text(encoding="utf-8")
    limit = {1: '"VAE_CH" in self.settings and "T" not in', 2: '"T" in'}[stage]
    old = "        self.step += 1\n"
    assert text.count(old) == 1
    new = old + f"        self.stop_requested |= self.step == 5 and {limit} self.settings\n"
    path.write_text(text.replace(old, new), encoding="utf-8")
    stopped = project.run_here(SCRIPT)
    assert stopped.returncode == 1 and "Stopped at step 5 of 12" in stopped.stderr
    assert (folder_of(project) / "checkpoint.pt").exists() == (stage == 2)
    path.write_text(text, encoding="utf-8")
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert f"Going on from step {5 if stage == 1 else 12} of 12" in done.stdout
    for one, other in zip(wanted, finished_weights(project)):
        for name, weight in one.items():
            assert torch.equal(weight, other[name]), name


@pytest.mark.skipif(sys.platform == "win32", reason="signals that Windows has not")
def test_ctrl_c_keeps_the_work(project):
    prepare(project, count=3000, VAE_EPOCHS=50)
    running = project.start(SCRIPT)
    deadline = time.monotonic() + 120
    while not (folder_of(project) / "vae.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 1, err
    assert "The same command goes on" in err and "Traceback" not in err
    assert project.outputs(SCRIPT) == ["vae.pt"]


def test_to_play_with(project):
    prepare(project, VAE_EPOCHS=1, EPOCHS=1)
    question = (
        "y = ldm.sample(n=3, ddim_steps=5); print('a', tuple(y.shape), y.abs().max().item() <= 1)\n"
        "print('b', tuple(ldm.encode(x).shape), tuple(ldm.decode(ldm.encode(x)).shape))\n"
        "print('c', tuple(vae.decode(vae.encode(x)[0]).shape))\n"
        "ldm_in_training.loss = lambda z: print('std', z.std().item())\n"
        "loss(torch.arange(200))\n"
        "ldm.sample(n=2, ddim_steps=21)\n"
    )
    done = project.run("-i", SCRIPT, stdin=question)
    shape = "(200, 1, 28, 28)"
    for answer in "a (3, 1, 28, 28) True", f"b (200, 4, 8, 8) {shape}", f"c {shape}":
        assert answer in done.stdout, done.stdout + done.stderr
    assert "ValueError: ddim_steps = 21" in done.stderr
    std = float(next(line for line in done.stdout.splitlines() if "std" in line).split()[-1])
    assert std == pytest.approx(1, abs=0.03), "the diffusion is trained on scaled latents"


def test_cifar10(project):
    project.lay_cifar10(100)
    project.edit(SCRIPT, DATASET="CIFAR10", **SMALL)
    done = project.run_without_md5(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert project.outputs(SCRIPT) == sorted([*FILES, "samples_epoch_001.png"])
    with Image.open(folder_of(project) / "autoencoder.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).max() > 20, "in colour"


def test_more_levels_than_latents_have(project):
    project.edit(SCRIPT, DATASET="CIFAR10", CHANNEL_MULT=(1, 1, 1, 1, 1))
    done = project.run_here(SCRIPT)
    assert done.returncode == 1 and "whose 8 × 8 places" in done.stderr


def test_a_second_stage_without_its_vae_is_refused_at_once(project):
    prepare(project, VAE_EPOCHS=1, EPOCHS=1)
    assert project.run_here(SCRIPT).returncode == 0
    path = folder_of(project) / "checkpoint.pt"
    before = path.read_bytes()
    (folder_of(project) / "vae.pt").unlink()
    done = project.run_here(SCRIPT)
    assert done.returncode == 1 and "belongs to a VAE that is gone" in done.stderr
    assert "Epoch" not in done.stderr and path.read_bytes() == before
