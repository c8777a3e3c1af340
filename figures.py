"""Measure and draw what a network is worth: out/model.pt comes in, out/figures/ goes out.

    python figures.py                       what needs no network; after python train.py, all
    python figures.py --image photo.png     with another picture than the condor
"""
import json
import signal
import tempfile
import zlib
from pathlib import Path

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the program ends, without a traceback
import matplotlib
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from torch import nn

from ddpm import DDPM, EmpiricalEps, GaussianEps, linear_beta
from train import InputError, generator, load_mnist, mean_and_error, new_parser, pick_device
from train import progress, read_checkpoint, run_command, test_losses, to_pixels, write_file
from unet import TimeEmbedding

TIMES = (0.05, 0.125, 0.25, 0.5, 0.75, 1)  # where denoising is measured, as fractions of T
WALKS = (0.25, 0.5, 1)  # from where the reverse process is walked as well: it is slow

# One colour (Okabe and Ito's, safe for the colour-blind) and marker for one thing in all figures.
SIGNAL, NOISE, MISREAD = "#CC79A7", "#7f7f7f", "#FFD400"
STYLES = {
    "noisy": dict(color=NOISE, marker="x", label=r"noisy digit, $x_t/\sqrt{\bar{\alpha}_t}$"),
    "linear": dict(color="#E69F00", marker="s", label="best linear denoiser"),
    "memory": dict(color="#009E73", marker="^", label="memory of the training digits"),
    "network": dict(color="#0072B2", marker="o", label=r"network, one shot $\hat{x}_0$"),
    "reverse": dict(color="#D55E00", marker="D", label="network, reverse process"),
}
NETWORK, REVERSE = STYLES["network"]["color"], STYLES["reverse"]["color"]
LOOK = {"font.size": 12, "axes.titlesize": 13, "legend.fontsize": 10, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        "lines.linewidth": 2, "errorbar.capsize": 3, "savefig.dpi": 150, "savefig.bbox": "tight"}


# Measuring

def train_classifier(x, labels, seed):
    """A small network that reads digits; classifier[:-1](x) are the 32 features it decides by."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, int(labels.max()) + 1))
        batches = torch.randperm(len(x)).split(100)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(batches) + 1)
    for batch in progress(batches, "classifier: batch", len(batches)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(x[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


def measure_loss(model, ddpm, x_0):
    """The test loss (8) with its standard error, and its means over 20 spans of t."""
    losses = test_losses(model, ddpm, x_0)
    t = 1 + torch.arange(len(losses)) % ddpm.T
    span = (t - 1) * 20 // ddpm.T
    spans = [span == i for i in span.unique()]
    return {"loss": mean_and_error(losses), "t": [t[i].double().mean().item() for i in spans],
            "loss_by_t": [losses[i].mean().item() for i in spans]}


def measure_denoising(methods, reverse, ddpm, x_0, labels, classifier, random):
    """The same noisy digits, denoised by each method: (metrics, pictures), by t and method."""
    times = {max(1, round(part * ddpm.T)): part in WALKS for part in TIMES}
    metrics, pictures = {t: {} for t in times}, {name: {} for name in STYLES} | {"clean": x_0}
    for t, is_walked in times.items():
        x_t = ddpm.q_sample(x_0, t, torch.randn(x_0.shape, generator=random))
        each_t = torch.full((len(x_t),), t)
        estimates = {name: ddpm.predict_x0(x_t, model(x_t, each_t), t)
                     for name, model in methods.items()}
        if is_walked:
            estimates["reverse"], pictures["path"] = reverse(x_t, t)
        for name, x in estimates.items():
            x = x if name == "noisy" else x.clamp(-1, 1)  # where pixels live
            error = (x - x_0).square().flatten(1).mean(1)
            right = classifier(x).argmax(1) == labels
            metrics[t][name] = {"psnr": mean_and_error(10 * (4 / error).log10()),
                                "read": mean_and_error(right.float())}
            pictures[name][t] = x, right
    return metrics, pictures


def grey_pixels(network, ddpm, x_0, t, random):
    """Pixels neither black nor white: their share of all, and of the network's loss (8) at t."""
    grey, eps = x_0.abs() < 1, torch.randn(x_0.shape, generator=random)
    estimate = network(ddpm.q_sample(x_0, t, eps), torch.full((len(x_0),), t))
    loss = (eps - estimate).square()
    return {"t": t, "pixels": grey.float().mean().item(),
            "loss": (loss[grey].sum() / loss.sum()).item()}


