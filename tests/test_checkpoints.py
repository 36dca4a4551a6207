"""A checkpoint describes itself; what is none, or another's, is refused and left alone.

`resume`, `train` and DDPM.load are the same code in all scripts (see test_house_rules.py), so each
kind of bad file is tried in one of them.
"""

import io
import re

import pytest
import torch
from conftest import Project, inside, load, scripts

CLASSES = {"02": "DDPM", "03": "GuidedDDPM", "04": "DDIM", "05": "LatentDiffusion"}
OTHER = {"T": 9, "SCHEDULE": "linear", "BASE_CH": 12, "CHANNEL_MULT": (1, 1, 2), "NUM_BLOCKS": 2}
OTHER |= {"DATASET": "CIFAR10", "LATENT_CH": 3, "VAE_CH": 6, "DOWNSAMPLE": 2, "P_UNCOND": 0.5}


class Malicious:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


def bad_contents(trained, kind):
    """The bytes of a file that is no checkpoint, or that of another script or stage."""
    if kind in ("malicious", "weights only"):  # 01 saves its weights as the latter
        weights, file = trained.state("02_ddpm.py")["model"], io.BytesIO()
        torch.save({"settings": Malicious()} if kind == "malicious" else weights, file)
        return file.getvalue()
    whole = (trained.folder / "outputs" / kind.removesuffix(", half")).read_bytes()
    return whole[: len(whole) // 2] if kind.endswith("half") else whole


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("path", scripts()[1:], ids=lambda p: p.name)
def test_load_asks_only_the_file(trained, tmp_path, monkeypatch, path):
    """By a script whose head says something else, from a GPU, to the device that is there."""
    other, state = Project(tmp_path), trained.state(path.name)
    head = path.read_text(encoding="utf-8").split("# %% 2. ")[0]
    other.edit(path.name, **{n: v for n, v in OTHER.items() if f"\n{n} = " in head})
    module, file = load(tmp_path / path.name), tmp_path / "gpu.pt"
    with monkeypatch.context() as patch:  # it says of each tensor where it has been
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save(state, file)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(file, weights_only=True)
    class_of_script = getattr(module, CLASSES[path.name[:2]])
    sampler = class_of_script.load(file)
    expected = torch.cumprod(1 - module.cosine_beta_schedule(5), dim=0).float()
    assert torch.equal(sampler.alphas_cumprod, expected)
    nets = {"averaged": sampler.model}
    nets |= {"vae": sampler.vae} if path.name.startswith("05") else {}
    for name, net in nets.items():
        torch.testing.assert_close(dict(net.state_dict()), dict(state[name]), rtol=0, atol=0)
        assert not net.training and not any(w.requires_grad for w in net.parameters())
    assert any(not torch.equal(state["averaged"][key], w) for key, w in state["model"].items())
    images = sampler.sample(2, ddim_steps=2) if len(nets) == 2 else sampler.sample(2)
    assert images.shape == (2, 1, 28, 28) and images.isfinite().all() and images.abs().max() <= 1
    if path.name.startswith("03"):
        assert sampler.class_names == [*"0123456789"] and sampler.p_uncond == 0.1
    monkeypatch.setattr(module, "pick_device", lambda: torch.device("meta"))
    sampler = class_of_script.load(file)
    assert {w.device.type for w in sampler.model.parameters()} == {"meta"}
    assert sampler.alphas_cumprod.device.type == sampler.device.type == "meta"
    file.write_bytes(bad_contents(trained, "malicious"))
    with inside(tmp_path), pytest.raises(Exception, match=r"[Ww]eights"):
        class_of_script.load(file)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("script", "name", "kind"),
    [
        ("02_ddpm.py", "checkpoint.pt", "malicious"),
        ("02_ddpm.py", "checkpoint.pt", "weights only"),
        ("03_conditional_ddpm.py", "checkpoint.pt", "02_ddpm/checkpoint.pt"),
        ("05_latent_diffusion.py", "checkpoint.pt", "05_latent_diffusion/vae.pt"),
        ("05_latent_diffusion.py", "vae.pt", "05_latent_diffusion/checkpoint.pt"),
        ("05_latent_diffusion.py", "vae.pt", "05_latent_diffusion/vae.pt, half"),
    ],
)
def test_what_is_no_checkpoint_of_this_place_is_left_alone(trained, tmp_path, script, name, kind):
    project, bad = Project(tmp_path), bad_contents(trained, kind)
    project.prepare(script)
    folder, shown = project.folder_of(script), project.folder_of(script).relative_to(tmp_path)
    folder.mkdir(parents=True)
    (folder / name).write_bytes(bad)
    done = project.run_here(script)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = r"Cannot resume from (.+?) \((.+)\)\. To start from scratch, delete .+ OUT_DIR\."
    where, why = re.fullmatch(line, done.stderr.strip().splitlines()[-1]).groups()
    assert where == str(shown / name) and len(why) > 10
    assert project.outputs(script) == [name] and (folder / name).read_bytes() == bad
    assert not (tmp_path / "executed").exists()


def test_05_neither_reads_nor_writes_vae_pt_once_stage_2_has_begun(trained, tmp_path):
    """The VAE is that of the checkpoint: it makes the same pictures."""
    script, project = "05_latent_diffusion.py", Project(tmp_path)
    project.prepare(script)
    folder, before = project.folder_of(script), trained.folder_of(script)
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes((before / "checkpoint.pt").read_bytes())
    (folder / "vae.pt").write_bytes(b"damaged")
    done = project.run_here(script)
    assert done.returncode == 0, done.stderr
    assert ", after 43 of 43 images." in done.stdout and "Stage 1" not in done.stdout
    assert (folder / "vae.pt").read_bytes() == b"damaged"
    for name in "checkpoint.pt", "autoencoder.png", "samples.png":
        assert (folder / name).read_bytes() == (before / name).read_bytes()
