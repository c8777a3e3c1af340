"""Draw the equations, and evaluate a trained network: out/model.pt -> out/figures/.

    python figures.py                       all figures; before train.py, those without a network
    python figures.py --image photo.png     with another picture than the condor
"""
import json
import zlib
from dataclasses import asdict
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib import ticker
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from torch import nn

import train
from ddpm import DDPM, EmpiricalEps, GaussianEps, linear_beta
from train import InputError, batched, generator, mean_and_sem, progress, say, to_pixels
from unet import TimeEmbedding

TIMES = (0.05, 0.125, 0.25, 0.5, 0.75, 1)  # where denoising is measured, as fractions of T
SAMPLED_TIMES = (0.25, 0.5, 1)  # from where the reverse process starts as well: it is slow
SHOWN = 16  # digits whose way through the reverse process is drawn
ENOUGH = 500  # digits for a Fréchet distance: of 50 real ones it is 32 ± 19

# One colour (Okabe and Ito's, safe for the colour-blind) and marker for one thing in all figures.
SIGNAL, NOISE, MISREAD = "#CC79A7", "#7f7f7f", "#FFD400"
STYLES = {
    "noisy": {"color": NOISE, "marker": "x", "label": r"no denoising, $x_t/\sqrt{\bar{\alpha}_t}$"},
    "linear": {"color": "#E69F00", "marker": "s", "label": "best linear denoiser (Wiener)"},
    "memorising": {"color": "#009E73", "marker": "^", "label": "memorising denoiser"},
    "network": {"color": "#0072B2", "marker": "o", "label": r"network, estimate $\hat{x}_0$"},
    "reverse": {"color": "#D55E00", "marker": "D", "label": "network, reverse process"},
}
NETWORK, REVERSE = STYLES["network"]["color"], STYLES["reverse"]["color"]
RC = {"font.size": 12, "axes.titlesize": 13, "legend.fontsize": 12, "legend.frameon": False,
      "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
      "lines.linewidth": 2, "errorbar.capsize": 3, "savefig.dpi": 150, "savefig.bbox": "tight",
      "figure.constrained_layout.h_pad": 0.12, "figure.constrained_layout.w_pad": 0.12}


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
    """A picture file, as matplotlib reads it, as (3, H, W) in [-1, 1].

    An alpha channel is laid on white. A PNG's transparent colour (tRNS) and the rotation in a
    photo's EXIF are ignored. Raises InputError if it can't be read.
    """
    try:
        pixels = torch.tensor(np.atleast_3d(imread(path))).permute(2, 0, 1)
    except Exception as error:  # a damaged picture can make the decoder raise almost anything
        raise InputError(f"{path} can't be read as a picture: --image takes a PNG or JPEG file"
                         ) from error
    largest = 1 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
    pixels = pixels / largest
    opacity = pixels[3:] if len(pixels) == 4 else 1
    return (pixels[:3] * opacity + (1 - opacity)).expand(3, -1, -1) * 2 - 1


def draw_forward(image):
    """Sheet (3): x_0, x_3, x_10, x_30, x_100, x_200 of one path of (1)."""
    ddpm, rng = DDPM(linear_beta()), generator(0)
    figure, axes = new_figure(12, 8.6, 2, 3)
    cells = dict(zip((0, 3, 10, 30, 100, 200), axes.flat, strict=True))
    show(cells[0], image)
    cells[0].set_title("$x_0$", fontsize=20)
    x = image[None]
    for t in progress(range(1, ddpm.T + 1), "forward process: step", ddpm.T):
        x = ddpm.q_step(x, t, torch.randn(x.shape, generator=rng))
        if t in cells:
            signal = ddpm.alpha_bar[t].item()
            show(cells[t], x[0])
            cells[t].set_title(f"$x_{{{t}}}$", fontsize=20)
            cells[t].set_xlabel(f"$\\sqrt{{\\bar{{\\alpha}}_t}}$ = {signal**0.5:.4f}, "
                                f"SNR = {signal / (1 - signal):,.4g}", fontsize=13)
    return figure