def frechet_distance(a, b):
    """|m_a - m_b|² + tr(C_a + C_b - 2 √(C_a C_b)): of Gaussians with the moments of two sets."""
    m_a, m_b = a.double().mean(0), b.double().mean(0)
    c_a, c_b = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(c_a @ c_b).real.clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * root).item()


def frechet_and_error(a, b):
    """The distance, and its standard error over draws of a: by the jackknife, a tenth left out."""
    tenth = torch.arange(len(a)) % 10
    without = torch.tensor([frechet_distance(a[tenth != i], b) for i in range(10)])
    return frechet_distance(a, b), (without.var(correction=0) * 9).sqrt().item()


def measure(network, ddpm, data, digits, seed):
    """All of it: (metrics, pictures). data: of load_mnist(); network: called like the UNet."""
    train_x, test_x, random = to_pixels(data[0]), to_pixels(data[2]), generator(seed, 0)
    classifier = train_classifier(train_x, data[1], seed)
    linear = GaussianEps(ddpm, train_x.mean(0), train_x.flatten(1).T.cov())
    methods = {"noisy": lambda x_t, t: torch.zeros_like(x_t), "linear": linear,
               "memory": EmpiricalEps(ddpm, train_x), "network": network}
    seen = {"memory": test_x[:1000]}  # it is slow
    losses = {name: measure_loss(model, ddpm, seen.get(name, test_x))
              for name, model in methods.items()}
    chosen, rest = torch.randperm(len(test_x), generator=random).tensor_split([digits])
    x_0, labels = test_x[chosen], data[3][chosen]

    def reverse(x, t=ddpm.T):
        """Where (2) leads from x_t: (x_0, [(s, x_s) of 16 of them for each s])."""
        path, steps = [(t, x[:16])], ddpm.p_sample(network, x, t, generator=random)
        for s, x in progress(steps, f"{digits} digits back from t = {t}: step", t):
            path.append((s, x[:16].clone()))
        return x, path

    denoising, pictures = measure_denoising(methods, reverse, ddpm, x_0, labels, classifier, random)
    noise = torch.randn(x_0.shape, generator=random)
    matched = linear.sample(digits, random).float().reshape(x_0.shape)
    pictures["made"] = {
        "real digits": x_0, "noised digits": pictures["reverse"][ddpm.T][0],
        "matched Gaussian": reverse(ddpm.q_sample(matched, ddpm.T, noise))[0],
        "N(0, I)": reverse(torch.randn(x_0.shape, generator=random))[0]}
    others = torch.cat([classifier[:-1](x) for x in test_x[rest].split(100)])
    generation = {name: {"frechet": frechet_and_error(classifier[:-1](x), others),
                         "sure": mean_and_error((classifier(x).softmax(1).amax(1) > 0.9).float())}
                  for name, x in pictures["made"].items()}
    metrics = {"losses": losses, "denoising": denoising, "generation": generation,
               "grey": grey_pixels(network, ddpm, x_0, min(denoising), random),
               "clean": mean_and_error((classifier(x_0).argmax(1) == labels).float())}
    return metrics, pictures


def like_the_default(runs):
    """Those that are told t and learn by Muon."""
    return [run for run in runs if run["settings"]["told_t"] and run["settings"]["muon"]]


def fit_limit(runs):
    """(a, b, c): the loss a + b / steps^c that is nearest to those of the runs; a is its limit."""
    steps, losses = np.array([(run["settings"]["steps"], run["loss"][0]) for run in runs]).T
    c = min(np.arange(0.1, 2, 0.01),  # the one that leaves the least sum of squares
            key=lambda c: np.polyfit(steps**-c, losses, 1, full=True)[1].sum())
    b, a = np.polyfit(steps**-c, losses, 1)
    return a, b, c


