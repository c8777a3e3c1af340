"""Train the network of the sheet (5 and 6): reads mnist/, writes out/model.pt.

    python train.py                train from the start
    python train.py --resume       continue the run in out/
    torchrun --standalone --nproc_per_node=2 train.py      the same training with two processes
"""
import argparse
import gzip
import io
import os
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from ddpm import DDPM, linear_beta
from unet import ResidualBlock, UNet

SAVE_EVERY = 100  # steps, about 15 s: the most that Ctrl-C or a crash can lose


class InputError(ValueError):
    """An error that the user can fix. Its message is one sentence."""


# Config

def setting(default, meaning, expected, fits):
    """A field of Config: its default, a line of help, the allowed values and their check."""
    return field(default=default, metadata={"help": meaning, "expected": expected, "fits": fits})


def number(default, low, high, meaning):
    """A field of Config that is a number from low to high."""
    return setting(default, meaning, f"from {low} to {high} ({type(default).__name__})",
                   lambda value: low <= value <= high)


@dataclass(frozen=True)
class Config:
    """The settings of a run. The command line is made from them, and a checkpoint holds them."""

    steps: int = number(2000, 1, 10**8, "gradient steps")
    batch_size: int = number(32, 1, 10**5, "pictures in a step, in all processes together")
    lr: float = number(1e-2, 1e-8, 1.0, "highest learning rate")
    timesteps: int = number(200, 1, 5000, "T, the steps of the forward process")
    channels: tuple = setting(
        (16, 32, 64), "widths of the UNet, full resolution first", "multiples of 4 to 4096 (tuple)",
        lambda widths: widths and all(width in range(4, 4097, 4) for width in widths))
    time_conditioning: bool = setting(True, "give the network the time", "a bool", lambda _: True)
    optimizer: str = setting("muon", "for the 3x3 kernels; Adam trains the rest", "muon or adam",
                             lambda name: name in ("muon", "adam"))
    seed: int = number(0, 0, 2**32 - 1, "seed of all random numbers")

    def __post_init__(self):
        """Raise InputError if a value has the wrong type or is out of range, as NaN is."""
        for row in fields(self):
            value, flag = getattr(self, row.name), "--" + row.name.replace("_", "-")
            if type(value) is not row.type or not row.metadata["fits"](value):
                raise InputError(f"{flag} must be {row.metadata['expected']}, got {value!r}")


# Data

def read_idx(path, dims):
    """The bytes in a gzipped IDX file as a uint8 tensor of that many dimensions."""
    try:
        content = bytearray(gzip.decompress(path.read_bytes()))
        magic, *shape = np.frombuffer(content, ">u4", 1 + dims).tolist()
        if magic != 0x800 + dims:
            raise ValueError(f"not of bytes in {dims} dimensions")
        return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not an IDX file ({error}): "
                         "--data needs four files like MNIST's") from error


def load_mnist(folder):
    """Training images (N, 1, H, W) uint8, training labels (N,), test images, test labels."""
    data = []
    for split in "train", "t10k":
        images = read_idx(Path(folder, f"{split}-images-idx3-ubyte.gz"), 3)[:, None]
        labels = read_idx(Path(folder, f"{split}-labels-idx1-ubyte.gz"), 1).long()
        data += [images, labels]
        if len(images) != len(labels) or images.shape[1:] != data[0].shape[1:]:
            raise InputError(f"{folder} needs one label for each image, and images of one size")
    if len(data[2]) < 2:
        raise InputError(f"{folder} needs two test images or more, to give a standard error")
    return data


def to_pixels(images):
    """Numbers from 0 to 255 as new floats from -1 to 1."""
    return images / 127.5 - 1


def generator(*key):
    """Random numbers that depend on the key alone; keys of different length differ too."""
    seed = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed[0]))


# Optimisers

class Muon(torch.optim.Optimizer):
    """Steps along the momentum, approximately orthogonalised (Jordan et al. 2024)."""

    def __init__(self, kernels, lr):
        super().__init__(kernels, {"lr": lr})
        for kernel in kernels:
            self.state[kernel]["momentum_buffer"] = torch.zeros_like(kernel)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for kernel in group["params"]:
            momentum = self.state[kernel]["momentum_buffer"].lerp_(kernel.grad, 0.1)
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
    """Muon for the 3x3 kernels of the residual blocks, Adam for the rest; or Adam for all."""
    if config.optimizer == "adam":
        return [torch.optim.Adam(model.parameters(), config.lr, fused=True)]
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    kernels = [conv.weight for block in blocks for conv in (block.conv1, block.conv2)]
    in_blocks = set(kernels)
    rest = [parameter for parameter in model.parameters() if parameter not in in_blocks]
    return [Muon(kernels, config.lr), torch.optim.Adam(rest, config.lr, fused=True)]


def learning_rate(config, step):
    """Linear warm-up in 100 steps, or a tenth of the run if that is less, and linear decay to 0."""
    warmup = min(1, step / min(100, config.steps / 10))
    decay = 1 - (step - 1) / config.steps
    return config.lr * warmup * decay


# Training

