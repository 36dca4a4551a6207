"""05_latent_diffusion.py as a person meets it; what it shares with 02 is tested there."""

import pytest
import torch
from conftest import load
from PIL import Image

from utils import visualize
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
    "T": 10,
    "DDIM_STEPS": 3,
    "BASE_CH": 4,
    "CHANNEL_MULT": (1, 1),
    "NUM_BLOCKS": 1,
    "VAE_CH": 4,
    "VAE_EPOCHS": 2,
    "EPOCHS": 2,
    "BATCH_SIZE": 20,
}
OTHERS = ["checkpoint.pt", "vae.pt"]


def prepare(project, **constants):
    project.lay_mnist(*draw_digits(40, seed=1))
    project.edit(SCRIPT, **{**SMALL, **constants})


def folder_of(project):
    return project.folder / "outputs" / "05_latent_diffusion"


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>"])
def test_damaged_test_images_end_with_one_line(project, content):
    prepare(project)
    file = project.folder / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    damaged = file.read_bytes()[:1000] if content is None else content
    file.write_bytes(damaged)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1 and file.read_bytes() == damaged
    assert done.stderr.startswith("The test images of MNIST in data are damaged (")
    assert done.stderr.count("\n") == 1 and project.outputs(SCRIPT) == []


@pytest.fixture
def without_pictures(monkeypatch):
    """Saves most of the time, where the pictures do not matter."""
    monkeypatch.setattr(visualize, "_save", lambda fig, path: path)
    monkeypatch.setattr(visualize, "_save_gif", lambda *_, **__: None)


def insert(project, before, line):
    """Put a line into the script, in front of one that it has once; return the old text."""
    path = project.folder / SCRIPT
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, line + before), encoding="utf-8")
    return text


def test_from_start_to_pictures_and_again(project):
    prepare(project, VAE_EPOCHS=8, PREVIEW_EVERY=1e-9)
    text = insert(
        project,
        '        """Return the loss of scaled latents',
        "        print('std', z_0.std().item())\n",
    )
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    previews = [f"samples_step_{step:06}.png" for step in (1, 2, 3)]
    assert project.outputs(SCRIPT) == sorted([*FILES, *previews])
    project.check_pictures(SCRIPT, others=OTHERS)
    assert "Stage 1 of 2" in done.stdout and "Stage 2 of 2" in done.stdout
    assert done.stderr.count("Training:   0%") == 2, "a bar for each stage"
    stds = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("std")]
    assert stds[:4] == pytest.approx([1] * 4, abs=0.05), "trained on scaled latents"
    table = [line for line in done.stdout.splitlines() if line.rstrip().endswith(" x")]
    for line, side in zip(table, (32, 32, 32, 64, 64, 64, 128, 128, 128)):
        assert line.strip().startswith(f"{side} x {side}: "), line
    memory = [float(line.split()[-2]) for line in table if "MB" in line]
    assert len(table) == 9 and all(ratio > 3 for ratio in memory), "16 times fewer positions"
    (project.folder / SCRIPT).write_text(text, encoding="utf-8")
    before = {name: (folder_of(project) / name).read_bytes() for name in FILES}
    again = project.run_here(SCRIPT)
    assert again.returncode == 0, again.stderr
    assert "step 16 of 16" in again.stdout and "step 4 of 4" in again.stdout
    for name in FILES:
        # In cost.png are times, in latent_scale.png drawn latents; all else is repeated.
        if name not in ("cost.png", "latent_scale.png"):
            assert (folder_of(project) / name).read_bytes() == before[name], name
    # The second file is enough to sample, encode and decode, without any constant.
    script = load(SCRIPT)
    ldm = script.load(folder_of(project) / "checkpoint.pt")
    assert isinstance(ldm, script.LatentDiffusion) and ldm.T == 10
    stage_1 = torch.load(folder_of(project) / "vae.pt", weights_only=True)["averaged"]
    assert stage_1.keys() == ldm.vae.state_dict().keys()
    assert all(torch.equal(ldm.vae.state_dict()[name], stage_1[name]) for name in stage_1)
    x = script.to_batch(draw_digits(9)[0][:, None])
    assert ldm.encode(x).shape == (9, 4, 8, 8) and ldm.decode(ldm.encode(x)).shape == x.shape
    assert ldm.sample(n=3, ddim_steps=5).shape == (3, 1, 28, 28)


def weights(project, name):
    return torch.load(folder_of(project) / name, weights_only=True)["averaged"]