def in_hundreds(model):
    """The model as a function on the CPU, a hundred digits at a time, wherever the model is."""
    device = pick_device()
    model = model.to(device, memory_format=torch.channels_last)

    def network(x_t, t):
        chunks = zip(x_t.split(100), t.split(100))
        return torch.cat([model(x.to(device), s.to(device)).cpu() for x, s in chunks])
    return network


def print_table(metrics):
    """The measurements, in the width of a terminal and in ASCII."""
    print(f"\nPSNR in dB, and digits read rightly ({metrics['clean'][0]:.0%} of the clean ones)")
    print("   t" + "".join(f"{name:>14}" for name in STYLES))
    for t, row in metrics["denoising"].items():
        cells = [f"{cell['psnr'][0]:9.1f} {cell['read'][0]:4.0%}" for cell in row.values()]
        print(f"{t:4}" + "".join(cells))
    print("loss" + "".join(f"{row['loss'][0]:14.4f}" for row in metrics["losses"].values()))
    for name, row in metrics["generation"].items():
        print(f"from {name}: Frechet distance {row['frechet'][0]:.1f} +- {row['frechet'][1]:.1f}, "
              f"{row['sure'][0]:.0%} surely read")


# Drawing

def read_image(path):
    """A picture file as (3, H, W) in [-1, 1], what is transparent laid on white."""
    try:
        pixels = torch.tensor(np.atleast_3d(imread(path))).permute(2, 0, 1)
    except Exception as error:  # a damaged picture can make the decoder raise almost anything
        raise InputError(f"{path} can't be read as a picture ({error}): --image takes a PNG file")
    largest = 1 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
    pixels = pixels / largest
    opacity = pixels[3:] if len(pixels) == 4 else 1
    return (pixels[:3] * opacity + (1 - opacity)).expand(3, -1, -1) * 2 - 1


def new_figure(width, height, rows=1, columns=1):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def show(axes, picture):
    """A picture (channels, H, W), from -1 (black) to 1 (white)."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    axes.imshow(pixels.expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[], frame_on=False)
    axes.grid(False)


def draw_forward(image):
    """Sheet (3): x_0, x_3, x_10, x_30, x_100, x_200 of one path of (1)."""
    ddpm, random = DDPM(linear_beta()), generator(0)
    figure, axes = new_figure(12, 8.6, 2, 3)
    cells = dict(zip((0, 3, 10, 30, 100, 200), axes.flat))
    x = image[None]
    for t in range(ddpm.T + 1):
        x = ddpm.q_step(x, t, torch.randn(x.shape, generator=random)) if t else x
        if t in cells:
            signal = ddpm.alpha_bar[t].item()
            ratio = f"{signal / (1 - signal):,.4g}" if t else "∞"
            show(cells[t], x[0])
            cells[t].set_title(f"$x_{{{t}}}$", fontsize=20)
            cells[t].set_xlabel(f"$\\sqrt{{\\bar{{\\alpha}}_t}}$ = {signal**0.5:.4f}, "
                                f"signal : noise = {ratio}", fontsize=15)
    return figure


def draw_marginal(images):
    """Question 1: where the pixels of x_t are, and paths of (1) from one x_0 with (5) around."""
    ddpm, random = DDPM(linear_beta()), generator(0)
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic([[0, 30, 100, 200], ["paths"] * 4])
    grid = torch.linspace(-4, 4, 400)
    for t in 0, 30, 100, 200:
        noise = torch.randn(images.shape, generator=random)
        x_t = ddpm.q_sample(images, t, noise) if t else images
        axes[t].hist(x_t.flatten().numpy(), 160, range=(-4, 4), density=True, color=SIGNAL)
        axes[t].plot(grid, (-grid**2 / 2).exp() / (2 * np.pi) ** 0.5, "--", color=NOISE)
        axes[t].set(title=f"MNIST at t = {t}", xlabel="$x_t$, all pixels", ylim=(0, 1.5),
                    xticks=(-3, -1, 0, 1, 3))
    axes[0].set_ylabel("density")
    black = (images == -1).float().mean()
    axes[0].text(1.2, 1.2, f"{black:.0%} are\nblack, -1\n(bar cut)", fontsize=10)
    axes[200].text(1.2, 0.6, "dashed:\n$\\mathcal{N}(0, 1)$", color=NOISE)
    path = [torch.ones(40)]
    for t in range(1, ddpm.T + 1):
        path.append(ddpm.q_step(path[-1], t, torch.randn(40, generator=random)))
    below = axes["paths"]
    below.plot(torch.stack(path), color=NOISE, linewidth=0.7, alpha=0.6)
    mean, deviation = ddpm.alpha_bar.sqrt(), (1 - ddpm.alpha_bar).sqrt()
    below.plot(mean, color=SIGNAL, label="mean of (5): $\\sqrt{\\bar{\\alpha}_t}\\,x_0$")
    below.fill_between(range(ddpm.T + 1), mean - 2 * deviation, mean + 2 * deviation, color=SIGNAL,
                       alpha=0.25, label="± 2 standard deviations $\\sqrt{1-\\bar{\\alpha}_t}$")
    below.set(title="40 paths of the recurrence (1) from one white pixel, $x_0 = 1$", xlabel="t",
              ylabel="$x_t$", xlim=(0, ddpm.T))
    below.legend(loc="lower left")
    return figure


def normal(x, mean, variance):
    """A Gaussian's density over its maximum."""
    return (-(x - mean) ** 2 / (2 * variance)).exp()


