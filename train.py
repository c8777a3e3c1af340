"""Train the network of the sheet (5 and 6): mnist/ comes in, out/model.pt goes out.

    python train.py                train from the start
    python train.py --resume       go on with the run in out/
    torchrun --standalone --nproc_per_node=2 train.py      the same training by two processes
"""
import argparse
import copy
import gzip
import io
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


class InputError(ValueError):
    """What whoever runs the program can mend, said in one sentence."""


def new_parser(description, out):
    """A parser of the command line that complains in one line, and knows --data and --out."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (see --help)\n")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "mnist", metavar="DIR",
                        help="folder with the four files of MNIST, or of others like it")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR",
                        help=f"folder that is written (default: {out})")
    return parser


def parse_flags():
    parser = new_parser(__doc__, "out")
    for name, (default, _, _, meaning) in SETTINGS.items():
        kind = {"type": int, "nargs": "+"} if name == "channels" else {"type": type(default)}
        parser.add_argument("--" + name.replace("_", "-"), **kind, metavar="N", help=meaning)
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: cuda, else cpu")
    parser.add_argument("--save-every", type=int, default=500, metavar="N",
                        help="steps from one save to the next (default: 500)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", action="store_true", help="go on with the run in --out")
    action.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    return parser.parse_args()


def choose_settings(flags, state=None):
    """The settings of a new run, from the flags and the table; or those of the saved run."""
    asked = {name: getattr(flags, name) for name in SETTINGS if getattr(flags, name) is not None}
    begun = state["settings"] if state else {name: row[0] for name, row in SETTINGS.items()}
    if state and begun | asked != begun:
        raise InputError("--resume goes on to the end that the run was begun for, where its rate "
                         "is 0: leave out other settings, or begin a new run with another --out")
    return begun | asked


def check_settings(settings, sides=(), world=1):
    """Raise InputError if they are out of range (as NaN is), or fit no pictures of these sides."""
    for name, (_, low, high, _) in SETTINGS.items():
        if not all(low <= value <= high for value in np.ravel(settings[name])):
            raise InputError(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, "
                             f"got {settings[name]}")
    if any(width % 4 for width in settings["channels"]):
        raise InputError(f"--channels must be multiples of 4, got {settings['channels']}")
    halvings = len(settings["channels"]) - 1
    if any(side % 2**halvings for side in sides):
        raise InputError(f"--channels: {tuple(sides)} can't be halved {halvings} times, give fewer")
    if settings["batch_size"] % world:
        raise InputError(f"--batch-size must be a multiple of the {world} processes")


def pick_device(name=None):
    """The torch.device called name, or cuda if it is there, or cpu; a GPU for each process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError):  # a torch without CUDA asserts
        raise InputError(f"this machine or this torch has no {name}: try --device cpu") from None


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
        raise InputError(f"{path} is no IDX file ({error}): --data needs the four files of MNIST")


def load_mnist(folder):
    """Train images (N, 1, H, W) uint8, train labels (N,), test images, test labels."""
    data = []
    for split in "train", "t10k":
        images = read_idx(Path(folder, f"{split}-images-idx3-ubyte.gz"), 3)[:, None]
        labels = read_idx(Path(folder, f"{split}-labels-idx1-ubyte.gz"), 1).long()
        data += [images, labels]
        if len(images) != len(labels) or images.shape[1:] != data[0].shape[1:]:
            raise InputError(f"{folder} needs one label for each image, and images of one size")
    return data


def to_pixels(images):
    """uint8 0..255 to float -1..1."""
    return images.float().div_(127.5).sub_(1)


def generator(*key):
    """Random numbers that depend on the key alone: (seed, k, r) in step k ≥ 1 of process r."""
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


