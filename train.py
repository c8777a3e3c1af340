"""Train the network of the sheet (5 and 6): reads mnist/, writes out/model.pt.

    python train.py                train from the start
    python train.py --resume       continue the run in out/
"""
import argparse
import gzip
import io
import os
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddpm import DDPM, describe, linear_beta, randn_like
from unet import ResidualBlock, UNet

MNIST = Path(__file__).resolve().parent / "mnist"
SAVE_EVERY = 100  # steps, about 10 s: the most that Ctrl-C or a crash can lose


class InputError(ValueError):
    """An error that the user can fix. Its message is one sentence."""


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each is a flag of the command line, and a checkpoint holds them."""

    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-2
    timesteps: int = 200
    channels: tuple = (16, 32, 64)
    time_conditioning: bool = True
    optimizer: str = "muon"
    seed: int = 0

    def __post_init__(self):
        """Bad settings raise InputError; numpy's numbers and lists become Python's own."""
        for name, low, high in (("steps", 1, 10**8), ("batch_size", 1, 10**5), ("lr", 1e-8, 1),
                                ("timesteps", 1, 5000), ("seed", 0, 2**32 - 1),
                                ("time_conditioning", False, True)):
            value = getattr(self, name)
            kind = type(getattr(Config, name))
            is_number = isinstance(value, Real | np.bool_)
            if not is_number or not low <= value <= high or kind(value) != value:
                raise InputError(f"{name} must be {kind.__name__}, {low} to {high}, got {value!r}")
            object.__setattr__(self, name, kind(value))
        widths = np.atleast_1d(self.channels).tolist()
        if not widths or any(width not in range(4, 4097, 4) for width in widths):
            raise InputError(f"channels must be multiples of 4 up to 4096, got {self.channels}")
        object.__setattr__(self, "channels", tuple(map(int, widths)))
        if self.optimizer not in ("muon", "adam"):
            raise InputError(f"optimizer must be muon or adam, got {self.optimizer}")


# Data

def read_idx(path, dims):
    """The bytes in a gzipped IDX file as a uint8 tensor of that many dimensions."""
    try:
        content = bytearray(gzip.decompress(Path(path).read_bytes()))
        magic, *shape = np.frombuffer(content, ">u4", 1 + dims).tolist()
        if magic != 0x800 + dims:
            raise ValueError(f"not of bytes in {dims} dimensions")
        return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
        raise InputError(f"{path} must be an IDX file, as MNIST's are: {error}") from error


def load_mnist(folder):
    """Training images (N, 1, H, W) uint8, their labels (N,), test images, their labels."""
    images = read_idx(f"{folder}/train-images-idx3-ubyte.gz", 3)
    labels = read_idx(f"{folder}/train-labels-idx1-ubyte.gz", 1)
    test_images = read_idx(f"{folder}/t10k-images-idx3-ubyte.gz", 3)
    test_labels = read_idx(f"{folder}/t10k-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels) or len(test_images) != len(test_labels) or len(test_labels) < 2:
        raise InputError(f"{folder} needs one label for each image, and two test images or more")
    return images[:, None], labels.long(), test_images[:, None], test_labels.long()


def to_pixels(images):
    """A uint8 tensor as new floats from -1 to 1. InputError for other numbers: scaled already?"""
    if not torch.is_tensor(images) or images.dtype != torch.uint8:
        raise InputError(f"images must be a uint8 tensor, 0 to 255, got {describe(images)}")
    return images / 127.5 - 1


def make_rng(stream, *key):
    """A generator for one use, seeded by its stream and key alone."""
    number = ("figures", "test", "classifier", "train").index(stream)
    seed = np.random.SeedSequence([number, *key]).generate_state(1, np.uint64).item()
    return torch.Generator().manual_seed(seed)


# Optimisers

class Muon(torch.optim.Optimizer):
    """Steps along the momentum, approximately orthogonalised (Jordan et al. 2024).

    params: tensors of two dimensions or more. torch.optim.Muon takes matrices only, and rounds to
    bfloat16, which a CPU with AVX2 emulates.
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                momentum = self.state[kernel].setdefault("momentum", torch.zeros_like(kernel))
                momentum.lerp_(kernel.grad, 0.1)
                nesterov = kernel.grad.lerp(momentum, 0.9)
                update = newton_schulz(nesterov.flatten(1))  # the matrix (out, in x 3 x 3)
                size = 0.2 * max(update.shape) ** 0.5  # as large as Adam's (Liu et al. 2025)
                kernel.sub_(update.view_as(kernel), alpha=group["lr"] * size)


