"""Train the network of the sheet on MNIST and measure how well it removes noise (sheet, 5 and 6).

    python train.py                             train, measure, write out/model.pt and out/metrics.json
    python train.py --resume                    go on with the run in out/
    python train.py --evaluate out/model.pt     measure again, without training
    torchrun --nproc_per_node=2 train.py        the same training by two processes
"""
import argparse, copy, gzip, io, json, math, os, signal, sys, tempfile, time, zipfile, zlib
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch then gets large pages from Linux: 10 % of the time
import numpy as np
import torch
from torch import distributed, nn

from ddpm import DDPM, EmpiricalEps, GaussianEps, linear_beta
from unet import UNet


# Settings
def number(kind, low, high):
    """An argparse type: a number of that kind in [low, high]; NaN is in no range."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {kind.__name__} from {low:g} to {high:g}, got {text!r}")
        return value
    parse.__name__ = kind.__name__
    return parse


SETTINGS = {  # what defines a run, and is saved with it: (type, default, help)
    "steps": (number(int, 1, 10**8), 4000, "gradient steps"),
    "batch_size": (number(int, 1, 10**5), 32, "digits in a step, over all processes"),
    "lr": (number(float, 1e-8, 1), 1e-2, "highest learning rate"),
    "timesteps": (number(int, 1, 10**5), 200, "T, the steps of the forward process"),
    "channels": (number(int, 4, 4096), [16, 32, 64], "widths of the UNet, from full resolution down; multiples of 4"),
    "data": (str, str(Path(__file__).parent / "mnist"), "folder with the four files of MNIST, or of others like it"),
    "seed": (number(int, 0, 2**32 - 1), 0, "seed of everything random"),
}
LOG_EVERY = 20  # steps between two looks at the loss: each look waits for the GPU
TIMES = (0.05, 0.125, 0.25, 0.5, 0.75, 1)  # where denoising is measured, as fractions of T
DIGITS = 500  # test digits for each of these times
WALKS, SHOWN = 100, 16  # how many of them go through the reverse process, and are kept as pictures


def parse_flags():
    """The command line as a dict; flags that were not given are absent, so that --resume knows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"train.py: {message} (--help lists the flags)\n")
    for name, (kind, default, text) in SETTINGS.items():
        shown = " ".join(map(str, default)) if name == "channels" else default
        parser.add_argument("--" + name.replace("_", "-"), type=kind, nargs="+" if name == "channels" else None,
                            metavar="DIR" if name == "data" else "N", help=f"{text} (default: {shown})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for model.pt and metrics.json (default: out)")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these that is there")
    parser.add_argument("--save-every", type=number(int, 1, 10**8), metavar="N", help="in steps (default: 500)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", action="store_true", help="go on with the run in --out")
    action.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    action.add_argument("--evaluate", type=Path, metavar="FILE", help="only measure this checkpoint")
    return vars(parser.parse_args())


def pick_device(name=None):
    """The torch.device called name, or the best there is; ValueError if this machine lacks it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(d for d in there if there[d])
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this build of torch has none, try --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def generator(*key):
    """A random generator whose numbers depend on the key alone.

    Step k of process r draws from generator(seed, k, r): a resumed run needs no saved state to go on
    with the same numbers. Steps count from 1; step 0 is the evaluation, so its noise is never trained on.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


# Data
def read_idx(path, dims):
    """The bytes in a gzipped IDX file as a uint8 array with that many dimensions; ValueError if it is not one."""
    try:
        with gzip.open(path) as file:
            magic, *shape = (int.from_bytes(file.read(4), "big") for _ in range(1 + dims))
            size, content = math.prod(shape), bytearray()
            if magic != 0x800 + dims or not 0 < size <= 2**30:
                raise ValueError(f"{path} is no IDX file of bytes in {dims} dimensions, or an empty or huge one")
            while len(content) <= size and (piece := file.read(2**20)):  # the header may lie about the size
                content += piece
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read ({error}): --data needs the four whole files of MNIST") from None
    if len(content) != size:
        raise ValueError(f"{path} does not hold the {size} bytes that its header promises: copy it again")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def load_mnist(folder):
    """Train images (N, 1, H, W) uint8, train labels (N,), test images, test labels; ValueError if they don't fit."""
    arrays = []
    for split in "train", "t10k":
        arrays += [read_idx(Path(folder) / f"{split}-images-idx3-ubyte.gz", 3)[:, None],
                   read_idx(Path(folder) / f"{split}-labels-idx1-ubyte.gz", 1).long()]
    if [len(a) for a in arrays[::2]] != [len(a) for a in arrays[1::2]] or arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise ValueError(f"{folder} needs a label per image, and one image size; got {[[*a.shape] for a in arrays]}")
    return arrays