def read_checkpoint(path, checksum=None):
    """What train() saved, as a dict, with its "ddpm", and its average as a "network" in eval mode.

    Nothing in the file is executed, and its checksums are compared, which torch.load leaves out.
    Raises InputError if it is no whole checkpoint, of another unet.py, or of other digits.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_settings(state["settings"])
        _, network, *_ = begin(state["settings"], "cpu", state)
        finite = all(weights.isfinite().all() for weights in network.parameters())
        if damaged or not finite or "data" not in state:
            raise ValueError("damaged")
    except Exception as error:  # damaged bytes can make torch.load raise almost anything
        raise InputError(f"{path} is no whole checkpoint of train.py and unet.py as they are here "
                         f"({type(error).__name__}): name another, or train") from None
    if checksum is not None and state["data"] != checksum:
        raise InputError(f"{path} was trained on other digits: name their folder with --data")
    ddpm = DDPM(linear_beta(state["settings"]["timesteps"]))
    return state | {"ddpm": ddpm, "network": network.eval()}


# Optimisers

class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the mean gradient (Jordan et al. 2024).

    A kernel, as a matrix (out, in x 3 x 3), so learns in all its directions at one speed. The size
    0.2 √max(shape) makes a step as large as AdamW's (Liu et al. 2025): one rate serves both.
    """

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
    return [Muon([{"params": kernels}], {"lr": lr}), adamw]


def learning_rate(settings, step):
    """Up on a straight line for 100 steps, or a tenth of the run, and down to 0 on another."""
    up = min(1, step / min(100, settings["steps"] / 10))
    down = 1 - (step - 1) / settings["steps"]
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

def progress(items, task, total, before=0, losses=None):
    """The items, one by one, with a live line: how far it is, how fast, how long it will take.

    total: their number, with those done before; losses: of each, to show the mean of the last 20.
    A terminal has the line in place, twice a second; a file gets one every five seconds.
    """
    pause = 0.5 if sys.stdout.isatty() else 5
    start = last = time.perf_counter()
    for done, item in enumerate(items, start=before + 1):
        yield item
        now, left = time.perf_counter(), total - done
        if now > last + pause or left == 0:
            last, speed = now, (done - before) / (now - start)
            loss = "" if losses is None else f", loss {losses[:done][-20:].mean():.4f}"
            line = f"{task} {done}/{total}, {speed:.4g}/s, {left / speed:.0f} s left{loss}"
            print(f"{line:79.79}", end="\r" if pause < 1 and left else "\n", flush=True)