def new_model(config):
    """The UNet of a run before its first step. The caller's random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return UNet(channels=config.channels, time_conditioning=config.time_conditioning)


class Trainer:
    """What a training step changes and a checkpoint saves: model, optimisers, losses so far."""

    def __init__(self, config, device="cpu", rank=0, world=1):
        self.config, self.device = config, device
        self.rank, self.world = rank, world  # this process, and how many share each batch
        self.ddpm = DDPM(linear_beta(config.timesteps))
        self.model = new_model(config).to(device, memory_format=torch.channels_last)  # faster
        self.optimizers = new_optimizers(self.model, config)
        self.losses = []

    @property
    def step(self):
        return len(self.losses)

    def train_step(self, images):
        """A step on a random batch of images, (N, 1, H, W) uint8 (Ho et al. 2020, Algorithm 1)."""
        step, batch_size = self.step + 1, self.config.batch_size // self.world
        rng = generator(self.config.seed, step, self.rank)  # a resumed run draws the same
        index = torch.randint(len(images), (batch_size,), generator=rng)

        x_0 = to_pixels(images[index]).to(self.device)
        loss = self.ddpm.loss(self.model, x_0, rng)
        self.model.zero_grad()
        loss.backward()
        self.losses.append(self.average(loss.detach()))
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(self.config, step)
            optimizer.step()

    def average(self, loss):
        """Average the gradients and the loss over the processes; InputError if not finite."""
        if self.world > 1:
            tensors = [loss, *(parameter.grad for parameter in self.model.parameters())]
            sizes = [tensor.numel() for tensor in tensors]
            mean = torch.cat([tensor.flatten() for tensor in tensors]) / self.world
            distributed.all_reduce(mean)  # all in one message: a step is 1.6 times as fast
            for tensor, part in zip(tensors, mean.split(sizes), strict=True):
                tensor.copy_(part.view_as(tensor))
        if not loss.isfinite():
            raise InputError(f"the loss is not finite at step {self.step + 1}: try a smaller --lr")
        return loss.item()

    def state_dict(self):
        return {"config": asdict(self.config), "losses": self.losses,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state):
        self.losses = list(state["losses"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


# Evaluation

def say(text, end="\n"):
    """Print and flush. A run continues when the pipe is closed, as by `| head -3`."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = None


def progress(items, task, total, start=0, losses=()):
    """The items, with a live line: how many are done, how fast, how long the rest will take."""
    in_place = sys.stdout is not None and sys.stdout.isatty()  # or a line in a file, less often
    began = last = time.perf_counter()
    for done, item in enumerate(items, start + 1):
        yield item
        now, left = time.perf_counter(), total - done
        if now > last + (0.5 if in_place else 5) or left == 0:
            last, speed = now, (done - start) / (now - began)
            loss = f", loss {np.mean(losses[-20:]):.4f}" if losses else ""
            line = f"{task} {done}/{total}, {speed:.4g}/s, {left / speed:.0f} s left{loss}"
            say(f"{line:79.79}", end="\r" if in_place and left else "\n")


def batched(function, *tensors, task=None):
    """function(*tensors), a hundred samples at a time, as one tensor; a task shows progress."""
    chunks = list(zip(*(tensor.split(100) for tensor in tensors), strict=True))
    if task:
        chunks = progress(chunks, task, len(chunks))
    return torch.cat([function(*chunk) for chunk in chunks])


def even_times(n, T):
    """n times spread evenly over 1..T: 1, 2, ..., T repeated, the remainder in equal strides."""
    left = n % T
    strides = ((torch.arange(left) + 0.5) * T / left).long()
    return 1 + torch.cat([torch.arange(n - left) % T, strides])


@torch.no_grad()
def evaluate(model, ddpm, x_0):
    """The loss (8) of each picture of x_0, (N,), at even_times, with fixed noise."""
    def loss(x, t, eps):
        return (eps - model(ddpm.q_sample(x, t, eps), t)).square().flatten(1).mean(1)

    eps = torch.randn(x_0.shape, generator=generator(0))
    return batched(loss, x_0, even_times(len(x_0), ddpm.T), eps, task="test loss: batch")


def mean_and_sem(values):
    """The mean of two or more independent numbers, and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


# Checkpoints

def write_file(path, content):
    """Write to a temporary file, then rename: path is the old file or the new one, complete."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:
        raise InputError(f"{path} can't be written and is unchanged ({error})") from error
    finally:
        tmp.unlink(missing_ok=True)


def read_checkpoint(path, checksum=None):
    """A saved run: the state_dict of a Trainer, its "config" a Config, with "network" and "ddpm".

    Nothing in the file is executed. InputError if it is damaged, of another UNet or other digits.
    """
    if not os.path.exists(path):
        raise InputError(f"{path} is not there: run python train.py first, or name another")
    refused = InputError(f"{path} is damaged or not a checkpoint of this train.py and unet.py: "
                         "name another, or train")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares the checksums, as torch.load does not
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = Config(**state["config"]), state["model"]
        shapes = {name: weight.shape for name, weight in weights.items()}
        finite = all(weight.isfinite().all() for weight in weights.values())
        state["losses"], state["optimizers"], state["data"]  # a KeyError if one is not there
    except Exception as error:  # damaged bytes can make torch.load raise almost anything
        raise refused from error
    network, ddpm = new_model(config).eval(), DDPM(linear_beta(config.timesteps))
    fits = shapes == {name: weight.shape for name, weight in network.state_dict().items()}
    if damaged or not finite or not fits:
        raise refused
    if checksum not in (None, state["data"]):
        raise InputError(f"{path} was trained on other digits: name their folder with --data")
    network.load_state_dict(weights)
    return state | {"config": config, "network": network, "ddpm": ddpm}