def newton_schulz(matrix):
    """Approximately the nearest orthogonal matrix: the same singular vectors, other values."""
    x = matrix / (matrix.norm() + 1e-7)  # all singular values s <= 1; a gradient of 0 stays 0
    for _ in range(3):  # takes s = 0.01..1 to 0.4..1.2; smaller s stay small
        gram = x @ x.T  # each s becomes 3.4445 s - 4.7750 s³ + 2.0315 s⁵
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def new_optimizers(model, config):
    """Muon for the 3x3 kernels of our residual blocks, Adam for the rest; or Adam for all."""
    kernels = []
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            kernels += [module.conv1.weight, module.conv2.weight]
    if config.optimizer == "adam" or not kernels:
        # 0.95: measured better than the usual 0.999, where the optimisers are compared
        return [torch.optim.Adam(model.parameters(), config.lr, betas=(0.9, 0.95), fused=True)]
    rest = [parameter for parameter in model.parameters() if parameter not in set(kernels)]
    return [Muon(kernels, config.lr), torch.optim.Adam(rest, config.lr, fused=True)]


# Training

class Trainer:
    """A run: the model, its optimisers and its losses so far, as a checkpoint saves them.

    By default, model is the UNet of the config and ddpm the process of linear_beta. Any nn.Module
    model(x_t, t) will do; Adam trains it. `optimizers` is a list, and can be replaced by your own.
    """

    def __init__(self, config, model=None, ddpm=None, device="cpu"):
        self.config = config
        self.device = device
        self.ddpm = DDPM(linear_beta(config.timesteps)) if ddpm is None else ddpm
        if model is None:
            with torch.random.fork_rng(devices=[]):  # leaves the random state of the caller alone
                torch.default_generator.manual_seed(config.seed)
                model = UNet(channels=config.channels, time_conditioning=config.time_conditioning)
            model = model.to(memory_format=torch.channels_last)  # faster
        self.model = model.to(device)
        self.optimizers = new_optimizers(self.model, config)
        self.losses = []

    def train_step(self, images):
        """One step on a random batch of uint8 images (N, C, H, W) (Ho et al. 2020, Algorithm 1).

        InputError, and no step, after the last one or if the loss or a gradient is not finite.
        """
        step = len(self.losses) + 1
        self.set_learning_rate(step)
        self.model.train()
        rng = make_rng("train", self.config.seed, step)  # a resumed run draws the same

        index = torch.randint(len(images), (self.config.batch_size,), generator=rng)
        x_0 = to_pixels(images[index]).to(self.device)
        loss = self.ddpm.loss(self.model, x_0, generator=rng)
        self.model.zero_grad()
        loss.backward()
        self.check_finite(loss, step)
        for optimizer in self.optimizers:
            optimizer.step()
        self.losses.append(loss.item())

    def set_learning_rate(self, step):
        """As PyTorch's schedulers do: each group's initial_lr, times factors from 0 to 1."""
        steps = self.config.steps
        if step > steps:
            raise InputError(f"all {steps} steps are done: train longer with Config(steps=...)")
        warmup = min(1, step / min(100, steps / 10))  # up in 100 steps, or a tenth of a short run
        decay = 1 - (step - 1) / steps  # and down along a straight line, to 1/steps
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                initial_lr = group.setdefault("initial_lr", group["lr"])
                group["lr"] = initial_lr * warmup * decay

    def check_finite(self, loss, step):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not nn.utils.get_total_norm([loss.detach(), *gradients]).isfinite():
            raise InputError(f"the loss or a gradient is not finite at step {step}, which is not "
                             "taken: look for x/0 or the root of 0, or train at a smaller --lr")

    def state_dict(self):
        return {"config": asdict(self.config), "losses": self.losses,
                "ddpm": type(self.ddpm).__name__, "beta": self.ddpm.beta,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        """InputError for a run of another process; PyTorch's own errors for another model."""
        if state["ddpm"] != type(self.ddpm).__name__ or not self.ddpm.beta.equal(state["beta"]):
            raise InputError(f"it needs ddpm=, a {state['ddpm']} with the beta of this run")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.losses = list(state["losses"])


# Evaluation

@torch.no_grad()
def evaluate(model, ddpm, x_0):
    """The loss (8) of each picture of x_0, (N, C, H, W) in [-1, 1], in their order, and its t.

    Returns losses and times, (N,), on the CPU. The times are spread evenly over 1..T; they and the
    noise depend on the shape alone. A module is evaluated in eval mode, and keeps its modes.
    """
    rng = make_rng("test")
    eps = randn_like(x_0, rng)
    times = 1 + torch.arange(len(x_0)) * ddpm.T // len(x_0)
    times = times[torch.randperm(len(x_0), generator=rng)]
    losses = []
    modules = model.modules() if isinstance(model, nn.Module) else ()
    modes = {module: module.training for module in modules}
    try:
        for module in modes:
            module.eval()
        for x, t, noise in zip(x_0.split(100), times.split(100), eps.split(100)):
            error = noise - ddpm.predict_eps(model, ddpm.q_sample(x, t, noise), t)
            losses.append(error.square().flatten(1).mean(1).cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(losses), times


# Files

def time_of_change(path):
    return path.stat().st_mtime_ns if path.exists() else None


def write_file(path, write, *args):
    """path becomes what write(*args, file) writes, whole or not at all; InputError if it can't."""
    content = io.BytesIO()
    write(*args, content)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.getbuffer())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path} can't be written and is unchanged ({error})") from error


