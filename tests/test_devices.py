"""The branches for GPUs, on a machine that has none: with tensors that only claim to be on one.

PyTorch's fake tensors have a shape, a type and a device, but no numbers. An operation on tensors of
two devices is an error, as it is on a real GPU. No float64 may get there: Apple's GPUs have none.
What fake tensors cannot do is the backward pass, and 16-bit arithmetic without a GPU.
"""

import sys

import pytest
import torch
from conftest import inside, load, scripts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
T = 20


class NoFloat64OnGpu(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device == GPU:
                assert leaf.dtype != torch.float64, function
        return result


@pytest.fixture
def gpu():
    try:
        with FakeTensorMode(), GPU:
            torch.nn.Linear(2, 2)(torch.randn(2).to(GPU)).sum()
    except RuntimeError as error:
        pytest.skip(f"this PyTorch cannot do without a real GPU: {str(error)[:80]}")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, NoFloat64OnGpu():
        yield mode


def networks(script):
    """Its networks by name, on the fake GPU."""
    options = 8, (1, 2), 1, (7, 14, 8), 0.1, torch.bfloat16
    with GPU:  # what is made here is on the GPU
        if script.__name__.startswith("01"):
            return {"model": script.SimpleUNet(1, 8)}
        if script.__name__.startswith("03"):
            return {"model": script.ConditionalUNet((1, 28, 28), *options[:-1], 10, options[-1])}
        if script.__name__.startswith("05"):
            unet = script.UNet((4, 8, 8), *options)
            return {"model": unet, "vae": script.VAE((1, 28, 28), 4, 4)}
        return {"model": script.UNet((1, 28, 28), *options)}


def diffusion(script):
    """Its class of diffusion on the CPU: it reads numbers, which fake tensors do not have."""
    betas = torch.linspace(1e-4, 0.5, T, dtype=torch.float64)
    image, latent = (1, 28, 28), (4, 8, 8)
    make = {
        "01": lambda: script.SimpleDDPM(None, betas, image, CPU),
        "02": lambda: script.DDPM(None, betas, image, CPU),
        "03": lambda: script.GuidedDDPM(None, betas, image, CPU, 0.1, [str(i) for i in range(10)]),
        "04": lambda: script.DDIM(None, betas, image, CPU),
        "05": lambda: script.LatentDiffusion(None, None, 1.0, betas, latent, CPU),
    }
    return make[script.__name__[:2]]()


def to_gpu(made):
    """Move its tables of float32 to the fake GPU; β, in float64, stays, as in the scripts."""
    for name, value in vars(made).items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            setattr(made, name, value.to(GPU))
    made.device = GPU
    return made


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("path", scripts(), ids=lambda p: p.name)
def test_loss_and_sampling_stay_on_the_gpu(path, request):
    script = load(path.name)
    made = diffusion(script)
    request.getfixturevalue("gpu")
    nets = networks(script)
    to_gpu(made)
    for name, net in nets.items():
        setattr(made, name, net)
    images = torch.zeros(40, 1, 28, 28, dtype=torch.uint8).to(GPU)
    index = torch.randperm(40, device=GPU)[:8]
    x_0 = images[index].float() / 127.5 - 1
    labels = torch.zeros(8, dtype=torch.int64, device=GPU)
    number = path.name[:2]
    if number == "05":
        assert script.vae_loss(x_0, *made.vae(x_0), 0.002).device == GPU
        x_0 = made.encode(x_0)
    loss = made.loss(x_0, labels) if number == "03" else made.loss(x_0)
    assert loss.device == GPU and loss.dtype == torch.float32
    samplers = {
        "01": [lambda: made.sample(3)],
        "02": [lambda: made.sample(3), lambda: script.ideal_x_0(x_0, 0.5, x_0)],
        "03": [lambda: made.sample(3), lambda: made.sample(3, [1, 2, 3], 2.0)],
        "04": [
            lambda: made.ddim_sample(3, 5, eta=0.5),
            lambda: made.dpm_solver_sample(3, 5),
            lambda: made.ddim_invert(x_0, 5),
        ],
        "05": [lambda: made.sample(3, 5), lambda: made.decode(x_0)],
    }
    for sample in samplers[number]:
        assert sample().device == GPU


@pytest.mark.parametrize("path", scripts()[1:], ids=lambda p: p.name)
def test_the_optimizers_stay_on_the_gpu(path, gpu):
    script = load(path.name)
    model = networks(script)["model"]
    weights = [w for w in model.parameters() if w.ndim > 1]
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    muon = script.Muon(weights, lr=0.02)
    muon.step()
    assert all(state["average"].device == GPU for state in muon.state.values())


def test_the_fake_gpu_notices_what_a_real_one_would(request):
    script = load("02_ddpm.py")
    made = diffusion(script)
    request.getfixturevalue("gpu")
    to_gpu(made).model = networks(script)["model"]
    made.alphas_cumprod = made.alphas_cumprod.to(CPU)
    with pytest.raises(Exception, match="device"):
        made.loss(torch.zeros(8, 1, 28, 28, device=GPU))
    with pytest.raises(AssertionError):
        torch.zeros(3, dtype=torch.float64, device=GPU)


@pytest.mark.parametrize("path", scripts()[1:], ids=lambda p: p.name)
@pytest.mark.parametrize("there", ["cuda", "mps", None])
def test_device_is_picked_by_what_is_there(monkeypatch, path, there):
    """PyTorch names the kind of accelerator that it is built for even where there is none."""
    script = load(path.name)

    def current_accelerator(check_available=False):
        return torch.device(there or "cuda") if there or not check_available else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert script.pick_device() == torch.device(there or "cpu")


@pytest.mark.parametrize("path", scripts()[1:], ids=lambda p: p.name)
def test_precision_and_layout_are_those_that_work_there(monkeypatch, path):
    script = load(path.name)
    modern = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: modern[0])
    for modern[:], expected in ([True], torch.bfloat16), ([False], torch.float16):
        assert script.best_precision(GPU) == expected
    for name in "cpu", "mps":
        assert script.best_precision(torch.device(name)) == torch.float32
    assert script.best_layout(torch.device("mps")) == torch.contiguous_format
    assert script.best_layout(GPU) == script.best_layout(CPU) == torch.channels_last