# Command line

def new_parser(description, out):
    """A parser of the flags that train.py and figures.py share."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "mnist",
                        metavar="DIR", help="four files like those of MNIST (default: mnist/)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR",
                        help="output folder (default: %(default)s)")
    return parser


def parse_flags():
    """The flags, and a dict of the settings of Config that are among them."""
    parser = new_parser("Train a UNet to predict the noise in digits.", "out")
    options = {bool: {"action": argparse.BooleanOptionalAction},
               tuple: {"type": int, "nargs": "+", "metavar": "N"}}
    for row in fields(Config):
        parser.add_argument("--" + row.name.replace("_", "-"), default=argparse.SUPPRESS,
                            **options.get(row.type, {"type": row.type, "metavar": "VALUE"}),
                            help=f"{row.metadata['help']} (default: {row.default})")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: cuda, else cpu")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", action="store_true", help="continue the run in --out")
    action.add_argument("--overwrite", action="store_true",
                        help="start a new run; its first save keeps the old one as previous.pt")
    flags = parser.parse_args()
    given = [row for row in fields(Config) if row.name in flags]
    return flags, {row.name: row.type(getattr(flags, row.name)) for row in given}


def pick_device(name=None):
    """The torch.device called name, or cuda if it is there, or cpu; a GPU for each process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError) as error:  # raised without CUDA
        raise InputError(f"no {name} on this machine or in this torch: try --device cpu") from error


def main():
    """Train, save the run every SAVE_EVERY steps, and measure the network on the test digits."""
    flags, given = parse_flags()
    config, device, path = Config(**given), pick_device(flags.device), flags.out / "model.pt"
    rank = int(os.environ.get("RANK") or 0)  # set by torchrun, as is WORLD_SIZE
    world = int(os.environ.get("WORLD_SIZE") or 1)
    images, _, test_images, _ = load_mnist(flags.data)
    checksum = zlib.crc32(images.numpy())
    if flags.resume:
        saved = read_checkpoint(path, checksum)
        config = saved["config"]
        if replace(config, **given) != config:
            raise InputError("--resume keeps the settings that the run started with: leave out "
                             "other settings, or choose another --out")
    elif path.exists() and not flags.overwrite:
        raise InputError(f"{path} holds a run: add --resume to continue it, --overwrite to start "
                         "a new one, or choose another --out")
    halvings, sides = len(config.channels) - 1, tuple(images.shape[2:])
    if any(side % 2**halvings for side in sides):
        raise InputError(f"--channels: {sides} can't be halved {halvings} times, give fewer")
    if config.batch_size % world:
        raise InputError(f"--batch-size must be a multiple of the {world} processes")
    flags.out.mkdir(parents=True, exist_ok=True)

    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    trainer = Trainer(config, device, rank, world)
    if flags.resume:
        trainer.load_state_dict(saved)
    saved_step = trainer.step
    steps = range(trainer.step + 1, config.steps + 1)
    if rank == 0:  # the first process writes and speaks for all
        old = ", the old run to previous.pt" if flags.overwrite and path.exists() else ""
        say(f"{len(images)} digits of {images[0].numel()} pixels on {device} to {path}{old}")
        steps = progress(steps, "training: step", config.steps, trainer.step, trainer.losses)
    try:
        for step in steps:
            trainer.train_step(images)
            if rank == 0 and (step % SAVE_EVERY == 0 or step == config.steps):
                if saved_step == 0 and path.exists():
                    write_file(path.with_name("previous.pt"), path.read_bytes())
                buffer = io.BytesIO()
                torch.save(trainer.state_dict() | {"data": checksum}, buffer)
                write_file(path, buffer.getbuffer())
                saved_step = step
        if rank == 0:
            x_0 = to_pixels(test_images)
            mean, sem = mean_and_sem(evaluate(trainer.model.cpu(), trainer.ddpm, x_0))
            say(f"test loss (8): {mean:.4f} +- {sem:.4f} over {len(x_0)} test digits "
                "(predicting 0: 1)")
            say(f"next: python figures.py --checkpoint {path}")
    except KeyboardInterrupt:
        if rank == 0 and saved_step:
            say(f"\nstopped: step {saved_step} is in {path}; --resume continues from there")
        raise
    finally:
        if world > 1:
            distributed.destroy_process_group()  # its threads must not outlive Python


def run_command(main):
    """Run main(). An error the user can fix ends in one sentence; a bug keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a path may have what a pipe can't encode
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    run_command(main)
