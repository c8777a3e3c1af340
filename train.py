"""Train the network of the sheet (5 and 6): mnist/ comes in, out/model.pt goes out.

    python train.py                train from the start
    python train.py --resume       go on with the run in out/
    torchrun --standalone --nproc_per_node=2 train.py      the same training by two processes

What the network is worth is measured and drawn by figures.py.
"""
import argparse
import contextlib
import copy
import gzip
import io
import math
import os
import signal
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the program ends, without a traceback
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages from Linux: 10 % faster
import numpy as np
import torch
from torch import distributed, nn

from ddpm import DDPM, GaussianEps, linear_beta
from unet import UNet

# Settings

SETTINGS = {  # what defines a run and is saved with it: default, lowest, highest, meaning
    "steps": (2000, 1, 10**8, "gradient steps"),
    "batch_size": (32, 1, 10**5, "digits in a step, over all processes"),
    "lr": (1e-2, 1e-8, 1.0, "highest learning rate"),
    "timesteps": (200, 1, 10**5, "T, the steps of the forward process"),
    "channels": ([16, 32, 64], 4, 4096, "widths of the UNet, from full resolution down"),
    "told_t": (1, 0, 1, "is the network told the time? 1: yes, as the sheet asks; 0: no"),
    "muon": (1, 0, 1, "do the 3x3 kernels learn by Muon? 1: yes; 0: no, by AdamW as the rest"),
    "seed": (0, 0, 2**32 - 1, "seed of everything random"),
}
MNIST = Path(__file__).parent / "mnist"


class InputError(ValueError):
    """What whoever runs the program can mend, said in one sentence."""


def new_parser(description):
    """A parser of the command line that complains in one line, and knows the data."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    parser.add_argument("--data", type=Path, default=MNIST, metavar="DIR",
                        help="folder with the four files of MNIST, or of others like it")
    return parser


def parse_flags():
    parser = new_parser(__doc__)
    for name, (default, _, _, meaning) in SETTINGS.items():
        kind = {"type": int, "nargs": "+"} if name == "channels" else {"type": type(default)}
        parser.add_argument("--" + name.replace("_", "-"), **kind, metavar="N", help=meaning)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR",
                        help="folder for model.pt (default: out)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"),
                        help="default: cuda if there is one, else cpu")
    parser.add_argument("--save-every", type=int, default=500, metavar="N",
                        help="steps from one save to the next (default: 500)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", action="store_true", help="go on with the run in --out")
    action.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    flags = parser.parse_args()
    if flags.save_every < 1:
        parser.error(f"--save-every must be at least 1, got {flags.save_every}")
    return flags


def choose_settings(flags, state=None):
    """The settings of a new run, from the flags and the table; or those of the saved run."""
    asked = {name: getattr(flags, name) for name in SETTINGS if getattr(flags, name) is not None}
    settings = state["settings"] if state else {name: row[0] for name, row in SETTINGS.items()}
    if state and settings | asked != settings:
        raise InputError("--resume goes on to the end that the run was begun for, where its rate "
                         "is 0: leave out other settings, or begin a new run with another --out")
    check_settings(settings | asked)
    return settings | asked


def check_settings(settings):
    """Raise InputError if a setting is out of its range; NaN is in none."""
    for name, (_, low, high, _) in SETTINGS.items():
        values = settings[name] if name == "channels" else [settings[name]]
        if not all(low <= value <= high for value in values):
            raise InputError(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, "
                             f"got {settings[name]}")
    if any(width % 4 for width in settings["channels"]):
        raise InputError(f"--channels must be multiples of 4, got {settings['channels']}")


def check_fit(settings, images, world):
    """Raise InputError if the settings don't fit the digits or the number of processes."""
    halvings = len(settings["channels"]) - 1
    if any(side % 2**halvings for side in images.shape[2:]):
        raise InputError(f"pictures of {tuple(images.shape[2:])} pixels can't be halved {halvings} "
                         "times: give fewer --channels")
    if settings["batch_size"] % world:
        raise InputError(f"--batch-size must be a multiple of the {world} processes")


