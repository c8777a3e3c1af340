"""Draw the equations, and measure a trained network: out/model.pt -> out/figures/.

    python figures.py     all figures; before train.py, those that need no network
"""
import argparse
import json
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib import ticker
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

import train
from ddpm import DDPM, EmpiricalEps, GaussianEps, linear_beta
from unet import TimeEmbedding

CONDOR = Path(__file__).resolve().parent / "condor.png"
DENOISED_AT = (0.05, 0.125, 0.25, 0.5, 0.75, 1)  # where denoising is measured, as fractions of T
REVERSED_AT = (0.25, 0.5, 1)  # of these, where the reverse process (slow) is measured too
SHOWN = 16  # the first digits, from which those in the pictures are chosen

# One thing has one colour (Okabe and Ito's, safe for the colour-blind) in all figures.
SIGNAL = "#CC79A7"
NOISE = "#7f7f7f"
NETWORK = "#0072B2"
REVERSE = "#D55E00"
STYLES = {
    "noisy": {"color": NOISE, "marker": "x", "label": "no denoising"},
    "linear": {"color": "#E69F00", "marker": "s", "label": "best linear denoiser (Wiener)"},
    "memorising": {"color": "#009E73", "marker": "^", "label": "memorising denoiser"},
    "network": {"color": NETWORK, "marker": "o", "label": "network"},
}
ROWS = {
    "noisy": r"no denoising, $x_t/\sqrt{\bar{\alpha}_t}$",
    "linear": "best linear denoiser (Wiener)",
    "memorising": "memorising denoiser",
    "network": r"network, estimate $\hat{x}_0$",
    "reverse": "network, reverse process",
}
RC = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
}


def new_figure(width, height, rows=1, columns=1):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def show(axes, picture):
    """A picture (channels, H, W), from -1 (black) to 1 (white)."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    axes.imshow(pixels.expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[], frame_on=False)
    axes.grid(False)


def plain_ticks(axis, digits):
    """Numbers that begin with one of the digits, written out, on a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


# Sheet 1 to 4: pictures that need no network

def read_image(path):
    """A photo or drawing, PNG or JPEG, as (3, H, W) in [-1, 1]; what is transparent is white."""
    try:
        pixels = imread(path, format="any")  # by its content, whatever its name
    except Exception as error:  # damaged bytes can make Pillow raise almost anything
        raise train.InputError(f"{path} must be a PNG or JPEG picture: {error}") from error
    if pixels.dtype.kind == "u":  # of a JPEG; those of a PNG are from 0 to 1
        pixels = np.float32(pixels) / np.iinfo(pixels.dtype).max
    x = torch.tensor(pixels).reshape(*pixels.shape[:2], -1)
    if x.shape[2] in (2, 4):
        x = 1 - x[..., -1:] * (1 - x[..., :-1])
    return x.expand(-1, -1, 3).permute(2, 0, 1) * 2 - 1


def draw_forward(image):
    """Sheet (3): x_0, x_3, x_10, x_30, x_100, x_200 of one path of (1)."""
    ddpm = DDPM(linear_beta())
    figure, axes = new_figure(12, 8.6, 2, 3)
    cells = dict(zip((0, 3, 10, 30, 100, 200), axes.flat, strict=True))
    show(cells[0], image)
    cells[0].set_title("$x_{0}$", fontsize=20)
    for t, x in ddpm.q_step_loop(image[None], generator=train.make_rng("figures")):
        if t in cells:
            signal = ddpm.alpha_bar[t].item()
            show(cells[t], x[0])
            cells[t].set_title(f"$x_{{{t}}}$", fontsize=20)
            cells[t].set_xlabel(f"$\\sqrt{{\\bar{{\\alpha}}_t}}$ = {signal**0.5:.4f}, "
                                f"SNR = {signal / (1 - signal):,.4g}", fontsize=13)
    return figure