def to_pixels(images):
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1


# Files
def write_file(path, save):
    """Let save(file) write beside path, and rename: whatever happens, path is the old file or the new one, whole."""
    buffer, beside = io.BytesIO(), Path(f"{path}.tmp")
    save(buffer)
    try:
        with open(beside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error.strerror}); what was there before is whole") from None


def read_checkpoint(path):
    """What train() saved, as a dict, and its average of the weights as a "network"; ValueError if it is not that.

    Nothing in the file is executed, its settings pass the checks of the flags, and its checksums are compared,
    which torch.load leaves out.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        [state[name] for name in ("model", "average", "optimizers", "sums", "history")]
        state["step"] = number(int, 0, 10**8)(state["step"])
        for name, (parse, default, _) in SETTINGS.items():
            value = state["settings"][name]
            state["settings"][name] = [parse(v) for v in value] if isinstance(default, list) else parse(value)
        with torch.device("meta"):  # takes no memory: are the shapes those of this network?
            network = UNet(channels=state["settings"]["channels"])
        network.load_state_dict(state["average"], assign=True)
        if not all(p.dtype == torch.float32 and p.isfinite().all() for p in network.parameters()):
            raise ValueError("the weights are not finite float32 numbers")
    except Exception as error:  # damaged bytes can make torch.load raise almost anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:120]
        raise ValueError(f"{path} is no whole checkpoint of train.py ({reason}): name another, or train") from None
    return state | {"network": network.eval().requires_grad_(False)}


def load_checkpoint(path):
    """(model, ddpm): the network that was measured, in eval mode, and its process; ValueError if path holds none."""
    state = read_checkpoint(path)
    return state["network"], DDPM(linear_beta(state["settings"]["timesteps"]))


# Training
def make_optimizers(model, lr):
    """Muon for the 3x3 kernels between the first layer and the last, AdamW for everything else.

    Muon (Jordan et al. 2024) steps along the orthogonal matrix nearest to the mean gradient of a matrix, so that
    all its directions are learned at one speed. It is given the kernels as matrices (out, 9 in): views, in the
    order in which channels_last keeps them. Returns (optimizers, [(kernel, matrix), ...]).
    """
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[-1] == 3 and min(p.shape[:2]) > 3]
    matrices = [k.detach().permute(0, 2, 3, 1).view(len(k), -1) for k in kernels]
    others = [p for p in model.parameters() if all(p is not k for k in kernels)]
    muon = torch.optim.Muon(matrices, lr, weight_decay=0, momentum=0.9, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    return [muon, adamw], list(zip(kernels, matrices))


def batch_loss(network, ddpm, images, settings, step, device, rank=0, world=1):
    """The loss (8) of this process's part of the batch of one step: its own digits, times and noise."""
    random = generator(settings["seed"], step, rank)
    chosen = torch.randint(len(images), (settings["batch_size"] // world,), generator=random)
    x_0 = to_pixels(images[chosen].to(device, non_blocking=True))
    return ddpm.loss(network, x_0, random)


def train(settings, images, device, save, state=None, save_every=500, rank=0, world=1):
    """Train from the start, or from a saved state; call save(state) every save_every steps and at the end.

    Raises ValueError when the loss or its gradient is no longer finite; KeyboardInterrupt, after a save, on Ctrl-C.
    """
    torch.manual_seed(settings["seed"])
    steps, terminal = settings["steps"], sys.stdout.isatty()
    model = UNet(channels=settings["channels"]).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    ddpm = DDPM(linear_beta(settings["timesteps"]))
    sums, history, done = torch.zeros(2, device=device), [], 0  # sums of the loss and of the norm of the gradient
    optimizers, views = make_optimizers(model, settings["lr"])
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        sums, history, done = state["sums"].to(device), state["history"], state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    interrupted = []  # Ctrl-C waits for the end of the step; the other processes leave it to the first
    signal.signal(signal.SIGINT, signal.SIG_IGN if rank else lambda *_: interrupted.append(True))
    start = shown = time.perf_counter()
    for step in range(done + 1, steps + 1):
        loss = batch_loss(network, ddpm, images, settings, step, device, rank, world)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for kernel, matrix in views:
            matrix.grad = kernel.grad.permute(0, 2, 3, 1).reshape(matrix.shape)
        # Up over the first 100 steps, or tenth of the run, and down to 0 along a straight line.
        lr = settings["lr"] * min(1, step / min(100, steps / 10)) * (1 - (step - 1) / steps)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        model.zero_grad()
        # Averages the last tenth of the steps so far, at most a thirtieth of the run.
        with torch.no_grad():
            weight = 1 / max(1, min(step / 10, steps / 30))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
        sums += torch.stack([loss.detach(), norm])
        look = step % LOG_EVERY == 0 or step == steps
        keep = step % save_every == 0 or step == steps or interrupted
        if (look or keep) and not sums.isfinite().all():
            raise ValueError(f"the loss or its gradient stopped being finite by step {step}: try a smaller --lr; "
                             "the last checkpoint is as it was")
        if look:
            history.append([step, sums[0].item() / (step % LOG_EVERY or LOG_EVERY)])
            sums.zero_()
            now = time.perf_counter()
            if not rank and (terminal or now > shown + 5 or step == steps):
                shown, speed = now, (step - done) / (now - start)
                print(f"step {step}/{steps}  loss {history[-1][1]:.4f}  {speed * settings['batch_size']:.0f} images/s  "
                      f"{(steps - step) / speed:.0f} s left  ", end="\r" if terminal else "\n", flush=True)
        if keep:
            save({"settings": settings, "step": step, "model": model.state_dict(), "average": average.state_dict(),
                  "optimizers": [o.state_dict() for o in optimizers], "sums": sums, "history": history})
        if interrupted:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Evaluation
def train_classifier(x, labels, seed):
    """A small network that reads digits, trained in seconds; classifier[:-1](x) are the 32 features it decides by."""
    torch.manual_seed(seed)
    classifier = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, int(labels.max()) + 1))
    batches = torch.randperm(len(x)).split(100)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(batches) + 1)
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(x[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


def frechet_distance(a, b):
    """|m_a - m_b|² + tr(C_a + C_b - 2 √(C_a C_b)): between Gaussians with the moments of two sets (N, D)."""
    (m_a, c_a), (m_b, c_b) = [(f.double().mean(0), f.double().T.cov()) for f in (a, b)]
    root = torch.linalg.eigvals(c_a @ c_b).real.clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * root).item()


def mean_and_error(values):
    """[mean, standard error of the mean] of independent numbers."""
    return [values.mean().item(), (values.std() / len(values) ** 0.5).item()]


def evaluate(network, ddpm, data, seed):
    """How well noise is removed from test digits: (metrics, pictures), two dicts.

    network: called like the UNet, on the CPU; data: from load_mnist. For the same noisy digits, "noisy" is ε = 0,
    "linear" GaussianEps, "memory" EmpiricalEps, "network" one shot (all by x̂_0), "reverse" the end of process (2).
    """
    train_x, test_x, random = to_pixels(data[0]), to_pixels(data[2]), generator(seed, 0)
    classifier = train_classifier(train_x, data[1], seed)
    linear = GaussianEps(ddpm, train_x.mean(0), train_x.flatten(1).T.cov())
    methods = {"noisy": lambda x_t, t: torch.zeros_like(x_t), "linear": linear,
               "memory": EmpiricalEps(ddpm, train_x), "network": network}

    def noisy(x_0, t):
        eps = torch.randn(x_0.shape, generator=random)
        return ddpm.q_sample(x_0, t, eps), eps

    def reverse(x_t, t=None):
        return list(ddpm.p_sample(network, x_t, t, generator=random))[-1][1]

    def read_rightly(x):
        return (classifier(x).argmax(1) == labels[:len(x)]).float().mean().item()

    x_0 = test_x[::2]
    t = 1 + torch.arange(len(x_0)) % ddpm.T
    x_t, eps = noisy(x_0, t)
    losses = {name: (model(x_t, t) - eps).square().flatten(1).mean(1) for name, model in methods.items()}
    bins = [b for b in ((t - 1) * 20 // ddpm.T == i for i in range(20)) if b.any()]
    loss_by_t = {name: [v[b].mean().item() for b in bins] for name, v in (losses | {"t": t.float()}).items()}

    chosen = torch.randperm(len(x_0), generator=random)[:DIGITS]
    x_0, labels = x_0[chosen], data[3][::2][chosen]
    psnr, accuracy, pictures = {}, {}, {"clean": x_0[:SHOWN].clone()}
    for t in (times := sorted({max(1, round(f * ddpm.T)) for f in TIMES})):
        x_t, _ = noisy(x_0, t)
        steps = torch.full((len(x_t),), t)
        estimates = {name: ddpm.predict_x0(x_t, model(x_t, steps), t) for name, model in methods.items()}
        estimates["reverse"] = reverse(x_t[:WALKS], t)  # slow: as many steps as t
        for name, x in estimates.items():
            x = x if name == "noisy" else x.clamp(-1, 1)  # where pixels live
            decibels = 10 * (4 / (x - x_0[:len(x)]).square().flatten(1).mean(1)).log10()
            psnr.setdefault(name, []).append(mean_and_error(decibels))
            accuracy.setdefault(name, []).append(read_rightly(x))
            pictures.setdefault(name, []).append(x[:SHOWN].clone())

    # Generation: what N(0, I) is to the network, and a Gaussian with the mean and covariance that x_T really has.
    real, reference = x_0[:WALKS], classifier[:-1](test_x[1::2])
    matched, _ = noisy(linear.sample(len(real), random).reshape(real.shape).float(), ddpm.T)
    made = {"real digits": real, "N(0, I)": reverse(torch.randn(real.shape, generator=random)),
            "noised digits": estimates["reverse"], "matched Gaussian": reverse(matched)}  # the last t above was T
    distances = {name: frechet_distance(classifier[:-1](x), reference) for name, x in made.items()}
    a, norms = ddpm.alpha_bar[-1].item(), test_x.square().flatten(1).sum(1)
    metrics = {
        "test_loss": {name: mean_and_error(loss) for name, loss in losses.items()}, "loss_by_t": loss_by_t,
        "denoising": {"digits": len(x_0), "t": times, "psnr": psnr, "accuracy": accuracy,
                      "accuracy_clean": read_rightly(x_0)},
        "generation": {"digits": len(real), "frechet": distances,  # nats: KL(q(x_T | x_0) ‖ N(0, I))
                       "nats": (linear.mean.numel() * (-a - math.log(1 - a)) + a * norms.mean().item()) / 2}}
    return metrics, pictures | {"generated": {name: x[:SHOWN].clone() for name, x in made.items()}}


def print_table(metrics):
    loss, d = metrics["test_loss"], metrics["denoising"]
    print(f"\nPSNR in dB ± standard error, and digits that a classifier reads ({d['accuracy_clean']:.0%} if clean)")
    print("   t" + "".join(f"{name:>20}" for name in d["psnr"]))
    for i, t in enumerate(d["t"]):
        cells = [(*d["psnr"][name][i], d["accuracy"][name][i]) for name in d["psnr"]]
        print(f"{t:4d}" + "".join(f"{mean:9.2f} ±{error:.2f} {right:5.0%}" for mean, error, right in cells))
    print("loss" + "".join(f"{mean:12.4f} ±{error:.4f}" for mean, error in loss.values()) + "    test loss (8)")
    print("Fréchet distance", ", ".join(f"{name}: {value:.1f}" for name, value in metrics["generation"]["frechet"].items()))


def main():
    torch.set_flush_denormal(True)  # nearly all weights of the memory are denormal numbers, which are slow
    given = parse_flags()
    device, only = pick_device(given.get("device")), given.get("evaluate")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = given.get("out", only.parent if only else Path("out"))
    file = only or out / "model.pt"
    state = read_checkpoint(file) if only or "resume" in given else None
    saved = state["settings"] if state else {name: default for name, (_, default, _) in SETTINGS.items()}
    settings = saved | {name: given[name] for name in SETTINGS if name in given}
    free = ("data", "seed") if only else ("data",)
    if changed := [name for name in settings if state and settings[name] != saved[name] and name not in free]:
        raise ValueError(f"{file} brings its own settings: leave out --{changed[0].replace('_', '-')}")
    if not state and "overwrite" not in given and file.exists():
        raise ValueError(f"{file} holds a run: add --resume to go on, --overwrite to replace it, or take another --out")
    if settings["batch_size"] % world:
        raise ValueError(f"--batch-size must be a multiple of the {world} processes")
    data = load_mnist(settings["data"])
    UNet(channels=settings["channels"])(to_pixels(data[0][:1]), torch.ones(1))  # do widths and image size fit?
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # a folder that can't be written to is better known now
    if not only:
        if world > 1:
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        save = (lambda state: None) if rank else lambda state: write_file(file, lambda f: torch.save(state, f))
        train(settings, data[0], device, save, state, given.get("save_every", 500), rank, world)
        if world > 1:
            distributed.destroy_process_group()
    if rank == 0:
        state = state if only else read_checkpoint(file)
        model = state["network"].to(device, memory_format=torch.channels_last)
        def network(x_t, t):  # a thousand digits at once would be slower
            return torch.cat([model(x.to(device), s.to(device)).cpu() for x, s in zip(x_t.split(100), t.split(100))])
        metrics, pictures = evaluate(network, DDPM(linear_beta(settings["timesteps"])), data, settings["seed"])
        about = {"settings": {name: settings[name] for name in settings if name != "data"}, "history": state["history"],
                 "parameters": sum(p.numel() for p in model.parameters())}
        write_file(out / "metrics.json", lambda f: f.write(json.dumps(about | metrics, indent=1).encode()))
        write_file(out / "pictures.pt", lambda f: torch.save(pictures, f))
        print_table(metrics)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped: python train.py --resume goes on from what was saved (with the same --out)", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        sys.exit(f"train.py: {error}")
