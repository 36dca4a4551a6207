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

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
IMAGE = 1, 28, 28


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
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64OnGpu():
        yield


def on_gpu(script, request):
    """Return a script's diffusion, made on the CPU, where β is more than fake, and then moved."""
    number, betas = script.__name__[:2], torch.linspace(1e-4, 0.5, 8, dtype=torch.float64)
    made = {
        "01": lambda: script.SimpleDDPM(None, betas, IMAGE, CPU),
        "02": lambda: script.DDPM(None, betas, IMAGE, CPU),
        "03": lambda: script.GuidedDDPM(None, betas, IMAGE, CPU, 0.1, [*"0123456789"]),
        "04": lambda: script.DDIM(None, betas, IMAGE, CPU),
        "05": lambda: script.LatentDiffusion(None, script.VAE(IMAGE, 4, 4), betas, CPU),
    }[number]()
    request.getfixturevalue("gpu")
    made.device = GPU
    for name, value in vars(made).items():
        if isinstance(value, torch.Tensor):
            setattr(made, name, value.to(GPU))
    options = (4, 8, 8) if number == "05" else IMAGE, 8, (1, 2), 1, (7, 14), 0.1, torch.bfloat16
    with GPU:  # what is made here is on the GPU
        if number == "01":
            made.model = script.SimpleUNet(1, 8)
        elif number == "03":
            made.model = script.ConditionalUNet(*options, num_classes=10)
        else:
            made.model = script.UNet(*options)
        if number == "05":
            made.vae = script.VAE(IMAGE, 4, 4)
    return made


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("path", scripts(), ids=lambda p: p.name)
def test_loss_sampling_and_optimizer_stay_on_the_gpu(path, request):
    script, number = load(path.name), path.name[:2]
    made = on_gpu(script, request)
    images = torch.zeros(40, *IMAGE, dtype=torch.uint8).to(GPU)
    x_0 = images[torch.randperm(40, device=GPU)[:8]].float() / 127.5 - 1
    results = [made.sample(3, 5) if number == "05" else made.sample(3)]
    if number == "02":
        inner, _ = script.split_weights(made.model)
        for weight in inner:
            weight.grad = torch.ones_like(weight)
        muon = script.Muon(inner, lr=0.02)
        muon.step()
        results += [state["average"] for state in muon.state.values()]
    if number == "03":
        results += [made.sample(3, [1, 2, 3], 2.0, steps=5)]
    if number == "04":
        results += [made.ddim_sample(3, 5), made.dpm_solver_sample(3, 5), made.ddim_invert(x_0, 5)]
    if number == "05":
        results += [script.vae_loss(x_0, *made.vae(x_0), 0.002)]
        x_0 = made.encode(x_0)
        results += [made.decode(x_0)]
    labels = [torch.zeros(8, dtype=torch.int64, device=GPU)] if number == "03" else []
    loss = made.loss(x_0, *labels)
    assert loss.dtype == torch.float32
    assert all(result.device == GPU for result in [loss, *results])


def test_the_fake_gpu_notices_what_a_real_one_would(request):
    made = on_gpu(load("02_ddpm.py"), request)
    made.alphas_cumprod = made.alphas_cumprod.to(CPU)
    with pytest.raises(Exception, match="device"):
        made.loss(torch.zeros(8, *IMAGE, device=GPU))
    with pytest.raises(AssertionError):
        torch.zeros(3, dtype=torch.float64, device=GPU)