def draw_marginal(images):
    """Question 1: the pixels of x_t over the data, and paths of (1) from one pixel, with (5)."""
    x_0 = train.to_pixels(images[:2000])
    ddpm = DDPM(linear_beta())
    rng = train.make_rng("figures")
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic([[0, 30, 100, 200], ["paths"] * 4])

    # above: histograms of all pixels
    grid = torch.linspace(-4, 4, 400)
    density = (-grid**2 / 2).exp() / (2 * np.pi) ** 0.5
    for t in 0, 30, 100, 200:
        eps = torch.randn(x_0.shape, generator=rng)
        x_t = ddpm.q_sample(x_0, t, eps) if t else x_0
        axes[t].hist(x_t.flatten().numpy(), 160, range=(-4, 4), density=True, color=SIGNAL)
        axes[t].plot(grid, density, "--", color=NOISE, label=r"$\mathcal{N}(0, 1)$")
        axes[t].set(title=f"the data at t = {t}", xlabel="$x_t$, all pixels",
                    xticks=(-3, -1, 1, 3), ylim=(0, 1.5))
    axes[0].set_ylabel(f"density, cut at 1.5 ({(x_0 == -1).float().mean():.0%} are black)")
    axes[0].legend()

    # below: 40 paths of one pixel, and what (5) says of them
    below = axes["paths"]
    x_0 = torch.ones(40)
    steps = ddpm.q_step_loop(x_0, generator=rng)
    path = torch.stack([x_0] + [x for _, x in steps])
    below.plot(path, color=NOISE, linewidth=0.7, alpha=0.6)
    mean = ddpm.alpha_bar.sqrt()
    deviation = (1 - ddpm.alpha_bar).sqrt()
    below.plot(mean, color=SIGNAL, label=r"mean of (5): $\sqrt{\bar{\alpha}_t}\,x_0$")
    below.fill_between(range(ddpm.T + 1), mean - 2 * deviation, mean + 2 * deviation, color=SIGNAL,
                       alpha=0.25, label=r"± 2 standard deviations $\sqrt{1-\bar{\alpha}_t}$")
    below.set(title="40 paths of the recurrence (1) from one white pixel, $x_0 = 1$",
              xlabel="t", xlim=(0, ddpm.T), ylabel="$x_t$")
    below.legend(loc="lower left")
    return figure


def gaussian(x, mean, variance):
    """A Gaussian's density over its maximum."""
    return (-(x - mean) ** 2 / (2 * variance)).exp()


def draw_bayes():
    """Question 2 for a single pixel: what x_0 says of x_{t-1}, what x_t says, and both together."""
    ddpm = DDPM(linear_beta())
    x_0 = torch.tensor([1.0])
    figure, axes = new_figure(13, 4, 1, 3)
    for cell, t in zip(axes, (2, 20, 200), strict=True):
        alpha = ddpm.alpha[t]
        beta = ddpm.beta[t]
        alpha_bar_prev = ddpm.alpha_bar[t - 1]
        x_t = ddpm.q_sample(x_0, t, torch.tensor([-1.5]))
        mean = ddpm.posterior_mean(x_t, x_0, t)
        variance = ddpm.posterior_variance(t)
        width = 3.5 * max(1 - alpha_bar_prev, beta / alpha).sqrt()
        x = mean + torch.linspace(-width, width, 500)
        cell.plot(x, gaussian(x, alpha_bar_prev.sqrt() * x_0, 1 - alpha_bar_prev), color=SIGNAL,
                  label="$p(x_{t-1}|x_0)$, from $x_0$")
        cell.plot(x, gaussian(x, x_t / alpha.sqrt(), beta / alpha), color=NOISE,
                  label="$p(x_t|x_{t-1})$, from $x_t$")
        cell.fill_between(x, gaussian(x, mean, variance), color=REVERSE, alpha=0.5,
                          label="product: $p(x_{t-1}|x_t,x_0)$")
        cell.axvline(mean, color="black", linestyle=":", label="its mean $\\mu(x_t,x_0)$, eq. (4)")
        share = beta / (1 - ddpm.alpha_bar[t])
        cell.set(title=f"t = {t}: the share of $x_0$ is {share:.0%}", xlabel="$x_{t-1}$",
                 yticks=[], ylim=(0, 1.05))
    axes[0].set_ylabel("density / its maximum")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_embedding():
    """Sheet (4): the sinusoids of TimeEmbedding against t."""
    sinusoids = TimeEmbedding(64).sinusoids(torch.arange(201)).numpy()
    figure, axes = new_figure(12, 4)
    picture = axes.imshow(sinusoids.T, aspect="auto", cmap="gray", interpolation="nearest",
                          vmin=-1, vmax=1)  # the cosines don't quite reach -1
    axes.axhline(31.5, color="white", linewidth=4)
    axes.set(title="sinusoids of t, the input of the time embedding", xlabel="t",
             ylabel="slow to fast (upwards)", yticks=(16, 48), yticklabels=("sines", "cosines"))
    axes.grid(False)
    figure.colorbar(picture, ticks=(-1, 0, 1))
    return figure