def draw_bayes():
    """Question 2 for a single pixel: what x_0 says of x_{t-1}, what x_t says, and both together."""
    ddpm, x_0 = DDPM(linear_beta()), torch.tensor([1.0])
    figure, axes = new_figure(13, 4, 1, 3)
    for cell, t in zip(axes, (2, 20, 200)):
        alpha, before = ddpm.alpha[t], ddpm.alpha_bar[t - 1]
        x_t = ddpm.q_sample(x_0, t, torch.tensor([-1.5]))
        mean, variance = ddpm.posterior_mean(x_t, x_0, t), ddpm.posterior_variance(t)
        width = 3.5 * max(1 - before, ddpm.beta[t] / alpha).sqrt()
        x = mean + torch.linspace(-width, width, 500)
        cell.plot(x, normal(x, before.sqrt() * x_0, 1 - before), color=SIGNAL,
                  label="$p(x_{t-1}|x_0)$, from $x_0$")
        cell.plot(x, normal(x, x_t / alpha.sqrt(), ddpm.beta[t] / alpha), color=NOISE,
                  label="$p(x_t|x_{t-1})$, from $x_t$")
        cell.fill_between(x, normal(x, mean, variance), color=REVERSE, alpha=0.5,
                          label="product: $p(x_{t-1}|x_t,x_0)$")
        cell.axvline(mean, color="black", linestyle=":", label="its mean $\\mu(x_t,x_0)$, eq. (4)")
        share = ddpm.beta[t] / (1 - ddpm.alpha_bar[t])
        cell.set(title=f"t = {t}: $x_0$ has {share:.0%} of the weight", xlabel="$x_{t-1}$",
                 yticks=[], ylim=(0, 1.05))
    axes[0].set_ylabel("density / its maximum")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_schedule():
    """√ᾱ_t, √(1-ᾱ_t) and their squares' ratio, with the times of the condor marked."""
    alpha_bar, marked = DDPM(linear_beta()).alpha_bar, [3, 10, 30, 100, 200]
    figure, (left, right) = new_figure(12, 4, 1, 2)
    left.plot(alpha_bar.sqrt(), "-o", color=SIGNAL, markevery=marked,
              label="signal, $\\sqrt{\\bar{\\alpha}_t}$")
    left.plot((1 - alpha_bar).sqrt(), "-x", color=NOISE, markevery=marked,
              label="noise, $\\sqrt{1-\\bar{\\alpha}_t}$")
    left.set(title="$x_t$ = signal · $x_0$ + noise · $\\epsilon$", xlabel="t", ylabel="factor",
             xlim=(0, 203), ylim=(0, 1.05))
    left.legend()
    ratio = alpha_bar / (1 - alpha_bar)
    right.semilogy(ratio, "-o", color="black", markevery=marked)
    right.axhline(1, color=NOISE, linestyle=":")
    right.text(5, 0.8, "as much noise as signal", va="top", fontsize=10)
    right.set(title="signal-to-noise ratio", xlabel="t", xlim=(0, 203),
              ylabel="$\\bar{\\alpha}_t\\,/\\,(1-\\bar{\\alpha}_t)$")
    for t in marked:
        right.annotate(f"{t}", (t, ratio[t]), (6, 6), textcoords="offset points", fontsize=10)
    return figure