def read_file(path):
    """What torch.save wrote there. Nothing in the file is executed. InputError if it is damaged."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): run python train.py, "
                         "or name another") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip():  # compares the checksums, as torch.load does not
                raise ValueError("a checksum is wrong")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make torch.load raise almost anything
        raise InputError(f"{path} is damaged, or no checkpoint: train again, or name another "
                         f"({error!r:.90})") from error


def read_checkpoint(path, checksum=None, ddpm=None, **options):
    """The Trainer of a saved run, its model in eval mode; ddpm and the options are Trainer's.

    InputError if the file is damaged, or of another process, another model or other digits.
    """
    state = read_file(path)
    try:
        config = Config(**state["config"])
        beta = state["beta"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} was not saved by this train.py: train again, or name another "
                         f"({error!r:.90})") from error
    if checksum and state.get("data", checksum) != checksum:
        raise InputError(f"{path} was trained on other digits: name their folder with --data")
    trainer = Trainer(config, ddpm=ddpm or DDPM(beta), **options)
    try:
        trainer.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} does not fit: unet.py or the optimiser is not as it was when the "
                         f"run was saved, or give your own model= and ddpm= ({error!r:.90})"
                         ) from error
    trainer.model.eval()
    return trainer


# Running

def progress(items, task, total, start=0, losses=()):
    """The items; a line every five seconds says how many are done and how long the rest takes."""
    began = last = time.perf_counter()
    for done, item in enumerate(items, start + 1):
        yield item
        now = time.perf_counter()
        if now > last + 5 or done == total:
            last = now
            seconds = (total - done) * (now - began) / (done - start)
            loss = f", loss {np.mean(losses[-20:]):.4f}" if losses else ""
            print(f"{task} {done}/{total}, {seconds:.0f} s left{loss}", flush=True)


def parse_flags():
    """The flags, and a dict of the settings of Config that are among them."""
    parser = argparse.ArgumentParser(description="Train a UNet to predict the noise in digits.")
    setting = parser.add_argument_group(argument_default=argparse.SUPPRESS).add_argument
    setting("--steps", type=int, help=f"gradient steps (default: {Config.steps})")
    setting("--batch-size", type=int, help=f"images in a step (default: {Config.batch_size})")
    setting("--lr", type=float, help=f"highest learning rate (default: {Config.lr})")
    setting("--timesteps", type=int, help=f"T of the process (default: {Config.timesteps})")
    setting("--channels", type=int, nargs="+",
            help=f"widths of the UNet, full resolution first (default: {Config.channels})")
    setting("--time-conditioning", action=argparse.BooleanOptionalAction,
            help=f"give the network the time (default: {Config.time_conditioning})")
    setting("--optimizer",
            help=f"muon (Adam for all but 3x3 kernels) or adam (default: {Config.optimizer})")
    setting("--seed", type=int, help=f"seed of all random numbers (default: {Config.seed})")
    parser.add_argument("--data", type=Path, default=MNIST, help="folder of the four data files")
    parser.add_argument("--out", type=Path, default="out", help="output folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    flags = parser.parse_args()
    given = {name: value for name, value in vars(flags).items() if hasattr(Config, name)}
    if flags.resume and given:
        parser.error("--resume keeps the settings of the run: leave out the others")
    return flags, given


def check_unchanged(path, changed):
    """A run replaces only what it wrote itself, or what was there when it was permitted to."""
    if time_of_change(path) not in (None, changed):
        raise InputError(f"{path} holds a run: --resume or --overwrite it, or change --out")


def main():
    """Train, save the run every SAVE_EVERY steps, and measure the network on the test digits."""
    flags, given = parse_flags()
    path = flags.out / "model.pt"
    changed = time_of_change(path) if flags.resume or flags.overwrite else None
    check_unchanged(path, changed)

    # the data
    images, _, test_images, _ = load_mnist(flags.data)
    checksum = zlib.crc32(images.numpy())

    # the run, from its file or from the start
    if flags.resume:
        trainer = read_checkpoint(path, checksum, device=flags.device)
    else:
        trainer = Trainer(Config(**given), device=flags.device)
    config = trainer.config
    done = len(trainer.losses)
    if any(side % 2 ** (len(config.channels) - 1) for side in images.shape[2:]):
        raise InputError(f"--channels: too many levels for images of {tuple(images.shape[2:])}")
    print(f"{len(images)} digits on {flags.device} to {path}, saved every {SAVE_EVERY} steps")

    # the training: each step draws a batch; the run is saved now and then, and at the end
    steps = range(done + 1, config.steps + 1)
    for step in progress(steps, "training: step", config.steps, done, trainer.losses):
        trainer.train_step(images)
        if step % SAVE_EVERY == 0 or step == config.steps:
            check_unchanged(path, changed)
            write_file(path, torch.save, trainer.state_dict() | {"data": checksum})
            changed = time_of_change(path)

    # the evaluation, on digits that it was not trained on
    x_0 = to_pixels(test_images).to(flags.device)
    losses, _ = evaluate(trainer.model, trainer.ddpm, x_0)
    check_unchanged(path, changed)  # two runs may have saved at the same moment
    sem = losses.std() / len(losses) ** 0.5
    print(f"test loss (8): {losses.mean():.4f} +- {sem:.4f} over {len(losses)} digits "
          "(predicting 0: 1)")
    print(f"next: python figures.py --checkpoint {path}")


def run_command(main):
    """Run main(). An error the user can fix ends in one sentence; a bug keeps its traceback."""
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # the latter in `| head`
        sys.exit(130)
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    run_command(main)