# Sheet 6: measuring

def batched(function, *tensors):
    """function(*tensors), a hundred samples at a time, which takes less memory."""
    batches = zip(*(tensor.split(100) for tensor in tensors), strict=True)
    return torch.cat([function(*batch) for batch in batches])


def train_classifier(x, labels):
    """A small network that reads digits; classifier[:-1](x) are the 32 features it decides by."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        classifier = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, int(labels.max()) + 1))
    batches = torch.randperm(len(x), generator=train.make_rng("classifier")).split(100)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(batches) + 1)
    for batch in train.progress(batches, "classifier: batch", len(batches)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(x[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


def mean_and_sem(values):
    """The mean of two or more independent numbers, and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def measure_loss(model, ddpm, x_0):
    """The loss (8) of a denoiser: {"loss": (mean, sem), "t": [...], "loss_by_t": [...]} in bins."""
    losses, t = train.evaluate(model, ddpm, x_0)
    index = (t - 1) * 20 // ddpm.T
    bins = [index == i for i in index.unique()]
    return {"loss": mean_and_sem(losses), "t": [t[i].double().mean().item() for i in bins],
            "loss_by_t": [losses[i].mean().item() for i in bins]}


def new_denoisers(network, ddpm, x):
    """What is compared; the best linear and the memorising one are exact for training digits x."""
    return {"noisy": lambda x_t, t: torch.zeros_like(x_t),
            "linear": GaussianEps.fit(ddpm, x),
            "memorising": EmpiricalEps(ddpm, x),
            "network": network}


def psnr_and_accuracy(x0_hat, x_0, labels, classifier):
    """Of estimates of x_0: PSNR in dB and the accuracy of the classifier, each (mean, sem)."""
    error = (x0_hat - x_0).square().flatten(1).mean(1).clamp(min=1e-10)
    correct = classifier(x0_hat).argmax(1) == labels
    return {"psnr": mean_and_sem(10 * (4 / error).log10()),
            "accuracy": mean_and_sem(correct.float())}


def reverse_process(model, ddpm, x_t, t, rng):
    """The x_0 that (2) leads to from x_t, and [(s, x_s)] on the way there for the first samples."""
    steps = ddpm.p_sample_loop(model, x_t, t, generator=rng)
    path = [(t, x_t[:SHOWN])]
    for s, x in train.progress(steps, f"{len(x_t)} digits from t = {t}: step", t):
        path.append((s, x[:SHOWN].clone()))  # not a view, which would hold all samples
    if not x.isfinite().all():
        raise train.InputError("the network's reverse process is not finite: train it again")
    return x.clamp(-1, 1), path


