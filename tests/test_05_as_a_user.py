"""05_latent_diffusion.py as a person meets it; what it shares with 02 is tested there."""

import shutil

import pytest
import torch
from conftest import EACH_STEP, PICTURES, assert_learned_the_same, ctrl_c
from PIL import Image

from utils.visualize import draw_digits

SCRIPT = "05_latent_diffusion.py"
OWN = ["autoencoder.png", "interpolation.png", "latent_scale.png", "latents.png"]
STATES = ["checkpoint.pt", "vae.pt"]
FILES = sorted([*PICTURES, *OWN, *STATES])


def paths_of(project):
    return [project.folder_of(SCRIPT) / name for name in STATES]


def test_from_start_to_pictures_and_again(project, trained, real_figures):
    project.prepare(SCRIPT, SAVE_EVERY=EACH_STEP)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    previews = ["samples_step_000001.png", "samples_step_000002.png"]
    assert project.outputs(SCRIPT) == sorted(FILES + previews)
    project.check_pictures(SCRIPT, others=STATES)
    assert "Stage 1 of 2" in done.stdout and "Stage 2 of 2" in done.stdout
    assert done.stderr.count("Training:   0%") == 2, "a bar for each stage"
    for name in STATES:
        assert_learned_the_same(project.state(SCRIPT, name), trained.state(SCRIPT, name))
    ldm, loss, to_batch = (project.names[name] for name in ("ldm", "loss", "to_batch"))
    stage_1 = project.state(SCRIPT, "vae.pt")["averaged"]
    assert_learned_the_same({**stage_1, "scale": ldm.vae.scale}, ldm.vae.state_dict())
    x = to_batch(draw_digits(9)[0][:, None])
    assert ldm.encode(x).shape == (9, 2, 8, 8) and ldm.decode(ldm.encode(x)).shape == x.shape
    assert ldm.sample(n=3, ddim_steps=5).shape == (3, 1, 28, 28)
    # Diffusion was trained on drawn, scaled latents.
    mean, deviation = project.names["mean"], project.names["deviation"]
    ldm.loss = lambda z_0: z_0
    torch.manual_seed(1)
    z_0 = loss(torch.arange(43))
    torch.manual_seed(1)
    drawn = mean + deviation * torch.randn_like(mean)
    assert torch.equal(z_0, drawn * ldm.vae.scale) and not torch.equal(z_0, drawn)
    assert z_0.std().item() == pytest.approx(1, abs=0.05)

    before = {name: (project.folder_of(SCRIPT) / name).read_bytes() for name in FILES}
    again = project.run_here(SCRIPT)
    assert again.returncode == 0 and "after 43 of 43 images" in again.stdout, again.stderr
    for name in set(FILES) - {"latent_scale.png"}:  # which shows latents drawn at random
        assert (project.folder_of(SCRIPT) / name).read_bytes() == before[name], name


@pytest.mark.parametrize(("step", "stage"), [(2, 1), (5, 2)])
def test_interrupted_in_either_stage_it_resumes_there(project, trained, figures, step, stage):
    project.prepare(SCRIPT, SAVE_EVERY=EACH_STEP)
    with ctrl_c(step):
        stopped = project.run_here(SCRIPT)
    assert stopped.returncode == 1 and "Stopped." in stopped.stderr
    assert project.outputs(SCRIPT) == (["vae.pt"] if stage == 1 else STATES)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    (resumed,) = [line for line in done.stdout.splitlines() if line.startswith("Resuming")]
    assert resumed.endswith(f"{STATES[2 - stage]}, after 20 of 43 images.")
    for name in STATES:
        assert_learned_the_same(project.state(SCRIPT, name), trained.state(SCRIPT, name))


def test_what_may_change_and_what_may_not(project, trained, figures):
    project.prepare(SCRIPT, EPOCHS=2)
    shutil.copytree(trained.folder_of(SCRIPT), project.folder_of(SCRIPT))
    checkpoint, vae = paths_of(project)

    def refused(reason, path, **constants):
        before = [path.read_bytes() for path in paths_of(project) if path.exists()]
        project.edit(SCRIPT, **constants)
        done = project.run_here(SCRIPT)
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("Cannot resume from") and path.name in last
        assert "delete the file" in last and "Training" not in done.stderr
        assert [path.read_bytes() for path in paths_of(project) if path.exists()] == before

    refused("BASE_CH was 4 and now is 16", checkpoint, BASE_CH=16)
    # A diffusion does not resume with the latents of another autoencoder ...
    refused("KL_WEIGHT was 0.002 and now is 0.5", checkpoint, BASE_CH=4, KL_WEIGHT=0.5)
    refused("VAE_EPOCHS was 1 and now is 2", checkpoint, KL_WEIGHT=0.002, VAE_EPOCHS=2)
    # ... but more passes through the latents need no other one. The file of stage 1 is not read.
    vae.write_bytes(b"half a checkpo")
    before = project.state(SCRIPT)["vae"]
    project.edit(SCRIPT, VAE_EPOCHS=1, LEARNING_RATE=0.01, BATCH_SIZE=10)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0 and "after 43 of 86 images" in done.stdout, done.stderr
    assert "Stage 1" not in done.stdout and vae.read_bytes() == b"half a checkpo"
    assert_learned_the_same(project.state(SCRIPT)["vae"], before)
    # Without the second file, stage 1 resumes from the first one, if that is possible.
    checkpoint.unlink()
    refused("Error: ", vae)
    shutil.copy(paths_of(trained)[1], vae)
    refused("KL_WEIGHT was 0.002 and now is 0.5", vae, KL_WEIGHT=0.5)
    project.edit(SCRIPT, KL_WEIGHT=0.002, VAE_EPOCHS=2)
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "vae.pt, after 43 of 86 images." in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>"])
def test_damaged_test_images_end_with_one_line(project, content):
    project.prepare(SCRIPT)
    file = project.folder / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    damaged = file.read_bytes()[:1000] if content is None else content
    file.write_bytes(damaged)
    done = project.run_here(SCRIPT)
    assert done.returncode == 1 and file.read_bytes() == damaged
    assert done.stderr.startswith("The test images of MNIST in data are damaged (")
    assert done.stderr.count("\n") == 1 and project.outputs(SCRIPT) == []


@pytest.mark.parametrize(("count", "pairs"), [(2, 0), (60, 1)])
def test_of_a_few_images_of_ones_own_some_are_held_out(project, figures, count, pairs):
    folder = project.folder / "celeba"  # also the name of a module of torchvision.datasets
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 30), (i, 100, 200 - i)).save(folder / f"{i:03}.png")
    project.prepare(SCRIPT, DATASET="celeba")
    done = project.run_here(SCRIPT)
    assert done.returncode == 0, done.stderr
    kept, held_out = (project.names[name][:, 0, 0, 0] for name in ("images", "test_images"))
    assert held_out.tolist() == [*range(0, count, 20)], "every 20th"
    assert sorted(torch.cat([kept, held_out]).tolist()) == [*range(count)]
    assert f"{len(kept)} images of celeba/; 1 classes: images\n" in done.stdout
    assert project.names["ldm"].sample(1, 2).shape == (1, 3, 16, 16)
    shown = figures["interpolation.png"].axes[0].get_yticklabels() if pairs else []
    assert len(shown) == 2 * pairs and ("interpolation.png" in figures) == (pairs > 0)
