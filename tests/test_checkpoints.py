"""A checkpoint describes itself; what is none, or another's, is refused and left alone."""

import pytest
import torch
from conftest import Project, inside, load, scripts

import utils.interpolation
import utils.visualize
from utils.visualize import draw_digits

NAMES = [path.name for path in scripts()[1:]]
SMALL = {
    "T": 5,
    "SCHEDULE": "linear",
    "BASE_CH": 4,
    "CHANNEL_MULT": (1, 2),
    "NUM_BLOCKS": 1,
    "ATTENTION_AT": (4,),
    "EPOCHS": 1,
    "BATCH_SIZE": 20,
}
OTHER = {
    "T": 9,
    "SCHEDULE": "cosine",
    "BASE_CH": 12,
    "CHANNEL_MULT": (1, 1, 2),
    "NUM_BLOCKS": 2,
    "ATTENTION_AT": (),
    "DROPOUT": 0.5,
    "DATASET": "CIFAR10",
}
MORE = {
    "03": {"SAMPLE_STEPS": 2},
    "04": {"DDIM_STEPS": 2},
    "05": {"DDIM_STEPS": 2, "VAE_CH": 2, "VAE_EPOCHS": 1},
}
OTHER_MORE = {"05": {"LATENT_CH": 3, "VAE_CH": 6, "KL_WEIGHT": 0.1}}
KINDS = "malicious", "half", "empty", "text", "weights only", "another script's"
FILES = [(name, "checkpoint.pt") for name in NAMES] + [("05_latent_diffusion.py", "vae.pt")]
ALL_CASES = [(*file, kind) for file in FILES for kind in KINDS]
ALL_CASES += [
    ("05_latent_diffusion.py", "vae.pt", "another stage's"),
    ("05_latent_diffusion.py", "checkpoint.pt", "another stage's"),
]