def denoise(denoisers, ddpm, x_0, rng):
    """Digits x_0, noised to several t and denoised: {t: {method: x̂_0}}, and {t: path from t}.

    Estimates are clamped to the range of pixels; the noisy digits are not.
    """
    estimates = {}
    paths = {}
    for part in DENOISED_AT:
        t = int(np.ceil(part * ddpm.T))
        x_t = ddpm.q_sample(x_0, t, torch.randn(x_0.shape, generator=rng))
        estimates[t] = {}
        for name, model in denoisers.items():
            eps = batched(model, x_t, torch.full((len(x_t),), t))
            x0_hat = ddpm.predict_x0(x_t, eps, t)
            estimates[t][name] = x0_hat if name == "noisy" else x0_hat.clamp(-1, 1)
        if part in REVERSED_AT:
            network = partial(batched, denoisers["network"])
            estimates[t]["reverse"], paths[t] = reverse_process(network, ddpm, x_t, t, rng)
    return estimates, paths


def measure_denoising(estimates, x_0, labels, classifier):
    """{t: {method: PSNR and accuracy}}."""
    measured = {}
    for t, row in estimates.items():
        measured[t] = {name: psnr_and_accuracy(x0_hat, x_0, labels, classifier)
                       for name, x0_hat in row.items()}
    return measured


def generate(network, linear, shape, rng):
    """New digits (n, C, H, W) from x_T that are not noised digits: {start: digits}."""
    ddpm = linear.ddpm
    starts = {"from a matched Gaussian": linear.sample_x_T(shape[0], generator=rng),
              "from N(0, I)": torch.randn(shape, generator=rng)}
    samples = {}
    for name, x_T in starts.items():
        samples[name], _ = reverse_process(network, ddpm, x_T, ddpm.T, rng)
    return samples


def generate_with_another_process(trainer, shape, rng):
    """The same with a network of another T: losses of different β do not compare, digits do."""
    ddpm = trainer.ddpm
    x_T = torch.randn(shape, generator=rng)
    x, _ = reverse_process(partial(batched, trainer.model), ddpm, x_T, ddpm.T, rng)
    return {f"T = {ddpm.T}, from N(0, I)": x}


def frechet_distance(a, b):
    """|m_a - m_b|² + tr(C_a + C_b - 2 √(C_a C_b)): of Gaussians with the moments of two sets."""
    m_a, m_b = (x.double().mean(0) for x in (a, b))
    c_a, c_b = (x.double().T.cov() for x in (a, b))
    root = torch.linalg.eigvals(c_a @ c_b).real.clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * root).item()


def estimates_along(path, model, ddpm):
    """[(t, x_t, the estimate x̂_0 from it)] for at most 41 times of a path to x_0."""
    estimates = []
    for i in torch.linspace(0, len(path) - 1, min(41, len(path))).round().long().tolist():
        t, x = path[i]
        eps = model(x, torch.full((len(x),), t))
        estimates.append((t, x, ddpm.predict_x0(x, eps, t) if t else x))
    return estimates


def first_of_each_class(labels):
    """Where each class stands first in a list of labels."""
    return [labels.index(label) for label in sorted(set(labels))]


# Sheet 6: pictures of what was measured

def draw_losses(metrics, losses):
    """The training curve, from the losses of all steps, and the test loss (8) of methods by t."""
    figure, (left, right) = new_figure(12, 4.8, 1, 2)
    means = [np.mean(losses[i:i + 20]) for i in range(0, len(losses), 20)]
    steps = np.minimum(np.arange(1, len(means) + 1) * 20, len(losses))
    left.loglog(steps, means, color=NETWORK, label="training, mean over 20 steps")
    final = metrics["losses"]["network"]["loss"][0]
    left.axhline(final, color="black", linestyle=":", label=f"test loss at the end: {final:.4f}")
    left.set(title="training", xlabel="step", ylabel="loss (8)")
    plain_ticks(left.yaxis, (1, 2, 3, 5))
    plain_ticks(left.xaxis, (1, 2, 5))
    left.legend()
    for name, row in metrics["losses"].items():
        style = STYLES[name] | {"label": f"{STYLES[name]['label']}: {row['loss'][0]:.3g}"}
        right.semilogy(row["t"], row["loss_by_t"], **style, markersize=4)
    right.set(title="test digits, by time", xlabel="t", ylim=(0.01, 3),
              ylabel="loss (8), cut at 3")
    plain_ticks(right.yaxis, (1, 2, 3, 5))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  title="test loss (8), mean over t", fontsize=11)
    return figure