def pick_device(name=None):
    """The torch.device called name, or cuda if it is there, or cpu."""
    gpus = torch.cuda.device_count()
    name = name or ("cuda" if gpus else "cpu")
    there = {"cpu": True, "cuda": gpus > 0, "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise InputError(f"--device {name}: this machine or this torch has none, try --device cpu")
    if name != "cuda":
        return torch.device(name)
    process = int(os.environ.get("LOCAL_RANK", 0))
    if process >= gpus:
        raise InputError(f"each process needs a GPU and here are {gpus}: add --device cpu")
    return torch.device("cuda", process)


# Data

def read_idx(path, dims):
    """The bytes in a gzipped IDX file as a uint8 tensor of that many dimensions."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} can't be read ({error}): --data needs the four files of MNIST")
    start = 4 + 4 * dims
    magic, *shape = (int.from_bytes(content[i:i + 4], "big") for i in range(0, start, 4))
    if magic != 0x800 + dims or len(content) - start != math.prod(shape) or 0 in shape:
        raise InputError(f"{path} is no whole IDX file of bytes in {dims} dimensions")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def load_mnist(folder):
    """Train images (N, 1, H, W) uint8, train labels (N,), test images, test labels.

    Raises InputError if a file is missing, damaged, or does not fit the others.
    """
    data = []
    for split in "train", "t10k":
        data.append(read_idx(Path(folder) / f"{split}-images-idx3-ubyte.gz", 3)[:, None])
        data.append(read_idx(Path(folder) / f"{split}-labels-idx1-ubyte.gz", 1).long())
    train_x, train_y, test_x, test_y = data
    if (len(train_x), len(test_x)) != (len(train_y), len(test_y)):
        raise InputError(f"{folder} needs one label for each image, in both of its splits")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise InputError(f"{folder} needs images of one size in both of its splits")
    return data


def to_pixels(images):
    """uint8 0..255 to float -1..1."""
    return images.float().div_(127.5).sub_(1)


def draw_digits(images, count, random):
    """That many of the images, each drawn uniformly from all of them, as pixels."""
    return to_pixels(images[torch.randint(len(images), (count,), generator=random)])


def generator(*key):
    """A random generator whose numbers depend on the key alone.

    Step k of process r draws from generator(seed, k, r): a resumed run goes on with the numbers it
    would have had. Steps count from 1; what is measured draws from generator(seed, 0, ...).
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


# Checkpoints

def write_file(path, save):
    """Let save(file) write beside path, and rename: path is the old file or the new one, whole."""
    buffer, beside = io.BytesIO(), Path(f"{path}.{os.getpid()}.tmp")
    save(buffer)
    try:
        with open(beside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{path} can't be written ({error.strerror}); what was there is whole")


def version(path):
    """What tells one file at path from the next one; None if there is none."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def read_checkpoint(path):
    """What train() saved, as a dict, and its average of the weights as a "network" in eval mode.

    Nothing in the file is executed, and its checksums are compared, which torch.load leaves out.
    Raises InputError if it is no whole checkpoint, or one of another unet.py.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_settings(state["settings"])
        finite = all(weights.isfinite().all() for weights in state["average"].values())
        if damaged or not finite or not state.keys() >= {"data", "losses", "optimizers", "step"}:
            raise ValueError("damaged")
    except Exception as error:  # damaged bytes can make torch.load raise almost anything
        raise InputError(f"{path} is no whole checkpoint of train.py ({type(error).__name__}): "
                         "name another, or train") from None
    network = new_network(state["settings"])
    try:
        network.load_state_dict(state["average"])
    except RuntimeError:
        raise InputError(f"{path} holds another network than that of unet.py: train anew") from None
    return state | {"network": network.eval().requires_grad_(False)}


def load_checkpoint(path):
    """(model, ddpm): the averaged network of a run, in eval mode, and its process."""
    state = read_checkpoint(path)
    return state["network"], DDPM(linear_beta(state["settings"]["timesteps"]))


# Optimisers

class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the mean gradient (Jordan et al. 2024).

    A kernel, as a matrix (out, in x 3 x 3), so learns in all its directions at one speed. The size
    0.2 √max(shape) makes a step as large as AdamW's (Liu et al. 2025): one rate serves both.
    """

    def __init__(self, kernels, lr):
        super().__init__([{"params": kernels}], {"lr": lr})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for kernel in group["params"]:
            mean = self.state[kernel].setdefault("mean", torch.zeros_like(kernel))
            mean.lerp_(kernel.grad, 0.1)
            ahead = kernel.grad.lerp(mean, 0.9)  # Nesterov's: the mean, a step further
            direction = orthogonal(ahead.flatten(1))
            size = 0.2 * max(direction.shape) ** 0.5
            kernel.sub_(direction.view_as(kernel), alpha=group["lr"] * size)


def orthogonal(matrix):
    """The singular vectors of the matrix, with singular values near 1: three Newton-Schulz steps.

    Each step applies p(s) = 3.4445 s - 4.7750 s³ + 2.0315 s⁵ to all singular values s ≤ 1.
    """
    x = matrix / (matrix.norm() + 1e-7)  # a gradient of 0 stays 0
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def new_optimizers(model, lr, muon=True):
    """Muon for the 3x3 kernels inside; AdamW for the rest, the first and the last kernel too."""
    inside = [p for p in model.parameters() if p.shape[2:] == (3, 3) and min(p.shape[:2]) > 3]
    kernels = inside if muon else []
    others = [p for p in model.parameters() if all(p is not kernel for kernel in kernels)]
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    return [Muon(kernels, lr), adamw]


def learning_rate(settings, step):
    """Up on a straight line for 100 steps, or a tenth of the run, and down to 0 on another."""
    steps = settings["steps"]
    up = min(1, step / min(100, steps / 10))
    down = 1 - (step - 1) / steps
    return settings["lr"] * up * down


def take_step(optimizers, rate):
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def update_average(average, model, step, steps):
    """The mean of the weights over the last tenth of the steps so far, at most steps/30 of them."""
    weight = 1 / max(1, min(step / 10, steps / 30))
    for mean, weights in zip(average.parameters(), model.parameters()):
        mean.lerp_(weights, weight)


# Training

class Progress:
    """A live line: what is being done, how far it is, how fast, and how long it will still take.

    A terminal shows it in place, twice a second; a file or a pipe gets a line every five seconds.
    """

    def __init__(self, task, unit, total, done=0):
        self.task, self.unit, self.total = task, unit, total
        self.first = self.done = done
        self.start = self.last = time.perf_counter()
        self.pause = 0.5 if sys.stdout.isatty() else 5

    def advance(self, steps):
        self.done += steps
        if self.due():
            self.show()

    def due(self):
        return time.perf_counter() > self.last + self.pause

    def show(self, text=""):
        self.last = time.perf_counter()
        speed = (self.done - self.first) / (self.last - self.start)
        left = (self.total - self.done) / speed
        line = (f"{self.task}: {self.done}/{self.total} {self.unit}, {speed:.4g}/s, "
                f"{left:.0f} s left{text}")[:79]
        if self.pause > 1 or self.done == self.total:
            print(line, flush=True)
        else:
            print(f"{line:79}", end="\r", flush=True)


@contextlib.contextmanager
def ctrl_c_waits():
    """Inside, Ctrl-C only sets the event that is yielded, so that a step can end and be saved."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed  # only the main thread may handle signals
        return
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, handler)


def new_network(settings):
    return UNet(channels=settings["channels"], told_t=bool(settings["told_t"]))


def begin(settings, device, state=None):
    """(model, average, optimizers, losses, done): fresh, or as the saved state has them."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left alone
        torch.manual_seed(settings["seed"])
        model = new_network(settings).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = new_optimizers(model, settings["lr"], settings["muon"])
    losses = torch.zeros(settings["steps"], device=device)
    if not state:
        return model, average, optimizers, losses, 0
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return model, average, optimizers, losses.copy_(state["losses"]), state["step"]


def train(settings, images, device, save, state=None, save_every=500, rank=0, world=1):
    """Train from the start, or from a saved state; call save(state) now and then, and at the end.

    images: (N, 1, H, W) uint8. Raises InputError when the gradient is no longer finite, and
    KeyboardInterrupt on Ctrl-C, after a save.
    """
    ddpm, steps = DDPM(linear_beta(settings["timesteps"])), settings["steps"]
    model, average, optimizers, losses, done = begin(settings, device, state)
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    progress = Progress("training", "steps", steps, done)
    with ctrl_c_waits() as ctrl_c:
        for step in range(done + 1, steps + 1):
            random = generator(settings["seed"], step, rank)

            x_0 = draw_digits(images, settings["batch_size"] // world, random).to(device)
            loss = ddpm.loss(network, x_0, random)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            take_step(optimizers, learning_rate(settings, step))
            update_average(average, model, step, steps)

            losses[step - 1] = loss.detach()
            progress.done = step
            saving = step % save_every == 0 or step == steps or ctrl_c.is_set()
            if saving or progress.due():
                check_finite(norm, step)
                progress.show(f", loss {losses[max(0, step - 20):step].mean():.4f}")
            if saving:
                save({"settings": settings, "step": step, "losses": losses,
                      "model": model.state_dict(), "average": average.state_dict(),
                      "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            if ctrl_c.is_set():
                raise KeyboardInterrupt(f"after step {step}, which is saved: --resume goes on")


def check_finite(norm, step):
    if not norm.isfinite():  # and it stays so: a look now and then is enough
        raise InputError(f"the gradient stopped being finite by step {step}: try a smaller --lr; "
                         "the last checkpoint is as it was")


def test_losses(model, ddpm, x_0):
    """The loss (8) of each of the digits x_0, (N,): t = 1..T in turn, and always the same noise."""
    t = 1 + torch.arange(len(x_0)) % ddpm.T
    noise = torch.randn(x_0.shape, generator=generator(0))
    losses, progress = [], Progress("test loss", "digits", len(x_0))
    for x, t, eps in zip(x_0.split(100), t.split(100), noise.split(100)):
        error = model(ddpm.q_sample(x, t, eps), t) - eps
        losses.append(error.square().flatten(1).mean(1))
        progress.advance(len(x))
    return torch.cat(losses)


def mean_and_error(values):
    """The mean of independent numbers, and its standard error, (0 if there is but one)."""
    error = values.var(correction=0) / max(1, len(values) - 1)
    return values.mean().item(), error.sqrt().item()


def report(path, data):
    """Print what the network is worth, beside the best linear denoiser and saying nothing."""
    model, ddpm = load_checkpoint(path)
    train_x, test_x = to_pixels(data[0]), to_pixels(data[2])
    linear = GaussianEps(ddpm, train_x.mean(0), train_x.flatten(1).T.cov())
    loss, error = mean_and_error(test_losses(model, ddpm, test_x))
    linear_loss, _ = mean_and_error(test_losses(linear, ddpm, test_x))
    print(f"test loss (8): {loss:.4f} +- {error:.4f} over {len(test_x)} test digits")
    print(f"to compare: {linear_loss:.4f} for the best linear denoiser, 1 for always saying 0")
    print(f"next: python figures.py --checkpoint {path}")


def careful_save(path, extra):
    """A save(state) for train() that writes path, unless another run has written it meanwhile."""
    seen = [version(path)]

    def save(state):
        if version(path) != seen[-1]:
            raise InputError(f"{path} was written by another run: give each its own --out")
        write_file(path, lambda file: torch.save(state | extra, file))
        seen.append(version(path))
    return save


def main():
    flags = parse_flags()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, path = pick_device(flags.device), flags.out / "model.pt"
    state = read_checkpoint(path) if flags.resume else None
    settings = choose_settings(flags, state)
    if path.exists() and not (flags.resume or flags.overwrite):
        raise InputError(f"{path} holds a run: add --resume to go on with it, --overwrite to "
                         "replace it, or take another --out")
    data = load_mnist(flags.data)
    check_fit(settings, data[0], world)
    fingerprint = zlib.crc32(data[0].numpy())
    if state and state["data"] != fingerprint:
        raise InputError(f"{path} was trained on other digits: name their folder with --data")
    flags.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=flags.out).close()  # better to fail now than at the first save
    save = careful_save(path, {"data": fingerprint})
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank:  # the first process writes and speaks for all
        save, sys.stdout = lambda state: None, open(os.devnull, "w")
    print(f"{len(data[0])} digits of {data[0][0].numel()} pixels, T = {settings['timesteps']}, "
          f"{settings['steps']} steps of {settings['batch_size']} digits")
    print(f"on {device} with {torch.get_num_threads()} threads; the network is written to {path}")
    train(settings, data[0], device, save, state, flags.save_every, rank, world)
    if world > 1:
        distributed.destroy_process_group()
    if rank == 0:
        report(path, data)


def run_command(main):
    """main(), ended by one sentence where the user can mend it; a bug keeps its traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a folder's name may have what a pipe can't say
    try:
        main()
    except KeyboardInterrupt as stop:
        print("\nstopped", *stop.args, file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    run_command(main)