@pytest.mark.parametrize("path", scripts()[1:], ids=lambda p: p.name)
def test_a_gpu_gets_larger_settings_and_they_pass_the_checks(monkeypatch, tmp_path, path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    small = load(path.name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    large = load(path.name)
    assert large.ON_GPU and not small.ON_GPU
    for name in "BASE_CH", "NUM_BLOCKS", "EPOCHS", "BATCH_SIZE":
        assert getattr(large, name) > getattr(small, name)
    with inside(tmp_path):
        assert large.check_settings(vars(large))["BASE_CH"] == large.BASE_CH


@pytest.fixture
def processes(monkeypatch):
    """Return a function that pretends to be one of several processes, and what they have done."""
    done = {"device": [], "backend": []}
    monkeypatch.setattr(torch.cuda, "set_device", done["device"].append)
    monkeypatch.setattr(torch.distributed, "init_process_group", done["backend"].append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which all but the first replace

    def be(rank, world, gpus):
        for name, value in ("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return done

    return be


@pytest.mark.parametrize("path", scripts()[1:], ids=lambda p: p.name)
def test_each_process_has_a_gpu_of_its_own(processes, path):
    script = load(path.name)
    done = processes(3, 4, gpus=4)
    assert script.join_processes() == (3, 4)
    assert done == {"device": [3], "backend": ["nccl"]}


def test_processes_without_gpus_and_one_alone(processes, monkeypatch):
    script = load("02_ddpm.py")
    done, spoken = processes(1, 2, gpus=0), sys.stdout
    assert script.join_processes() == (1, 2) and done == {"device": [], "backend": ["gloo"]}
    assert sys.stdout is not spoken, "only the first one speaks"
    monkeypatch.setattr(sys, "stdout", spoken)
    processes(0, 2, gpus=0)
    assert script.join_processes() == (0, 2) and sys.stdout is spoken
    for name in "RANK", "WORLD_SIZE":
        monkeypatch.delenv(name)
    done["backend"].clear()
    assert script.join_processes() == (0, 1) and done == {"device": [], "backend": []}
    assert sys.stdout is spoken


@pytest.mark.parametrize("path", scripts()[1:], ids=lambda p: p.name)
def test_more_processes_than_gpus_end_with_one_line(processes, path):
    """The first process says it; the others end without a word."""
    script = load(path.name)
    done = processes(0, 4, gpus=2)
    with pytest.raises(SystemExit) as end:
        script.join_processes()
    assert end.value.code == "4 processes but 2 GPUs: use --nproc_per_node=2."
    processes(3, 4, gpus=2)
    with pytest.raises(SystemExit) as end:
        script.join_processes()
    assert end.value.code == 1
    assert done == {"device": [], "backend": []}