def tiled(rows):
    """One picture of rows of pictures."""
    return torch.cat([torch.cat([*row], dim=2) for row in rows], dim=1)


def draw_grid(rows, labels, titles):
    """Rows of pictures, (n, 1, H, W) each, with labels at the left, titles over equal parts."""
    page = tiled(nn.functional.pad(row, 4 * [2], value=1) for row in rows)
    _, height, width = page.shape
    figure, axes = new_figure(3.4 + 0.026 * width, 0.9 + 0.026 * height)
    show(axes, page)
    axes.set_yticks((torch.arange(len(rows)) + 0.5) * height / len(rows), labels)
    axes.set_xticks((torch.arange(len(titles)) + 0.5) * width / len(titles), titles)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    return figure


def draw_denoising(x_0, estimates):
    """Digits, noisy at several t, and what each method makes of them."""
    rows = [torch.cat(len(estimates) * [x_0])]
    for name in ROWS:
        rows.append(torch.cat([row[name] for row in estimates.values()]))
    figure = draw_grid(rows, ["clean digit", *ROWS.values()], [f"t = {t}" for t in estimates])
    axes = figure.axes[0]
    for x in torch.linspace(0, 1, len(estimates) + 1)[1:-1]:  # lines between the times
        axes.axline((x, 0), (x, 1), transform=axes.transAxes, color=NOISE)
    return figure


def draw_reverse(path, x_0, index):
    """Digits on their way back, under each x_t the estimate of x_0 from it, and the originals."""
    parts = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1)
    columns = [path[round((len(path) - 1) * part)] for part in parts]
    rows = []
    for i in index:
        rows.append(torch.stack([x[i] for _, x, _ in columns] + [x_0[i]]))
        rows.append(torch.stack([x0_hat[i] for _, _, x0_hat in columns] + [x_0[i]]))
    titles = [f"t = {t}" for t, _, _ in columns[:-1]] + ["result", "original"]
    return draw_grid(rows, len(index) * ["$x_t$", r"estimate $\hat{x}_0$"], titles)


def draw_generation(samples):
    """New digits from several kinds of x_T, and real ones."""
    return draw_grid([x[:12] for x in samples.values()], list(samples), [])


def save_gif(path, x_0, file):
    """An animated GIF: digits in the reverse process from x_T, their estimates, and originals."""
    figure, axes = new_figure(7.2, 2.65, 1, 3)
    writer = PillowWriter(fps=5)
    with writer.saving(figure, file, dpi=100):
        for t, x, x0_hat in path[::2] + 8 * path[-1:]:  # the last one stays
            titles = (f"$x_t$, t = {t}", r"estimate $\hat{x}_0$", "original")
            for cell, digits, title in zip(axes, (x, x0_hat, x_0), titles, strict=True):
                cell.clear()
                show(cell, tiled(digits.split(4)))
                cell.set_title(title)
            writer.grab_frame()


def save(figures, folder):
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        train.write_file(path, figure.savefig)
        print(path)