def begin(settings, device, state=None):
    """(model, average, optimizers, losses, done): fresh, or as the saved state has them."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left alone
        torch.manual_seed(settings["seed"])
        model = UNet(channels=settings["channels"], told_t=settings["told_t"])
    model.to(device, memory_format=torch.channels_last)
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


def train(settings, images, device, state=None, rank=0, world=1):
    """Train on images, (N, 1, H, W) uint8; yields after each step what begin() gave before it.

    Process `rank` of `world` takes its part of each batch. Raises InputError when the gradient is
    no longer finite.
    """
    ddpm, steps = DDPM(linear_beta(settings["timesteps"])), settings["steps"]
    model, average, optimizers, losses, done = begin(settings, device, state)
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    for step in progress(range(done + 1, steps + 1), "training: step", steps, done, losses):
        random = generator(settings["seed"], step, rank)  # a resumed run draws the same
        chosen = torch.randint(len(images), (settings["batch_size"] // world,), generator=random)

        x_0 = to_pixels(images[chosen]).to(device)
        loss = ddpm.loss(network, x_0, random)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step(optimizers, learning_rate(settings, step))
        update_average(average, model, step, steps)

        if not norm.isfinite():
            raise InputError(f"the gradient stopped being finite at step {step}: try a smaller "
                             "--lr; the last checkpoint is as it was")
        losses[step - 1] = loss.detach()
        yield model, average, optimizers, losses, step


def test_losses(model, ddpm, x_0):
    """The loss (8) of each of the digits x_0, (N,): t = 1..T in turn, and always the same noise."""
    t = 1 + torch.arange(len(x_0)) % ddpm.T
    noise = torch.randn(x_0.shape, generator=generator(0))
    batches = list(zip(x_0.split(100), t.split(100), noise.split(100)))
    losses = []
    for x, t, eps in progress(batches, "test loss: batch", len(batches)):
        error = model(ddpm.q_sample(x, t, eps), t) - eps
        losses.append(error.square().flatten(1).mean(1))
    return torch.cat(losses)


def mean_and_error(values):
    """The mean of independent numbers, and its standard error, (0 if there is but one)."""
    error = values.var(correction=0) / max(1, len(values) - 1)
    return values.mean().item(), error.sqrt().item()


def report(path, data):
    """Print what the network is worth, beside the best linear denoiser and saying nothing."""
    run, train_x, test_x = read_checkpoint(path), to_pixels(data[0]), to_pixels(data[2])
    linear = GaussianEps(run["ddpm"], train_x.mean(0), train_x.flatten(1).T.cov())
    loss, error = mean_and_error(test_losses(run["network"], run["ddpm"], test_x))
    linear_loss = test_losses(linear, run["ddpm"], test_x).mean()
    print(f"test loss (8): {loss:.4f} +- {error:.4f} over {len(test_x)} test digits")
    print(f"to compare: {linear_loss:.4f} for the best linear denoiser, 1 for always saying 0")
    print(f"next: python figures.py --checkpoint {path}")


def save_run(run, path, made_from, save_every, stop, rank=0):
    """Write each save_every-th state of train() to path, and the last; once stop() is true, end.

    made_from: its "settings" and a checksum of its "data"; only the process of rank 0 writes.
    Raises InputError if another run has written path, and KeyboardInterrupt to end.
    """
    def written():
        return path.stat().st_mtime_ns if path.exists() else None

    last = written()
    for model, average, optimizers, losses, step in run:
        stopped = stop()
        due = stopped or step % save_every == 0 or step == made_from["settings"]["steps"]
        if due and rank == 0:
            if written() != last:
                raise InputError(f"{path} was written by another run: give each its own --out")
            state = {"step": step, "losses": losses,
                     "model": model.state_dict(), "average": average.state_dict(),
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            write_file(path, lambda file: torch.save(made_from | state, file))
            last = written()
        if stopped:
            raise KeyboardInterrupt(f"after step {step}, which is saved: --resume goes on")


def main():
    flags = parse_flags()
    if flags.save_every < 1:
        raise InputError(f"--save-every must be at least 1, got {flags.save_every}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, path = pick_device(flags.device), flags.out / "model.pt"
    data = load_mnist(flags.data)
    checksum = zlib.crc32(data[0].numpy())
    state = read_checkpoint(path, checksum) if flags.resume else None
    settings = choose_settings(flags, state)
    if path.exists() and not (flags.resume or flags.overwrite):
        raise InputError(f"{path} holds a run: add --resume to go on with it, --overwrite to "
                         "replace it, or take another --out")
    check_settings(settings, data[0].shape[2:], world)
    made_from = {"settings": settings, "data": checksum}
    flags.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=flags.out).close()  # better to fail now than at the first save
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank:  # the first process writes and speaks for all
        sys.stdout = open(os.devnull, "w")
    print(f"{len(data[0])} digits of {data[0][0].numel()} pixels, T = {settings['timesteps']}, "
          f"{settings['steps']} steps of {settings['batch_size']} digits")
    print(f"on {device} with {torch.get_num_threads()} threads; the network is written to {path}")
    run = train(settings, data[0], device, state, rank, world)
    pressed = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: pressed.set())  # Ctrl-C: a step can end and be saved
    try:
        save_run(run, path, made_from, flags.save_every, pressed.is_set, rank)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if world > 1:
        distributed.destroy_process_group()
    if rank == 0:
        report(path, data)


def run_command(main):
    """main(), ended by one sentence where the user can mend it; a bug keeps its traceback."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages from Linux: 10 % faster
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
