"""Train the network of the sheet (5 and 6): reads mnist/, writes out/model.pt.

    python train.py                train from the start
    python train.py --resume       continue the run in out/
    torchrun --standalone --nproc_per_node=2 train.py --device cpu      share each batch by two
"""
import argparse
import atexit
import copy
import gzip
import io
import os
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
from torch import distributed

from ddpm import DDPM, linear_beta, randn_like
from unet import ResidualBlock, UNet

MNIST = Path(__file__).parent / "mnist"
SAVE_EVERY = 100  # steps, about 10 s: the most that Ctrl-C or a crash can lose


class InputError(ValueError):
    """An error that the user can fix. Its message is one sentence."""


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each is a flag of the command line, and a checkpoint holds them."""

    steps: Annotated[int, "gradient steps"] = 2000
    batch_size: Annotated[int, "images in a step, of all processes together"] = 32
    lr: Annotated[float, "highest learning rate"] = 1e-2
    timesteps: Annotated[int, "T, the steps of the forward process"] = 200
    channels: Annotated[tuple, "widths of the UNet, full resolution first"] = (16, 32, 64)
    time_conditioning: Annotated[bool, "give the network the time"] = True
    optimizer: Annotated[str, "of the 3x3 kernels: muon or adam; Adam for the rest"] = "muon"
    seed: Annotated[int, "seed of all random numbers"] = 0

    def __post_init__(self):
        for name, low, high in (("steps", 1, 10**8), ("batch_size", 1, 10**5), ("lr", 1e-8, 1),
                                ("timesteps", 1, 5000), ("seed", 0, 2**32 - 1)):
            value, kind = getattr(self, name), type(getattr(Config, name))
            if kind(value) != value or not low <= value <= high:  # NaN is not itself
                raise InputError(f"{name} must be {kind.__name__}, {low} to {high}, got {value}")
            object.__setattr__(self, name, kind(value))  # numpy's numbers are welcome
        object.__setattr__(self, "channels", tuple(map(int, self.channels)))  # and lists
        if not self.channels or any(width not in range(4, 4097, 4) for width in self.channels):
            raise InputError(f"channels must be multiples of 4 up to 4096, got {self.channels}")
        if self.optimizer not in ("muon", "adam"):
            raise InputError(f"optimizer must be muon or adam, got {self.optimizer}")


def read_idx(path, dims):
    """The bytes in a gzipped IDX file as a uint8 tensor of that many dimensions."""
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
        magic, *shape = np.frombuffer(content, ">u4", 1 + dims).tolist()
        if magic != 0x800 + dims:
            raise ValueError(f"not of bytes in {dims} dimensions")
        return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not an IDX file of grey pictures or labels ({error}): "
                         "--data needs four files like MNIST's") from error


def load_mnist(folder):
    """Training images (N, 1, H, W) uint8, their labels (N,), test images, their labels."""
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    images, labels, test_images, test_labels = (
        read_idx(Path(folder, f"{name}-ubyte.gz"), int(name[-1])) for name in names)
    if len(images) != len(labels) or len(test_images) != len(test_labels) or len(test_labels) < 2:
        raise InputError(f"{folder} needs one label for each image, and two test images or more")
    if images.shape[1:] != test_images.shape[1:]:
        raise InputError(f"{folder} needs training and test images of one size")
    return images[:, None], labels.long(), test_images[:, None], test_labels.long()


def to_pixels(images):
    """Numbers from 0 to 255 as new floats from -1 to 1."""
    return images / 127.5 - 1


def make_rng(stream, *key):
    """A generator for one use, seeded by its stream and key alone."""
    number = ("figures", "test", "classifier", "train").index(stream)
    seed = np.random.SeedSequence([number, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed[0]))


# Optimisers

class Muon(torch.optim.Optimizer):
    """Steps along the momentum, approximately orthogonalised (Jordan et al. 2024).

    torch.optim.Muon takes matrices only, and rounds to bfloat16, which a CPU with AVX2 emulates.
    """

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for kernel in group["params"]:
            momentum = self.state[kernel].setdefault("momentum", torch.zeros_like(kernel))
            momentum.lerp_(kernel.grad, 0.1)
            nesterov = kernel.grad.lerp(momentum, 0.9)
            update = newton_schulz(nesterov.flatten(1))  # the matrix (out, in x 3 x 3)
            size = 0.2 * max(update.shape) ** 0.5  # as large as a step of Adam (Liu et al. 2025)
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
    kernels = [conv.weight for block in model.modules() if isinstance(block, ResidualBlock)
               for conv in (block.conv1, block.conv2) if conv.weight.requires_grad]
    if config.optimizer == "adam" or not kernels:
        return [torch.optim.Adam(model.parameters(), config.lr, fused=True)]
    rest = [parameter for parameter in model.parameters() if parameter not in set(kernels)]
    return [Muon(kernels, {"lr": config.lr}), torch.optim.Adam(rest, config.lr, fused=True)]


def learning_rate(config, step):
    """Linear warm-up in 100 steps, or a tenth of the run if that is less, and linear decay to 0."""
    warmup = min(1, step / min(100, config.steps / 10))
    decay = max(0, 1 - (step - 1) / config.steps)
    return config.lr * warmup * decay


# Training

class Trainer:
    """A run: the model, its optimisers and its losses so far, as a checkpoint saves them.

    By default, model is the UNet of the config and ddpm the process of linear_beta. Any nn.Module
    model(x_t, t) will do; Adam trains it. world processes share a batch, this one is number rank.
    """

    def __init__(self, config, model=None, ddpm=None, device="cpu", rank=0, world=1):
        self.config, self.device, self.rank, self.world = config, device, rank, world
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
        """One step on a random batch of uint8 images (N, C, H, W) (Ho et al. 2020, Algorithm 1)."""
        step, size = len(self.losses) + 1, self.config.batch_size // self.world
        rng = make_rng("train", self.config.seed, step, self.rank)  # a resumed run draws the same
        index = torch.randint(len(images), (size,), generator=rng)
        x_0 = to_pixels(images[index]).to(self.device)
        loss = self.ddpm.loss(self.model, x_0, generator=rng)
        self.model.zero_grad()
        loss.backward()
        self.average_over_processes(loss)
        self.check_finite(loss, step)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(self.config, step)
            optimizer.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def average_over_processes(self, loss):
        """Average the loss and all gradients, in one message: 1.6 times as fast as in many."""
        if self.world > 1:
            tensors = [loss, *(p.grad for p in self.model.parameters() if p.grad is not None)]
            mean = torch.cat([tensor.flatten() for tensor in tensors]) / self.world
            distributed.all_reduce(mean)
            for tensor, part in zip(tensors, mean.split([each.numel() for each in tensors])):
                tensor.copy_(part.view_as(tensor))

    def check_finite(self, loss, step):
        if not loss.isfinite():
            raise InputError(f"the loss is not finite at step {step}: try a smaller --lr")

    def state_dict(self):
        return {"config": asdict(self.config), "beta": self.ddpm.beta, "losses": self.losses,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        DDPM.__init__(self.ddpm, state["beta"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.losses = list(state["losses"])


# Evaluation and files

def progress(items, task, total, start=0, losses=()):
    """The items; a line every five seconds says how many are done and how long the rest takes."""
    began = last = time.perf_counter()
    for done, item in enumerate(items, start + 1):
        yield item
        now, left = time.perf_counter(), total - done
        if now > last + 5 or left == 0:
            last, speed = now, (done - start) / (now - began)
            loss = f", loss {np.mean(losses[-20:]):.4f}" if losses else ""
            print(f"{task} {done}/{total}, {left / speed:.0f} s left{loss}", flush=True)


@torch.no_grad()
def evaluate(model, ddpm, x_0):
    """The loss (8) of each picture of x_0, (N, C, H, W) in [-1, 1], in their order, and its t.

    Returns losses and times, (N,), on the CPU. The times are spread evenly over 1..T; they and the
    noise depend on the shape alone. A module is evaluated in eval mode, on its own device.
    """
    if isinstance(model, torch.nn.Module):
        model = copy.deepcopy(model).eval()  # the caller's keeps its mode
        x_0 = x_0.to(next(model.parameters(), x_0).device)
    rng = make_rng("test")
    eps = randn_like(x_0, rng)
    times = 1 + torch.arange(len(x_0)) * ddpm.T // len(x_0)
    times = times[torch.randperm(len(x_0), generator=rng)]
    losses = []
    for x, t, noise in zip(x_0.split(100), times.split(100), eps.split(100)):
        error = noise - ddpm.predict_eps(model, ddpm.q_sample(x, t, noise), t)
        losses.append(error.square().flatten(1).mean(1).cpu())
    return torch.cat(losses), times


def write_file(path, write):
    """What write(file) writes goes beside path and is renamed: path is the old file or the new."""
    content, beside = io.BytesIO(), path.with_name(f"{path.name}.tmp")
    write(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.getbuffer())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path} can't be written and is unchanged ({error})") from error


def read_checkpoint(path, checksum=None, **options):
    """The Trainer of a saved run, with its model and ddpm; the options are those of Trainer.

    Nothing in the file is executed. InputError if it is damaged, of another model or other digits.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} is not there: run python train.py first, or name another")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # compares the checksums, as torch.load does not
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, _ = Config(**state["config"]), DDPM(state["beta"])  # raise if they are wrong
    except Exception as error:  # damaged bytes can make torch.load raise almost anything
        raise InputError(f"{path} is damaged or not of this train.py: train again") from error
    if checksum is not None and state.get("data", checksum) != checksum:
        raise InputError(f"{path} was trained on other digits: name their folder with --data")
    trainer = Trainer(config, **options)
    try:
        trainer.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not of the UNet of unet.py: in Python, give read_checkpoint "
                         "your model=, or use torch.load and load_state_dict") from error
    return trainer