def evaluate_networks(trainers, data, n, folder):
    """Sheet (6): the first network on n test digits, and the others beside it."""
    first = trainers[0]
    ddpm = first.ddpm
    images, labels, test_images, test_labels = data
    train_x = train.to_pixels(images)
    test_x = train.to_pixels(test_images)
    classifier = train_classifier(train_x, labels)
    denoisers = new_denoisers(first.model.eval().requires_grad_(False), ddpm, train_x)
    rng = train.make_rng("figures")
    index, rest = torch.randperm(len(test_x), generator=rng).tensor_split([n])
    x_0 = test_x[index]
    labels = test_labels[index]

    # what is a good loss?
    losses = {name: measure_loss(model, ddpm, test_x) for name, model in denoisers.items()}

    # how good is the estimate?
    estimates, paths = denoise(denoisers, ddpm, x_0, rng)
    denoising = measure_denoising(estimates, x_0, labels, classifier)

    # how low can the loss go, and how good are new digits? the other networks
    samples = {"real digits": x_0, "from noised digits": estimates[ddpm.T]["reverse"]}
    samples |= generate(partial(batched, first.model), denoisers["linear"], x_0.shape, rng)
    runs = [{"config": asdict(first.config)} | losses["network"]]
    for other in trainers[1:]:
        if other.ddpm.beta.equal(ddpm.beta):
            runs.append({"config": asdict(other.config)} | measure_loss(other.model, ddpm, test_x))
        else:
            samples |= generate_with_another_process(other, x_0.shape, rng)
    features = batched(classifier[:-1], test_x[rest])
    frechet = {name: frechet_distance(classifier[:-1](x), features) for name, x in samples.items()}

    # the files
    metrics = {"losses": losses,
               "digits": n,
               "clean": psnr_and_accuracy(x_0, x_0, labels, classifier)["accuracy"],
               "denoising": denoising,
               "frechet": frechet,
               "runs": runs}
    text = json.dumps(metrics, indent=1).encode()
    train.write_file(folder / "metrics.json", lambda file: file.write(text))
    shown = first_of_each_class(labels[:SHOWN].tolist())
    few = shown[:4]
    denoised = {t: {name: x[few] for name, x in estimates[t].items()} for t in paths}
    half = list(paths)[len(paths) // 2]  # from there most digits come back: it is for the film
    film = estimates_along(paths[half], first.model, ddpm)
    whole = estimates_along(paths[ddpm.T], first.model, ddpm)
    save({"losses": draw_losses(metrics, first.losses),
          "denoising": draw_denoising(x_0[few], denoised),
          "generation": draw_generation(samples),
          "reverse": draw_reverse(whole, x_0, shown[:6])}, folder)
    save_gif(film, x_0[:SHOWN], folder / "reverse.gif")


def parse_flags():
    parser = argparse.ArgumentParser(description="Draw the equations, and measure a network.")
    parser.add_argument("--data", type=Path, default=train.MNIST, help="the data of the training")
    parser.add_argument("--out", type=Path, default="out/figures",
                        help="output folder (default: out/figures)")
    parser.add_argument("--image", type=Path, default=CONDOR,
                        help="picture for the forward process (default: condor.png)")
    parser.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE", default=[],
                        help="network to evaluate, then others to compare (default: out/model.pt)")
    parser.add_argument("--digits", type=int, default=50, metavar="N",
                        help="test digits in the reverse process (default: 50)")
    flags = parser.parse_args()
    if not flags.checkpoint and Path("out/model.pt").exists():
        flags.checkpoint = [Path("out/model.pt")]
    return flags


def main():
    """Draw what needs no network; then measure the first network, and compare the others."""
    flags = parse_flags()
    data = train.load_mnist(flags.data)
    images, _, test_images, _ = data
    checksum = zlib.crc32(images.numpy())
    trainers = [train.read_checkpoint(path, checksum) for path in flags.checkpoint]
    if trainers and not SHOWN <= flags.digits <= len(test_images) / 2:
        raise train.InputError(f"--digits must be from {SHOWN} to half of the test pictures, of "
                               f"which there are {len(test_images)}")
    with matplotlib.style.context(RC, after_reset=True):  # whatever the user's matplotlibrc says
        save({"forward": draw_forward(read_image(flags.image)),
              "marginal": draw_marginal(images),
              "bayes": draw_bayes(),
              "embedding": draw_embedding()}, flags.out)
        if trainers:
            evaluate_networks(trainers, data, flags.digits, flags.out)
        else:
            print("the other figures show a trained network: run python train.py first")


if __name__ == "__main__":
    train.run_command(main)