def draw_embedding():
    """The sines and cosines that the network is given for the time, against t."""
    waves = TimeEmbedding(64).waves(torch.arange(201)).numpy()
    figure, axes = new_figure(12, 4)
    picture = axes.imshow(waves.T, aspect="auto", cmap="gray", interpolation="nearest",
                          vmin=-1, vmax=1)  # the cosines don't quite reach -1
    axes.axhline(31.5, color="white", linewidth=4)
    axes.set(title="the time as the network is told it", xlabel="t", ylabel="from fast to slow",
             yticks=(16, 48), yticklabels=("sines", "cosines"))
    axes.grid(False)
    figure.colorbar(picture, ticks=(-1, 0, 1))
    return figure


def plain_ticks(axis, ticks):
    """On a logarithmic axis, these numbers as a person writes them, and no others."""
    axis.set_ticks(ticks, labels=ticks)
    axis.set_ticks([], minor=True)


def draw_losses(metrics, losses):
    """The training curve, from the losses of all steps, and the test loss (8) of methods by t."""
    figure, (left, right) = new_figure(14, 4.2, 1, 2)
    parts = losses.split(20)
    steps = np.cumsum([len(part) for part in parts])
    left.loglog(steps, [part.mean() for part in parts], color=NETWORK,
                label="training, mean over 20 steps")
    final = metrics["losses"]["network"]["loss"][0]
    left.axhline(final, color="black", linestyle=":", label=f"test loss at the end: {final:.4f}")
    left.set(title="training", xlabel="step", ylabel="loss (8)")
    plain_ticks(left.yaxis, (0.04, 0.05, 0.07, 0.1, 0.2, 0.5, 1))
    ticks = (20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
    plain_ticks(left.xaxis, [step for step in ticks if step <= len(losses)])
    left.legend()
    for name, row in metrics["losses"].items():
        label = STYLES[name]["label"].split(",")[0]
        label = "nothing, $\\epsilon_\\theta = 0$" if name == "noisy" else label
        style = STYLES[name] | {"label": f"{label}: {row['loss'][0]:.3g}"}
        right.semilogy(row["t"], row["loss_by_t"], **style, markersize=4)
    right.set(title="test digits, by time (the memory goes far above)", xlabel="t",
              ylabel="loss (8)", ylim=(0.01, 3))
    plain_ticks(right.yaxis, (0.01, 0.03, 0.1, 0.3, 1, 3))
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center",
                  title="test loss, mean over t")
    return figure


def draw_compute(runs):
    """The test loss of runs of several lengths with its fit, and of a run that is not told t."""
    figure, (left, right) = new_figure(12, 4.2, 1, 2)
    told = like_the_default(runs)
    a, b, c = fit_limit(told)
    lengths = [run["settings"]["steps"] for run in told]
    mean, error = np.array([run["loss"] for run in told]).T
    left.errorbar(lengths, mean, 2 * error, fmt="o", color=NETWORK)
    steps = np.geomspace(min(lengths), 4 * max(lengths), 99)
    left.plot(steps, a + b * steps**-c, "--", color=NETWORK,
              label=f"{a:.4f} + {b:.2f} / steps$^{{{c:.2f}}}$")
    left.axhline(a, color="black", linestyle=":", label=f"its limit, {a:.4f}")
    left.set(title="longer runs (±2 standard errors)", xlabel="steps of the run", xscale="log",
             ylabel="test loss (8) at its end")
    plain_ticks(left.xaxis, lengths)
    left.legend()
    for run in runs:
        if run["settings"]["steps"] == runs[0]["settings"]["steps"]:
            style, label = ("-o", "told t") if run["settings"]["told_t"] else ("--x", "not told t")
            right.semilogy(run["t"], run["loss_by_t"], style, color=NETWORK, markersize=5,
                           label=f"{label}: {run['loss'][0]:.4f}")
    right.set(title="must the network be told t?", xlabel="t", ylabel="test loss (8)")
    plain_ticks(right.yaxis, (0.02, 0.03, 0.05, 0.1))
    right.legend()
    return figure