class Malicious:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return exec, ("open('executed', 'w').close()",)


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Nothing here looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in utils.visualize.__all__:
            if name != "draw_digits":
                patch.setattr(utils.visualize, name, lambda *_, **__: None)
        patch.setattr(utils.interpolation, "transition_gif", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Project in which 02 to 05 have been run, on 43 digits."""
    project = Project(tmp_path_factory.mktemp("trained"))
    project.lay_mnist(*draw_digits(43, seed=1))
    for name in reversed(NAMES):  # 04 before 02, whose training it would use
        project.edit(name, **{**SMALL, **MORE.get(name[:2], {})})
        done = project.run_here(name)
        assert done.returncode == 0, done.stderr
    return project


def path_of(project, name, file="checkpoint.pt"):
    return project.folder / "outputs" / name.removesuffix(".py") / file


def sample(name, sampler):
    torch.manual_seed(1)
    return sampler.sample(2) if name[:2] != "05" else sampler.sample(2, ddim_steps=2)


@pytest.mark.parametrize("name", NAMES)
def test_load_does_not_ask_the_constants(trained, tmp_path, name):
    """The same checkpoint, by a script whose head says something else in every respect."""
    other = Project(tmp_path)
    other.edit(name, **{**OTHER, **OTHER_MORE.get(name[:2], {})})
    path = path_of(trained, name)
    sampler = load(tmp_path / name).load(path)
    state = torch.load(path, weights_only=True)
    assert state["settings"]["T"] == sampler.T == 5
    betas = torch.linspace(1e-4, 0.02, 5, dtype=torch.float64) * 1000 / 5  # linear
    expected = torch.cumprod(1 - betas.clamp(max=0.999), dim=0).float()
    assert torch.allclose(sampler.alphas_cumprod, expected, atol=1e-6)
    weights = sampler.model.state_dict()
    assert weights.keys() == state["averaged"].keys()
    assert all(torch.equal(weights[key], state["averaged"][key]) for key in weights)
    assert any(not torch.equal(weights[key], state["model"][key]) for key in weights)
    assert not sampler.model.training
    assert not any(w.requires_grad for w in sampler.model.parameters())
    images = sample(name, sampler)
    assert images.shape == (2, 1, 28, 28) and images.isfinite().all() and images.abs().max() <= 1
    assert torch.equal(images, sample(name, load(trained.folder / name).load(path)))
    if name[:2] == "03":
        assert sampler.class_names == [*"0123456789"] and sampler.sample(1, "7").shape[0] == 1
    if name[:2] == "05":
        assert sampler.scale == state["extras"]["scale"] and not sampler.vae.training


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_made_on_a_gpu_can_be_loaded_without_one(trained, tmp_path, monkeypatch, name):
    state = torch.load(path_of(trained, name), weights_only=True)
    with monkeypatch.context() as patch:  # it says of each tensor where it has been
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save(state, tmp_path / "gpu.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "gpu.pt", weights_only=True)
    images = sample(name, load(trained.folder / name).load(tmp_path / "gpu.pt"))
    assert torch.equal(
        images, sample(name, load(trained.folder / name).load(path_of(trained, name)))
    )


@pytest.mark.parametrize("name", NAMES)
def test_load_brings_it_to_the_device_that_is_there(trained, monkeypatch, name):
    module = load(trained.folder / name)
    monkeypatch.setattr(module, "pick_device", lambda: torch.device("meta"))
    sampler = module.load(path_of(trained, name))
    assert {w.device.type for w in sampler.model.parameters()} == {"meta"}
    assert sampler.alphas_cumprod.device.type == sampler.device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_load_runs_no_foreign_code(trained, tmp_path, name):
    torch.save({"settings": Malicious()}, tmp_path / "malicious.pt")
    with inside(tmp_path), pytest.raises(Exception, match=r"[Ww]eights"):
        load(trained.folder / name).load(tmp_path / "malicious.pt")
    assert not (tmp_path / "executed").exists()


def bad_contents(trained, tmp_path, name, file, kind):
    """The bytes of a file that is no checkpoint for this place."""
    path = path_of(trained, name, file)
    if kind in ("half", "empty", "text"):
        whole = path.read_bytes()
        return {"half": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[kind]
    if kind == "another script's":
        other = "03_conditional_ddpm.py" if name[:2] != "03" else "02_ddpm.py"
        return path_of(trained, other).read_bytes()
    if kind == "another stage's":
        other = {"vae.pt": "checkpoint.pt", "checkpoint.pt": "vae.pt"}[file]
        return path_of(trained, name, other).read_bytes()
    state = {"settings": Malicious()}
    if kind == "weights only":  # as 01 saves its weights
        state = torch.load(path, weights_only=True)["model"]
    torch.save(state, tmp_path / "bad.pt")
    return (tmp_path / "bad.pt").read_bytes()


@pytest.mark.parametrize(("name", "file", "kind"), ALL_CASES)
def test_what_is_no_checkpoint_of_this_place_is_left_alone(trained, tmp_path, name, file, kind):
    path = path_of(trained, name, file)
    good, bad = path.read_bytes(), bad_contents(trained, tmp_path, name, file, kind)
    path.write_bytes(bad)
    try:
        before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
        done = trained.run_here(name)
        message = done.stderr.strip().splitlines()[-1]
        shown = str(path.relative_to(trained.folder))
        assert done.returncode == 1
        assert message.startswith(f"Cannot go on from {shown}: "), message
        hint = " To start from scratch, delete the file or set another OUT_DIR."
        assert message.endswith(hint) and "Traceback" not in done.stderr
        assert len(message) > len(shown) + len(hint) + 25, "it says why"
        assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
        assert not (trained.folder / "executed").exists()
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", NAMES)
def test_with_its_own_it_goes_on(trained, name):
    before = path_of(trained, name).read_bytes()
    trained.edit(name, OUT_DIR=str(path_of(trained, name).parent))
    done = trained.run_here(name)
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout and "step 2 of 2." in done.stdout
    assert path_of(trained, name).read_bytes() == before
    trained.edit(name, OUT_DIR=f"outputs/{name.removesuffix('.py')}")


def test_04_tells_what_it_can_use(trained, tmp_path, capsys):
    name = "04_ddim_fast_sampling.py"
    module = load(trained.folder / name)
    of_02, shape = path_of(trained, "02_ddpm.py"), (1, 28, 28)
    assert module.is_usable(of_02, "MNIST", shape)
    assert module.is_usable(path_of(trained, name), "MNIST", shape)
    assert not module.is_usable(tmp_path / "none.pt", "MNIST", shape)
    assert capsys.readouterr().out == "", "no reason to say anything"
    for others in ("FashionMNIST", shape), ("MNIST", (1, 32, 32)):
        assert not module.is_usable(of_02, *others)
        said = capsys.readouterr().out
        assert "it was trained on" in said and "MNIST" in said and "28" in said
    for kind in KINDS:
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(bad_contents(trained, tmp_path, name, "checkpoint.pt", kind))
        with inside(tmp_path):
            assert not module.is_usable(path, "MNIST", shape), kind
        said = capsys.readouterr().out
        assert said.startswith(f"Training from scratch, because {path} does not fit: "), kind
        assert said.count("\n") == 1, f"one line for a file that is {kind}: {said}"
    assert not (tmp_path / "executed").exists()