def test_device_precision_and_layout_are_those_that_work_there(monkeypatch):
    """PyTorch names the kind of accelerator that it is built for even where there is none."""
    script, there = load("02_ddpm.py"), []

    def current_accelerator(check_available=False):
        return torch.device(there[0] or "cuda") if there[0] or not check_available else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    for there[:] in ["cuda"], ["mps"], [None]:
        assert script.pick_device() == torch.device(there[0] or "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: there[0])
    for there[:], expected in ([True], torch.bfloat16), ([False], torch.float16):
        assert script.best_precision(GPU) == expected
    apple = torch.device("mps")
    assert script.best_precision(CPU) == script.best_precision(apple) == torch.float32
    assert script.best_layout(apple) == torch.contiguous_format
    assert script.best_layout(GPU) == script.best_layout(CPU) == torch.channels_last


def test_a_gpu_gets_larger_settings_and_they_pass_the_checks(monkeypatch, tmp_path):
    for path in scripts()[1:]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
        small = load(path.name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        large = load(path.name)
        assert large.ON_GPU and not small.ON_GPU
        for name in "BASE_CH", "NUM_BLOCKS", "EPOCHS", "BATCH_SIZE":
            equal = path.name[:2] == "05" and name == "NUM_BLOCKS"  # latents are cheap
            assert getattr(large, name) >= getattr(small, name) + (not equal)
            with inside(tmp_path):
                assert large.check(vars(large))[0][name] == getattr(large, name)


def test_each_process_has_a_gpu_of_its_own_and_the_first_one_speaks(monkeypatch):
    script, spoken = load("02_ddpm.py"), sys.stdout
    done = {"device": [], "backend": []}
    monkeypatch.setattr(torch.cuda, "set_device", done["device"].append)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, timeout: done["backend"].append(backend),
    )
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: bool(done["backend"]))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)

    def join(gpus, *environment):
        for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), environment):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        done["device"].clear(), done["backend"].clear()
        here = script.join_processes()
        assert script.join_processes() == here, "it may be called twice"
        silent = sys.stdout is not spoken
        monkeypatch.setattr(sys, "stdout", spoken)
        return *here, *done["device"], *done["backend"], *["silent"] * silent

    for name in "RANK", "LOCAL_RANK", "WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)
    assert join(4) == join(0) == (0, 1), "alone"
    assert join(4, 0, 0, 4) == (0, 4, 0, "nccl")
    assert join(4, 3, 3, 4) == (3, 4, 3, "nccl", "silent")
    assert join(4, 5, 1, 8) == (5, 8, 1, "nccl", "silent"), "the second of two machines"
    assert join(0, 0, 0, 2) == (0, 2, "gloo")
    assert join(0, 1, 1, 2) == (1, 2, "gloo", "silent")
    with pytest.raises(SystemExit, match=r"^There are 2 GPUs here: use --nproc_per_node=2\.$"):
        join(2, 2, 2, 4)
    assert done == {"device": [], "backend": []}


class Launches(TorchDispatchMode):
    """Counts the operations for which a GPU starts at least one kernel; views only have a shape."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function._schema.returns
        is_view = any(r.alias_info and not r.alias_info.is_write for r in results)
        self.count += not (is_view or "empty" in str(function) or "new_" in str(function))
        return function(*args, **(kwargs or {}))


def test_a_training_step_on_a_gpu_launches_few_operations(tmp_path):
    """A large GPU waits for the next operation rather than for its result.

    With Muon matrix by matrix and averages weight by weight it was 5,254 for a network like this.
    """
    script, counts = load("02_ddpm.py"), []
    network = (1, 28, 28), 64, (1 / 4, 1, 2), 2, (14,), 0.0, torch.bfloat16  # as on a GPU
    settings = {"LEARNING_RATE": 0.02, "BATCH_SIZE": 2, "SEED": 0, "EMA_DECAY": 0.9999}
    settings |= {"SAVE_EVERY": 1000}
    for steps in 2, 4:
        model, x_0 = script.UNet(*network), torch.zeros(2, 1, 28, 28)
        ddpm = script.DDPM(model, script.cosine_beta_schedule(1000), IMAGE, CPU)
        with Launches() as launches:
            settings["EPOCHS"], path = steps, tmp_path / f"{steps}.pt"
            script.train(model, lambda index, d=ddpm, x=x_0: d.loss(x), 2, settings, (), path)
        counts.append(launches.count)
    assert 1000 < (counts[1] - counts[0]) / 2 < 1500