def draw_quality(metrics):
    """PSNR of the estimate of x_0 and share of digits read rightly, against t, for each method."""
    figure, (left, right) = new_figure(12, 4.4, 1, 2)
    times = list(metrics["denoising"])
    for name, style in STYLES.items():
        cells = {t: row[name] for t, row in metrics["denoising"].items() if name in row}
        for axes, key in (left, "psnr"), (right, "read"):
            mean, error = np.array([cell[key] for cell in cells.values()]).T
            axes.errorbar(list(cells), mean, 2 * error, **style)
    left.set(title="how near is the estimate to the clean digit?", xlabel="t", xticks=times,
             ylabel="PSNR in dB (±2 standard errors)")
    left.legend()
    clean = metrics["clean"][0]
    right.axhline(clean, color="black", linestyle=":")
    right.text(times[-1], clean + 0.01, "clean digits", ha="right", fontsize=10)
    right.set(title="is it still the same digit?", xlabel="t", xticks=times, ylim=(0, 1.08),
              ylabel="read rightly (±2 standard errors)")
    right.yaxis.set_major_formatter("{x:.0%}")
    return figure


def draw_grid(rows, labels, titles, each=1, frames=()):
    """Rows of pictures, a label at the left of each, a title over each group of `each` columns."""
    _, height, width = rows[0][0].shape
    gap = width // 9
    top = [i * (height + gap) + gap for i in range(len(rows))]
    left = [j * (width + gap) + gap + j // each * 2 * gap for j in range(len(rows[0]))]
    page = torch.ones(1, top[-1] + height + gap, left[-1] + width + gap)
    for y, row in zip(top, rows):
        for x, picture in zip(left, row):
            page[:, y:y + height, x:x + width] = picture
    figure, axes = new_figure(3.4 + 0.026 * page.shape[2], 0.9 + 0.026 * page.shape[1])
    show(axes, page)
    axes.set_yticks([y + height / 2 for y in top], labels)
    middles = [(left[i] + left[i + each - 1] + width) / 2 for i in range(0, len(left), each)]
    axes.set_xticks(middles, titles)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for i, j in frames:
        axes.add_patch(Rectangle((left[j] - 1.5, top[i] - 1.5), width + 2, height + 2, fill=False,
                                 color=MISREAD, linewidth=3))
    return figure


def draw_denoising(pictures):
    """Test digits, noisy at several t, and what each method makes of them; misread ones framed."""
    times = list(pictures["reverse"])
    rows, misread = [[*pictures["clean"][:4]] * len(times)], []
    for i, name in enumerate(STYLES, start=1):
        rows.append([x for t in times for x in pictures[name][t][0][:4]])
        right = [right for t in times for right in pictures[name][t][1][:4]]
        misread += [(i, j) for j, is_right in enumerate(right) if not is_right]
    labels = ["clean digit"] + [style["label"] for style in STYLES.values()]
    figure = draw_grid(rows, labels, [f"t = {t}" for t in times], 4, misread)
    figure.supxlabel("in a yellow frame: no longer read as the digit that it was", fontsize=12)
    return figure


def estimates_on(path, network, ddpm):
    """(t, x_t, the x̂_0 that the network sees in x_t) for at most 41 times of a path to x_0."""
    for i in torch.linspace(0, len(path) - 1, min(41, len(path))).round().long().tolist():
        t, x = path[i]
        eps = network(x, torch.full((len(x),), t))
        yield t, x, ddpm.predict_x0(x, eps, t) if t else x


def draw_reverse(steps, x_0):
    """Three digits on their way back, and under each x_t the estimate of x_0 from it."""
    parts = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1)
    times, noisy, seen = zip(*(steps[round((len(steps) - 1) * part)] for part in parts))
    rows = [[x[i] for x in (*row, x_0)] for i in range(3) for row in (noisy, seen)]
    titles = [f"t = {t}" for t in times[:-1]] + ["result", "original"]
    return draw_grid(rows, 3 * ["$x_t$", "$\\hat{x}_0$ seen in it"], titles)