def test_stopped_in_either_stage_it_goes_on_there(project, without_pictures):
    prepare(project, VAE_EPOCHS=2, EPOCHS=2, SAVE_EVERY=1e-9)
    assert project.run_here(SCRIPT).returncode == 0
    wanted = [weights(project, name) for name in OTHERS]
    for stage in 1, 2:
        for name in OTHERS:
            (folder_of(project) / name).unlink(missing_ok=True)
        # As if Ctrl-C had come in the fourth step of this stage.
        text = insert(
            project,
            "        loss = self.loss(torch.randint(",
            f"        if self.step == 3 and ('VAE' in self.settings) == {stage == 2}:\n"
            "            raise KeyboardInterrupt\n",
        )
        with pytest.raises(KeyboardInterrupt):
            project.run_here(SCRIPT)
        assert project.outputs(SCRIPT) == (["vae.pt"] if stage == 1 else OTHERS)
        (project.folder / SCRIPT).write_text(text, encoding="utf-8")
        done = project.run_here(SCRIPT)
        assert done.returncode == 0, done.stderr
        steps = [line for line in done.stdout.splitlines() if line.startswith("Going on")]
        files = ["vae.pt"] if stage == 1 else ["vae.pt", "checkpoint.pt"]
        assert len(steps) == len(files) and all(f in s for f, s in zip(files, steps))
        assert "step 3 of 4" in steps[-1]
        for one, other in zip(wanted, [weights(project, name) for name in OTHERS]):
            for name, weight in one.items():
                assert torch.equal(weight, other[name]), (stage, name)


def test_what_may_change_and_what_may_not(project, without_pictures):
    prepare(project, VAE_EPOCHS=1, EPOCHS=1)
    assert project.run_here(SCRIPT).returncode == 0
    paths = [folder_of(project) / name for name in OTHERS]

    def refused(reason, path, **constants):
        before = [path.read_bytes() for path in paths]
        project.edit(SCRIPT, **constants)
        done = project.run_here(SCRIPT)
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("Cannot go on from") and path in last and "delete the file" in last
        assert [path.read_bytes() for path in paths] == before, "both files are untouched"

    refused("BASE_CH was 4 and now is 16", "checkpoint.pt", BASE_CH=16)
    refused("KL_WEIGHT was 0.002 and now is 0.5", "vae.pt", BASE_CH=4, KL_WEIGHT=0.5)
    # Another autoencoder would make stage 2 worthless: it is refused before it is trained.
    refused("VAE_EPOCHS was 1 and now is 2", "vae.pt", KL_WEIGHT=0.002, VAE_EPOCHS=2)
    project.edit(SCRIPT, VAE_EPOCHS=1)
    # More passes through the latents, and smaller batches of them, need no other autoencoder.
    before = paths[1].read_bytes()
    project.edit(SCRIPT, KL_WEIGHT=0.002, EPOCHS=2, LEARNING_RATE=0.01, BATCH_SIZE=10)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0 and "step 4 of 8" in done.stdout, done.stderr
    assert paths[1].read_bytes() == before
    # But a stage 2 does not go on with the latents of another autoencoder.
    state = torch.load(paths[1], weights_only=True)
    state["averaged"]["encoder.conv_out.weight"] *= 1.001
    torch.save(state, paths[1])
    refused("VAE was '", "checkpoint.pt")
    # It still samples with its own.
    ldm = load(SCRIPT).load(paths[0])
    own = ldm.vae.state_dict()["encoder.conv_out.weight"]
    assert not torch.equal(own, state["averaged"]["encoder.conv_out.weight"])


# So few that 1, 2 and 3 of them are kept back as test images.
@pytest.mark.parametrize("count", [15, 40, 60])
def test_a_few_images_of_ones_own(project, without_pictures, count):
    folder = project.folder / "celeba"  # also the name of a module of torchvision.datasets
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 30), (2 * i, 100, 200 - i)).save(folder / f"{i:03}.jpg")
    small = {**SMALL, "VAE_EPOCHS": 1, "EPOCHS": 1, "BATCH_SIZE": 14}
    project.edit(SCRIPT, DATASET="celeba", IMAGE_SIZE=16, **small)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    kept = count - (count + 19) // 20
    assert f"an autoencoder for {kept} images" in done.stdout
    assert f"diffusion on {kept} latents" in done.stdout
    ldm = load(SCRIPT).load(folder_of(project) / "checkpoint.pt")
    assert ldm.sample(1, 2).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"CHANNEL_MULT": (1, 1, 1, 1, 1)}, "halves 8 latents too often"),
        ({"DDIM_STEPS": 11}, "DDIM_STEPS = 11"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_ends_before_any_training(project, constants, message):
    prepare(project, **constants)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1 and message in done.stderr
    assert "Training" not in done.stderr and project.outputs(SCRIPT) == []