# Command line

def parse_flags():
    """The flags, and a dict of the settings of Config that are among them."""
    parser = argparse.ArgumentParser(description="Train a UNet to predict the noise in digits.")
    settings = Config.__annotations__
    options = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": int, "nargs": "+"}}
    for name, annotation in settings.items():
        kind, meaning = get_args(annotation)
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                            **options.get(kind, {"type": kind}),
                            help=f"{meaning} (default: {getattr(Config, name)})")
    parser.add_argument("--data", type=Path, default=MNIST, help="folder of the four data files")
    parser.add_argument("--out", type=Path, default=Path("out"), help="output folder")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", action="store_true", help="continue the run in --out")
    action.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    flags = parser.parse_args()
    given = {name: value for name, value in vars(flags).items() if name in settings}
    if flags.resume and given:
        parser.error("--resume keeps the settings of the run: leave out the others")
    return flags, given


def main():
    """Train, save the run every SAVE_EVERY steps, and measure the model on the test digits."""
    flags, given = parse_flags()
    path, replaceable = flags.out / "model.pt", flags.resume or flags.overwrite

    def check_free():
        if path.exists() and not replaceable:
            raise InputError(f"{path} holds a run: --resume or --overwrite it, or change --out")

    check_free()
    rank, world = 0, 1
    if distributed.is_available() and distributed.is_torchelastic_launched():
        distributed.init_process_group()
        atexit.register(distributed.destroy_process_group)  # its threads must not outlive Python
        rank, world = distributed.get_rank(), distributed.get_world_size()
    images, _, test_images, _ = load_mnist(flags.data)
    checksum = zlib.crc32(images.numpy())
    if flags.resume:
        trainer = read_checkpoint(path, checksum, device=flags.device, rank=rank, world=world)
    else:
        trainer = Trainer(Config(**given), device=flags.device, rank=rank, world=world)
    config, done = trainer.config, len(trainer.losses)
    if any(side % 2 ** (len(config.channels) - 1) for side in images.shape[2:]):
        raise InputError(f"--channels: too many levels for images of {tuple(images.shape[2:])}")
    if config.batch_size % world:
        raise InputError(f"{world} processes can't share a batch of {config.batch_size} equally")

    steps = range(done + 1, config.steps + 1)
    if rank == 0:  # the first process writes and speaks for all
        print(f"{len(images)} digits on {flags.device} to {path}, saved every {SAVE_EVERY} steps")
        steps = progress(steps, "training: step", config.steps, done, trainer.losses)
    for step in steps:
        trainer.train_step(images)
        if rank == 0 and (step % SAVE_EVERY == 0 or step == config.steps):
            check_free()  # another run may have begun here after this one
            write_file(path, partial(torch.save, trainer.state_dict() | {"data": checksum}))
            replaceable = True
    if rank == 0:
        losses, _ = evaluate(trainer.model, trainer.ddpm, to_pixels(test_images))
        mean, sem = losses.mean(), losses.std() / len(losses) ** 0.5
        print(f"test loss (8): {mean:.4f} +- {sem:.4f} over {len(losses)} digits (predicting 0: 1)")
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