def draw_generation(made):
    """Digits drawn from three kinds of x_T, and real ones."""
    labels = [name if name == "real digits" else f"from {name}" for name in made]
    return draw_grid([x[:14] for x in made.values()], labels, [""], 14)


def film(steps, path):
    """An animated GIF: 16 digits walk back from x_T, with the estimates of x_0 beside them."""
    figure = Figure(figsize=(4.8, 2.65))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.88, wspace=0.03)
    with tempfile.TemporaryDirectory() as folder:
        writer = PillowWriter(fps=5)
        with writer.saving(figure, f"{folder}/film.gif", dpi=100):
            for t, x, estimate in steps[::2] + 8 * steps[-1:]:  # the last one stays
                for axes, digits in (left, x), (right, estimate):
                    axes.clear()
                    rows = [torch.cat([*row], dim=2) for row in digits.split(4)]
                    show(axes, torch.cat(rows, dim=1))
                left.set_title(f"$x_t$, t = {t}")
                right.set_title("$\\hat{x}_0$ seen in it")
                writer.grab_frame()
        write_file(path, lambda file: file.write(Path(folder, "film.gif").read_bytes()))
    print(path)


def save(figure, folder, name):
    for kind in "png", "pdf":
        write_file(folder / f"{name}.{kind}", lambda file: figure.savefig(
            file, format=kind, metadata={"CreationDate": None}))
    print(folder / f"{name}.png")


def draw_without_network(image, images, out):
    save(draw_forward(image), out, "forward")
    save(draw_marginal(to_pixels(images[:2000])), out, "marginal")
    save(draw_bayes(), out, "bayes")
    save(draw_schedule(), out, "schedule")
    save(draw_embedding(), out, "embedding")


def measure_and_draw(states, data, digits, seed, out):
    """Write metrics.json, and the figures of the first of the networks beside the others."""
    network, ddpm = in_hundreds(states[0]["network"]), states[0]["ddpm"]
    metrics, pictures = measure(network, ddpm, data, digits, seed)
    test_x = to_pixels(data[2])
    runs = [metrics["losses"]["network"] | {"settings": states[0]["settings"]}]
    for state in states[1:]:
        row = measure_loss(in_hundreds(state["network"]), state["ddpm"], test_x)
        runs.append(row | {"settings": state["settings"]})
    metrics |= {"digits": digits, "seed": seed, "runs": runs}
    numbers = json.dumps(metrics, indent=1).encode()
    write_file(out / "metrics.json", lambda file: file.write(numbers))
    print_table(metrics)
    save(draw_losses(metrics, states[0]["losses"]), out, "losses")
    save(draw_quality(metrics), out, "quality")
    save(draw_denoising(pictures), out, "denoising")
    save(draw_generation(pictures["made"]), out, "generation")
    steps = list(estimates_on(pictures["path"], network, ddpm))
    save(draw_reverse(steps, pictures["clean"]), out, "reverse")
    film(steps, out / "reverse.gif")
    if len(like_the_default(runs)) > 2:
        save(draw_compute(runs), out, "compute")


def main():
    parser = new_parser(__doc__, "out/figures")
    parser.add_argument("--image", type=Path, default=Path(__file__).parent / "condor.png",
                        metavar="PNG", help="for the forward process (default: condor.png)")
    parser.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE",
                        help="what to measure, and others beside it (default: out/model.pt)")
    parser.add_argument("--digits", type=int, default=50, metavar="N",
                        help="test digits that walk through the reverse process (default: 50)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")
    flags = parser.parse_args()
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}, got {flags.seed}")
    image, data = read_image(flags.image), load_mnist(flags.data)
    paths = flags.checkpoint or Path("out").glob("model.pt")
    checksum = zlib.crc32(data[0].numpy())
    states = [read_checkpoint(path, checksum) for path in paths]
    if states and not 16 <= flags.digits <= len(data[2]) // 2:
        raise InputError(f"--digits must be from 16 to {len(data[2]) // 2}, half the test digits")
    flags.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(LOOK):
        draw_without_network(image, data[0], flags.out)
        if states:
            measure_and_draw(states, data, flags.digits, flags.seed, flags.out)
        else:
            print("the other figures show a trained network: run python train.py first")


if __name__ == "__main__":
    run_command(main)