def draw_marginal(x_0):
    """Question 1: the pixels of x_t over the data, and paths of (1) from one pixel, with (5)."""
    ddpm, rng = DDPM(linear_beta()), generator(0)
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic([[0, 30, 100, 200], ["paths"] * 4])
    grid = torch.linspace(-4, 4, 400)
    for t in 0, 30, 100, 200:
        eps = torch.randn(x_0.shape, generator=rng)
        x_t = ddpm.q_sample(x_0, t, eps) if t else x_0
        axes[t].hist(x_t.flatten().numpy(), 160, range=(-4, 4), density=True, color=SIGNAL)
        axes[t].plot(grid, (-grid**2 / 2).exp() / (2 * np.pi) ** 0.5, "--", color=NOISE,
                     label=r"$\mathcal{N}(0, 1)$")
        axes[t].set(title=f"the data at t = {t}", xlabel="$x_t$, all pixels", ylim=(0, 1.5),
                    xticks=(-3, -1, 1, 3))
    axes[0].set_ylabel(f"density, cut at 1.5 ({(x_0 == -1).float().mean():.0%} are black)")
    axes[0].legend()
    path = [torch.ones(40)]
    for t in range(1, ddpm.T + 1):
        path.append(ddpm.q_step(path[-1], t, torch.randn(40, generator=rng)))
    below = axes["paths"]
    below.plot(torch.stack(path), color=NOISE, linewidth=0.7, alpha=0.6)
    mean, deviation = ddpm.alpha_bar.sqrt(), (1 - ddpm.alpha_bar).sqrt()
    below.plot(mean, color=SIGNAL, label=r"mean of (5): $\sqrt{\bar{\alpha}_t}\,x_0$")
    below.fill_between(range(ddpm.T + 1), mean - 2 * deviation, mean + 2 * deviation, color=SIGNAL,
                       alpha=0.25, label=r"± 2 standard deviations $\sqrt{1-\bar{\alpha}_t}$")
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
    for cell, t in zip(axes, (2, 20, 200), strict=True):
        alpha, beta, alpha_bar_prev = ddpm.alpha[t], ddpm.beta[t], ddpm.alpha_bar[t - 1]
        x_t = ddpm.q_sample(x_0, t, torch.tensor([-1.5]))
        mean, variance = ddpm.posterior_mean(x_t, x_0, t), ddpm.posterior_variance(t)
        width = 3.5 * max(1 - alpha_bar_prev, beta / alpha).sqrt()
        x = mean + torch.linspace(-width, width, 500)
        cell.plot(x, normal(x, alpha_bar_prev.sqrt() * x_0, 1 - alpha_bar_prev), color=SIGNAL,
                  label="$p(x_{t-1}|x_0)$, from $x_0$")
        cell.plot(x, normal(x, x_t / alpha.sqrt(), beta / alpha), color=NOISE,
                  label="$p(x_t|x_{t-1})$, from $x_t$")
        cell.fill_between(x, normal(x, mean, variance), color=REVERSE, alpha=0.5,
                          label="product: $p(x_{t-1}|x_t,x_0)$")
        cell.axvline(mean, color="black", linestyle=":", label="its mean $\\mu(x_t,x_0)$, eq. (4)")
        share = beta / (1 - ddpm.alpha_bar[t])
        cell.set(title=f"t = {t}: $x_0$ has {share:.0%} of the weight", xlabel="$x_{t-1}$",
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

def train_classifier(x, labels):
    """A small network that reads digits; classifier[:-1](x) are the 32 features it decides by."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        classifier = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, int(labels.max()) + 1))
    batches = torch.randperm(len(x), generator=generator(0, 1)).split(100)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(batches) + 1)
    for batch in progress(batches, "classifier: batch", len(batches)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(x[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


def linear_baseline(ddpm, x):
    """The best linear denoiser of pictures x; None, with a message, if it would take too long."""
    if x[0].numel() > 3000:
        say("no best linear denoiser: for pictures of over 3000 pixels it takes too long")
        return None
    return GaussianEps.fit(ddpm, x)


def as_denoiser(model):
    """A trained model as a function on the CPU, a hundred digits at a time, on any device."""
    device = train.pick_device()
    model = model.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def network(x_t, t):
        return batched(lambda x, s: model(x.to(device), s.to(device)).cpu(), x_t, t)
    return network


def measure_loss(model, ddpm, x_0):
    """The loss (8) of a denoiser: {"loss": (mean, sem), "t": [...], "loss_by_t": [...]} in bins."""
    losses, t = train.evaluate(model, ddpm, x_0), train.even_times(len(x_0), ddpm.T)
    index = (t - 1) * 20 // ddpm.T
    bins = [index == i for i in index.unique()]
    return {"loss": mean_and_sem(losses), "t": [t[i].double().mean().item() for i in bins],
            "loss_by_t": [losses[i].mean().item() for i in bins]}


def score(x0_hat, x_0, labels, classifier):
    """Of estimates of x_0: PSNR in dB and the accuracy of the classifier, each (mean, sem)."""
    error = (x0_hat - x_0).square().flatten(1).mean(1)
    correct = classifier(x0_hat).argmax(1) == labels
    return {"psnr": mean_and_sem(10 * (4 / error).log10()),
            "accuracy": mean_and_sem(correct.float())}


def times_at(fractions, T):
    return list(dict.fromkeys(max(1, round(fraction * T)) for fraction in fractions))


def reverse_process(network, ddpm, x_t, t, rng):
    """The x_0 that (2) leads to from x_t, and [(s, x_s)] on the way there for the first digits."""
    path, steps = [(t, x_t[:SHOWN])], ddpm.p_sample_loop(network, x_t, t, generator=rng)
    for s, x in progress(steps, f"{len(x_t)} digits from t = {t}: step", t):
        path.append((s, x[:SHOWN].clone()))
    return x, path


def denoise(denoisers, ddpm, x_0, rng):
    """Digits x_0, noised to several t and denoised: {t: {method: x̂_0}}, and the path from T.

    Estimates are clamped to the range of pixels; the noisy digits are not.
    """
    noisy = {t: ddpm.q_sample(x_0, t, torch.randn(x_0.shape, generator=rng))
             for t in times_at(TIMES, ddpm.T)}
    estimates, paths = {t: {} for t in noisy}, {}
    for t, x_t in noisy.items():
        for name, model in denoisers.items():
            eps = batched(model, x_t, torch.full((len(x_t),), t))
            x0_hat = ddpm.predict_x0(x_t, eps, t)
            estimates[t][name] = x0_hat if name == "noisy" else x0_hat.clamp(-1, 1)
    for t in times_at(SAMPLED_TIMES, ddpm.T):
        x, paths[t] = reverse_process(denoisers["network"], ddpm, noisy[t], t, rng)
        estimates[t]["reverse"] = x.clamp(-1, 1)
    return estimates, paths[ddpm.T]


def frechet_distance(a, b):
    """|m_a - m_b|² + tr(C_a + C_b - 2 √(C_a C_b)): of Gaussians with the moments of two sets."""
    m_a, m_b = a.double().mean(0), b.double().mean(0)
    c_a, c_b = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(c_a @ c_b).real.clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + c_a.trace() + c_b.trace() - 2 * root).item()


def frechet_and_sem(a, b):
    """The distance, and its standard error over draws of a: by the jackknife, a tenth left out."""
    tenth = torch.arange(len(a)) % 10
    without = torch.tensor([frechet_distance(a[tenth != i], b) for i in range(10)])
    return frechet_distance(a, b), (without.var(correction=0) * 9).sqrt().item()


def matched_gaussian(linear, n, rng):
    """n draws, (n, D), from the Gaussian with the mean and covariance of x_T, by (5)."""
    signal = linear.ddpm.alpha_bar[-1]
    variances = signal * linear.eigenvalues + 1 - signal
    z = torch.randn(n, len(variances), generator=rng, dtype=torch.float64)
    return signal.sqrt() * linear.mean + z * variances.sqrt() @ linear.eigenvectors.T


def draw_samples(network, ddpm, linear, n, shape, rng):
    """n digits by the reverse process, from N(0, I) and from the matched Gaussian."""
    starts = {}
    if linear:
        starts["matched Gaussian"] = matched_gaussian(linear, n, rng).float().reshape(n, *shape)
    starts["N(0, I)"] = torch.randn(n, *shape, generator=rng)
    return {name: reverse_process(network, ddpm, x_T, ddpm.T, rng)[0].clamp(-1, 1)
            for name, x_T in starts.items()}


def measure_samples(samples, reference, classifier):
    """The Fréchet distance of samples to other digits, and the share with confidence > 0.9."""
    features = batched(classifier[:-1], reference)
    return {name: {"frechet": frechet_and_sem(classifier[:-1](x), features),
                   "confident": mean_and_sem((classifier(x).softmax(1).amax(1) > 0.9).float())}
            for name, x in samples.items()}


def measure(network, ddpm, data, digits):
    """All of it, for one network: (metrics, pictures). data: of load_mnist().

    The memorising denoiser is the exact posterior mean over the training digits.
    """
    train_x, test_x, rng = to_pixels(data[0]), to_pixels(data[2]), generator(0, 0)
    classifier, linear = train_classifier(train_x, data[1]), linear_baseline(ddpm, train_x)
    denoisers = {"noisy": lambda x_t, t: torch.zeros_like(x_t), "linear": linear,
                 "memorising": EmpiricalEps(ddpm, train_x), "network": network}
    denoisers = {name: model for name, model in denoisers.items() if model}
    part = test_x[::max(1, len(test_x) // 1000)]  # it is slow
    losses = {name: measure_loss(model, ddpm, part if name == "memorising" else test_x)
              for name, model in denoisers.items()}

    index, rest = torch.randperm(len(test_x), generator=rng).tensor_split([digits])
    x_0, labels = test_x[index], data[3][index]
    estimates, path = denoise(denoisers, ddpm, x_0, rng)
    samples = {"real digits": x_0, "noised digits": estimates[ddpm.T]["reverse"]}
    samples |= draw_samples(network, ddpm, linear, digits if digits >= ENOUGH else 12,
                            x_0.shape[1:], rng)

    metrics = {"losses": losses, "digits": digits,
               "clean": score(x_0, x_0, labels, classifier)["accuracy"],
               "denoising": {t: {name: score(x0_hat, x_0, labels, classifier)
                                 for name, x0_hat in row.items()} for t, row in estimates.items()}}
    if digits >= ENOUGH:
        metrics["generation"] = measure_samples(samples, test_x[rest], classifier)
    first = [labels[:SHOWN].tolist().index(label) for label in labels[:SHOWN].unique()]
    four = first[:4]
    shown = {t: {name: (x[four], classifier(x[four]).argmax(1) != labels[four])
                 for name, x in row.items()} for t, row in estimates.items() if "reverse" in row}
    return metrics, {"x_0": x_0[:SHOWN], "first": first, "denoised": shown, "samples": samples,
                     "path": path}


def print_table(metrics):
    """The measurements, in the width of a terminal and in ASCII."""
    say(f"\nPSNR in dB, accuracy of a classifier ({metrics['clean'][0]:.0%} of the clean digits)")
    say("   t" + "".join(f"{name:>14}" for name in [*metrics["losses"], "reverse"]))
    for t, row in metrics["denoising"].items():
        cells = [row[name] for name in STYLES if name in row]
        say(f"{t:4}" + "".join(f"{cell['psnr'][0]:9.1f} {cell['accuracy'][0]:4.0%}"
                               for cell in cells))
    say("loss" + "".join(f"{row['loss'][0]:14.4f}" for row in metrics["losses"].values()))
    for name, row in metrics.get("generation", {}).items():
        say("{}: Frechet distance {:.1f} +- {:.1f}".format(name, *row["frechet"]))
    if "generation" not in metrics:
        say(f"Frechet distances are unreliable below {ENOUGH} digits: --digits 1000 gives them")


def fit_power_law(steps, losses):
    """The a, b, c of a + b / steps^c nearest to each of k columns of losses, (n, k): (3, k)."""
    fits = []
    for c in np.arange(0.1, 2, 0.01):
        (b, a), error, *_ = np.polyfit(steps**-c, losses, 1, full=True)
        fits.append([a, b, np.full_like(a, c), error])
    fits = np.array(fits)
    return fits[fits[:, 3].argmin(0), :3, np.arange(losses.shape[1])].T


def differ_in_nothing_but(settings, a, b):
    """Are two runs comparable, but for these settings of their Config?"""
    return all(a["config"][name] == b["config"][name] for name in a["config"].keys() - settings)


def fit_runs(runs):
    """Steps and losses of comparable runs, their fit_power_law, (3, 1), and 1000 resampled fits.

    Comparable: finished runs that differ from the first in nothing but steps and seed. A resampled
    fit has noise on each loss, of the spread of the runs around the fit. None for the fit with
    fewer than three lengths, and for the resampled ones with three runs.
    """
    finished = [run for run in runs if run["steps"] == run["config"]["steps"]]
    alike = [run for run in finished if differ_in_nothing_but({"steps", "seed"}, run, runs[0])]
    steps = np.array([run["steps"] for run in alike], float)
    losses = np.array([run["loss"][0] for run in alike])
    if len(set(steps)) < 3:
        return steps, losses, None, None
    a, b, c = fit = fit_power_law(steps, losses[:, None])
    if len(steps) == 3:
        return steps, losses, fit, None
    spread = (np.square(losses - a - b * steps**-c).sum() / (len(steps) - 3)) ** 0.5
    noise = spread * np.random.default_rng(0).standard_normal((len(steps), 1000))
    return steps, losses, fit, fit_power_law(steps, losses[:, None] + noise)


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
        label = STYLES[name]["label"].split(",")[0]
        style = STYLES[name] | {"label": f"{label}: {row['loss'][0]:.3g}"}
        right.semilogy(row["t"], row["loss_by_t"], **style, markersize=4)
    right.set(title="test digits, by time", xlabel="t", ylim=(0.01, 3),
              ylabel="loss (8), cut at 3")
    plain_ticks(right.yaxis, (1, 2, 3, 5))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  title="test loss (8), mean over t", fontsize=11)
    return figure


def draw_compute(runs):
    """The test loss of runs of several lengths, and with and without time conditioning."""
    figure, (left, right) = new_figure(12, 4.2, 1, 2)
    steps, losses, fit, resampled = fit_runs(runs)
    left.plot(steps, losses, "o", color=NETWORK, label="a run of train.py")
    if fit is not None:
        grid = np.geomspace(min(steps), 2 * max(steps), 99)[:, None]
        a, b, c = fit
        left.plot(grid, a + b * grid**-c, "--", color=NETWORK,
                  label=f"{a[0]:.4f} + {b[0]:.2f} / steps$^{{{c[0]:.2f}}}$")
    if resampled is not None:
        a, b, c = resampled
        low, high = np.percentile(a, (2.5, 97.5))
        left.fill_between(grid[:, 0], *np.percentile(a + b * grid**-c, (2.5, 97.5), axis=1),
                          color=NETWORK, alpha=0.25,
                          label=f"95% of resampled fits\nlimit: {low:.4f} to {high:.4f}")
    left.set(title="longer runs", xlabel="steps of the run", xscale="log",
             ylabel="test loss (8) at its end")
    lengths = sorted(set(steps))
    left.set_xticks(lengths, labels=[f"{n:.0f}" for n in lengths])
    left.minorticks_off()
    left.legend(loc="upper right")
    for run in runs:
        if differ_in_nothing_but({"time_conditioning"}, run, runs[0]):
            style, word = "-o", "with"
            if not run["config"]["time_conditioning"]:
                style, word = "--x", "without"
            right.semilogy(run["t"], run["loss_by_t"], style, color=NETWORK, markersize=5,
                           label=f"{word} time conditioning: {run['loss'][0]:.4f}")
    right.set(title="does the network need t?", xlabel="t", ylabel="test loss (8)")
    plain_ticks(right.yaxis, (1, 2, 3, 5))
    right.legend()
    return figure


def draw_quality(metrics):
    """PSNR of the estimate of x_0, and accuracy of a classifier, against t, for each method."""
    figure, (left, right) = new_figure(12, 5, 1, 2)
    times = list(metrics["denoising"])
    for name, style in STYLES.items():
        cells = {t: row[name] for t, row in metrics["denoising"].items() if name in row}
        for axes, key in (left, "psnr"), (right, "accuracy"):
            if cells:
                mean, sem = np.array([cell[key] for cell in cells.values()]).T
                axes.errorbar(list(cells), mean, 2 * sem, **style)
    left.set(title="how close is the estimate to the clean digit?", xlabel="t", xticks=times,
             ylabel="PSNR in dB (±2 standard errors)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    clean = metrics["clean"][0]
    right.axhline(clean, color="black", linestyle=":")
    right.text(times[-1], clean + 0.01, "clean digits", ha="right", fontsize=10)
    right.set(title="is it still the same digit? (a classifier)", xlabel="t", xticks=times,
              ylim=(0, 1.08), ylabel="accuracy (±2 standard errors)")
    right.yaxis.set_major_formatter("{x:.0%}")
    return figure


def tiled(rows):
    """One picture of rows of pictures."""
    return torch.cat([torch.cat([*row], dim=2) for row in rows], dim=1)


def draw_grid(rows, labels, titles, frames=()):
    """Rows of pictures, (n, 1, H, W) each, with labels; titles over equal parts; (i, j) framed."""
    page = tiled(nn.functional.pad(row, 4 * [2], value=1) for row in rows)
    _, height, width = page.shape
    figure, axes = new_figure(3.4 + 0.026 * width, 0.9 + 0.026 * height)
    show(axes, page)
    axes.set_yticks((torch.arange(len(rows)) + 0.5) * height / len(rows), labels)
    axes.set_xticks((torch.arange(len(titles)) + 0.5) * width / len(titles), titles)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    width, height = width / len(rows[0]), height / len(rows)
    for i, j in frames:
        axes.add_patch(Rectangle((j * width, i * height), width - 1, height - 1, fill=False,
                                 color=MISREAD, linewidth=3))
    return figure


def draw_denoising(x_0, denoised):
    """Digits, noisy at several t, and what each method makes of them; misread ones framed."""
    names = [name for name in STYLES if name in denoised[max(denoised)]]
    rows, frames = [torch.cat(len(denoised) * [x_0])], []
    for name in names:
        x0_hat, misread = zip(*(row[name] for row in denoised.values()), strict=True)
        frames += [(len(rows), j) for j in torch.cat(misread).nonzero().flatten()]
        rows.append(torch.cat(x0_hat))
    labels = ["clean digit"] + [STYLES[name]["label"] for name in names]
    figure = draw_grid(rows, labels, [f"t = {t}" for t in denoised], frames)
    for x in torch.linspace(0, 1, len(denoised) + 1)[1:-1]:
        figure.axes[0].axline((x, 0), (x, 1), transform=figure.axes[0].transAxes, color=NOISE)
    figure.supxlabel("yellow frame: the classifier takes it for another digit", fontsize=12)
    return figure


def estimates_along(path, network, ddpm):
    """(t, x_t, the network's x̂_0 from x_t) for at most 41 times of a path to x_0."""
    for i in torch.linspace(0, len(path) - 1, min(41, len(path))).round().long().tolist():
        t, x = path[i]
        yield t, x, ddpm.predict_x0(x, network(x, torch.full((len(x),), t)), t) if t else x


def draw_reverse(steps, x_0, index):
    """Digits on their way back, under each x_t the estimate of x_0 from it, and the originals."""
    parts = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1)
    times, *pair = zip(*(steps[round((len(steps) - 1) * part)] for part in parts), strict=True)
    rows = [torch.stack([x[i] for x in (*row, x_0)]) for i in index for row in pair]
    titles = [f"t = {t}" for t in times[:-1]] + ["result", "original"]
    return draw_grid(rows, len(index) * ["$x_t$", r"estimate $\hat{x}_0$"], titles)


def draw_generation(samples):
    """Digits drawn from three kinds of x_T, and real ones."""
    labels = [name if name == "real digits" else f"from {name}" for name in samples]
    return draw_grid([x[:12] for x in samples.values()], labels, [])


def save_gif(steps, x_0, path):
    """An animated GIF: digits in the reverse process from x_T, their estimates, and originals."""
    figure, axes = new_figure(7.2, 2.65, 1, 3)
    writer = PillowWriter(fps=5)
    with writer.saving(figure, path, dpi=100):
        for t, x, x0_hat in steps[::2] + 8 * steps[-1:]:  # the last one stays
            titles = f"$x_t$, t = {t}", r"estimate $\hat{x}_0$", "original"
            for cell, digits, title in zip(axes, (x, x0_hat, x_0), titles, strict=True):
                cell.clear()
                show(cell, tiled(digits.split(4)))
                cell.set_title(title)
            writer.grab_frame()
    say(path)


def measure_and_draw(states, data, digits, out):
    """Write metrics.json, and the figures of the first of the networks beside the others."""
    first, test_x = states[0], to_pixels(data[2])
    network, ddpm = as_denoiser(first["network"]), first["ddpm"]
    metrics, pictures = measure(network, ddpm, data, digits)
    rows = [metrics["losses"]["network"]] + [
        measure_loss(as_denoiser(state["network"]), state["ddpm"], test_x) for state in states[1:]]
    metrics["runs"] = [{"config": asdict(state["config"]), "steps": len(state["losses"])} | row
                       for state, row in zip(states, rows, strict=True)]
    text = json.dumps(json.loads(json.dumps(metrics), parse_constant=lambda _: None), indent=1)
    train.write_file(out / "metrics.json", text.encode())
    print_table(metrics)
    if "null" in text:
        say("null in metrics.json means infinite, such as the PSNR of an exact estimate")

    x_0, first_of_class = pictures["x_0"], pictures["first"]
    steps = list(estimates_along(pictures["path"], network, ddpm))
    figures = {"losses": draw_losses(metrics, first["losses"]), "quality": draw_quality(metrics),
               "denoising": draw_denoising(x_0[first_of_class[:4]], pictures["denoised"]),
               "generation": draw_generation(pictures["samples"]),
               "reverse": draw_reverse(steps, x_0, first_of_class[:6])}
    if len(states) > 1:
        figures["compute"] = draw_compute(metrics["runs"])
    if len(first["losses"]) < first["config"].steps:
        note = (f"an unfinished run: step {len(first['losses'])} of {first['config'].steps}, "
                "its learning rate not yet at 0")
        say(note)
        for figure in figures.values():
            figure.suptitle(note)
    save(figures, out)
    save_gif(steps, x_0, out / "reverse.gif")


def save(figures, folder):
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
        say(folder / f"{name}.png")


def main():
    parser = train.new_parser("Draw the equations, and measure a trained network.", "out/figures")
    parser.add_argument("--image", type=Path, default=Path(__file__).parent / "condor.png",
                        metavar="FILE", help="PNG or JPEG for the forward process, taken without "
                        "its EXIF rotation (default: condor.png)")
    parser.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE",
                        help="network to evaluate, then others to compare (default: out/model.pt)")
    parser.add_argument("--digits", type=int, default=50, metavar="N",
                        help="test digits in the reverse process (default: 50)")
    flags = parser.parse_args()
    image, data = read_image(flags.image), train.load_mnist(flags.data)
    checksum, paths = zlib.crc32(data[0].numpy()), flags.checkpoint or Path("out").glob("model.pt")
    states = [train.read_checkpoint(path, checksum) for path in paths]
    if states and not SHOWN <= flags.digits <= len(data[2]) / 2:
        raise InputError(f"--digits must be at least {SHOWN}, and at most half of the test pictures"
                         f", of which {2 * SHOWN} are needed; there are {len(data[2])}")
    flags.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(RC, after_reset=True):  # whatever the user's matplotlibrc says
        save({"forward": draw_forward(image), "marginal": draw_marginal(to_pixels(data[0][:2000])),
              "bayes": draw_bayes(), "embedding": draw_embedding()}, flags.out)
        if states:
            measure_and_draw(states, data, flags.digits, flags.out)
        else:
            say("the other figures show a trained network: run python train.py first")


if __name__ == "__main__":
    train.run_command(main)
