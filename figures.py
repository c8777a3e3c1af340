"""Draw the figures of the README: what the forward process does to a picture, and what the network undoes.

    python figures.py                             the condor and the schedule; after python train.py, all of them
    python figures.py --image photo.png           with another picture than the condor

Each figure is written to figures/ twice, as a PNG for the screen and as a PDF with vector text for print. The
trained network's figures show the digits and the numbers that train.py left beside the checkpoint.
"""
import argparse, json, pickle, sys
from pathlib import Path

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import PercentFormatter

from ddpm import DDPM, linear_beta
from train import load_checkpoint, write_file

# One visual language: a colour (Okabe and Ito's, safe for the colour-blind), a marker and a name for each method.
STYLES = {
    "noisy": ("#7f7f7f", "x", "noisy digit, $x_t/\\sqrt{\\bar{\\alpha}_t}$"),
    "linear": ("#E69F00", "s", "best linear denoiser"),
    "memory": ("#009E73", "^", "memory of the training digits"),
    "network": ("#0072B2", "o", "network, one shot $\\hat{x}_0$"),
    "reverse": ("#D55E00", "D", "network, reverse process"),
}
plt.rcParams |= {"font.size": 12, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False,
                 "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2, "legend.frameon": False,
                 "figure.constrained_layout.use": True, "pdf.fonttype": 42}


def save(figure, folder, name):
    for kind, about in ("png", {}), ("pdf", {"CreationDate": None}):
        write_file(folder / f"{name}.{kind}", lambda f: figure.savefig(f, format=kind, dpi=160, metadata=about))
    plt.close(figure)
    print(folder / f"{name}.png")


def show(axes, picture, title=""):
    """A picture (channels, H, W), on the same scale from -1 (black) to 1 (white) everywhere."""
    axes.imshow((picture.clamp(-1, 1).permute(1, 2, 0) + 1) / 2, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def picture_grid(rows, labels, groups=("",)):
    """Rows of pictures, a label at the left of each, and a title over each group of columns."""
    lines, columns = len(rows), len(rows[0])
    per_group = columns // len(groups)
    widths = [1.0 if column % (per_group + 1) else 0.25 for column in range(1, columns + len(groups))]
    figure, axes = plt.subplots(lines, len(widths), figsize=(2.6 + 0.62 * sum(widths), 0.62 * lines + 0.4),
                                squeeze=False, width_ratios=widths)
    for cell in axes.flat:
        cell.set_axis_off()
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            show(axes[line, column + column // per_group], picture)
        axes[line, 0].text(-0.15, 0.5, labels[line], transform=axes[line, 0].transAxes, ha="right", va="center")
    for group, title in enumerate(groups):
        middle = axes[0, group * (per_group + 1) + per_group // 2]
        middle.set_title(title, loc="center" if per_group % 2 else "left", ha="center")
    return figure


def read_image(path):
    """A picture file as (3, H, W) in [-1, 1], what is transparent laid on white; ValueError if it is none."""
    try:
        pixels = torch.tensor(plt.imread(path))
    except Exception as error:  # a damaged picture can make the decoder raise almost anything
        raise ValueError(f"{path} can't be read as a picture ({error}): --image takes a PNG file") from None
    pixels = pixels.float() / (1 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max)
    if pixels.dim() == 2:
        pixels = pixels[:, :, None].expand(-1, -1, 3)
    if pixels.shape[2] == 4:
        pixels = pixels[:, :, :3] * pixels[:, :, 3:] + 1 - pixels[:, :, 3:]
    return pixels.permute(2, 0, 1) * 2 - 1


def draw_forward(image):
    """Sheet (3): x_0, x_3, x_10, x_30, x_100, x_200 of one path of (1)."""
    ddpm, random = DDPM(linear_beta()), torch.Generator().manual_seed(0)
    x, path = image[None], [image]
    for t in range(1, ddpm.T + 1):
        x = ddpm.q_step(x, t, torch.randn(x.shape, generator=random))
        path.append(x[0])
    figure, axes = plt.subplots(1, 6, figsize=(13, 2.5))
    for cell, t in zip(axes, (0, 3, 10, 30, 100, 200)):
        show(cell, path[t], f"$x_{{{t}}}$")
    return figure


def draw_schedule():
    """β_t, ᾱ_t and ᾱ_t / (1 - ᾱ_t) against t."""
    ddpm = DDPM(linear_beta())
    t, alpha_bar = torch.arange(ddpm.T + 1), ddpm.alpha_bar
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2))
    left.plot(t, ddpm.beta, color="#0072B2")
    left.set(title="noise added in step t", ylabel="$\\beta_t$", ylim=(0, None))
    middle.plot(t, alpha_bar, color="#0072B2", label="$\\bar{\\alpha}_t$, part of the variance that is signal")
    middle.plot(t, 1 - alpha_bar, "--", color="#D55E00", label="$1-\\bar{\\alpha}_t$, noise")
    middle.set(title="what is left of $x_0$ in $x_t$", ylabel="variance", ylim=(0, 1.35),
               yticks=(0, 0.25, 0.5, 0.75, 1))
    middle.legend(fontsize=10, loc="upper right")
    right.semilogy(t[1:], (alpha_bar / (1 - alpha_bar))[1:], color="#0072B2")
    right.axhline(1, color="black", linewidth=1, linestyle=":")
    right.text(5, 0.6, "as much noise as signal", va="top", fontsize=10)
    right.set(title="signal-to-noise ratio", ylabel="$\\bar{\\alpha}_t\\,/\\,(1-\\bar{\\alpha}_t)$")
    for axes in left, middle, right:
        axes.set(xlabel="t", xlim=(0, ddpm.T))
    return figure


def draw_losses(metrics):
    """The training curve, and the test loss (8) of each method by t."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    steps, losses = torch.tensor(metrics["history"], dtype=torch.float64).T
    left.loglog(steps, losses, color="#0072B2", label="mean over 20 steps of training")
    final = metrics["test_loss"]["network"][0]
    left.axhline(final, color="black", linestyle=":", linewidth=1.5, label=f"test loss at the end: {final:.4f}")
    ticks = (0.04, 0.05, 0.07, 0.1, 0.2, 0.5, 1)
    left.set(title="training", xlabel="step", ylabel="loss (8), mean square of $\\epsilon-\\epsilon_\\theta$",
             yticks=ticks, yticklabels=ticks)
    left.minorticks_off()
    left.legend()
    for name in metrics["test_loss"]:
        colour, marker, label = STYLES[name]
        label = "nothing, $\\epsilon_\\theta = 0$" if name == "noisy" else label.split(",")[0]
        right.semilogy(metrics["loss_by_t"]["t"], metrics["loss_by_t"][name], color=colour, marker=marker,
                       markersize=4, label=f"{label}: {metrics['test_loss'][name][0]:.3f}")
    right.set(title="test digits, by time", xlabel="t", ylabel="loss (8)")
    right.legend(title="mean over t", fontsize=10)
    return figure


def draw_quality(metrics):
    """PSNR of the estimate of x_0 and share of digits read rightly, against t, for every method."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    d = metrics["denoising"]
    for name, (colour, marker, label) in STYLES.items():
        mean, error = torch.tensor(d["psnr"][name]).T
        left.errorbar(d["t"], mean, 2 * error, color=colour, marker=marker, label=label, capsize=3)
        right.plot(d["t"], d["accuracy"][name], color=colour, marker=marker)
    left.set(title="how near is the estimate to the clean digit?", xlabel="t", ylabel="PSNR in dB (±2 standard errors)")
    left.legend(fontsize=10)
    right.axhline(d["accuracy_clean"], color="black", linestyle=":", linewidth=1.5)
    right.text(d["t"][-1], d["accuracy_clean"] + 0.01, "clean digits", va="bottom", ha="right", fontsize=10)
    right.set(title="is it still the same digit?", xlabel="t", ylabel="read rightly by a classifier", ylim=(0, 1.08))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def draw_denoising(metrics, pictures):
    """Test digits, noisy at several t, and what each method makes of them."""
    times = [i for i, t in enumerate(metrics["denoising"]["t"]) if i >= 2] or [0]
    rows = [[x for _ in times for x in pictures["clean"][:4]]]
    rows += [[x for i in times for x in pictures[name][i][:4]] for name in STYLES]
    names = ["clean digit", *(label for _, _, label in STYLES.values())]
    return picture_grid(rows, names, [f"t = {metrics['denoising']['t'][i]}" for i in times])


def draw_reverse(model, ddpm, digits):
    """The reverse process (2) of a few noisy test digits as a film strip."""
    random = torch.Generator().manual_seed(0)
    x_T = ddpm.q_sample(digits, ddpm.T, torch.randn(digits.shape, generator=random))
    frames = {ddpm.T: x_T} | dict(ddpm.p_sample(model, x_T, generator=random))
    times = [round(ddpm.T * f / 10) for f in range(10, 0, -1)] + [round(ddpm.T / 40), 0]
    rows = [[frames[t][i] for t in times] + [digits[i]] for i in range(len(digits))]
    return picture_grid(rows, [""] * len(rows), [*(f"t = {t}" if t else "$x_0$" for t in times), "truth"])


def draw_generation(metrics, pictures):
    """Digits drawn from three kinds of x_T, and real ones, with their Fréchet distances."""
    generated, distance = pictures["generated"], metrics["generation"]["frechet"]
    names = ["real digits", "noised digits", "matched Gaussian", "N(0, I)"]
    labels = [name if name == names[0] else f"from {name}" for name in names]
    labels = [f"{label}\nFréchet {distance[name]:.0f}" for label, name in zip(labels, names)]
    return picture_grid([generated[name] for name in names], labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"figures.py: {message} (--help lists the flags)\n")
    parser.add_argument("--image", type=Path, default=Path(__file__).parent / "condor.png", metavar="PNG",
                        help="the picture that goes through the forward process (default: condor.png)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="what train.py made, with what lies beside it (default: out/model.pt)")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="folder (default: figures)")
    flags = parser.parse_args()
    image, checkpoint = read_image(flags.image), flags.checkpoint or Path("out/model.pt")
    trained = flags.checkpoint or checkpoint.exists()
    if trained:
        model, ddpm = load_checkpoint(checkpoint)
        try:
            content = (checkpoint.parent / "metrics.json").read_bytes()
            metrics, pictures = json.loads(content), torch.load(checkpoint.parent / "pictures.pt", weights_only=True)
        except (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError):
            raise ValueError(f"{checkpoint.parent} lacks whole metrics.json and pictures.pt, make them with: "
                             f"python train.py --evaluate {checkpoint}") from None
    flags.out.mkdir(parents=True, exist_ok=True)
    save(draw_forward(image), flags.out, "forward")
    save(draw_schedule(), flags.out, "schedule")
    if not trained:
        return print("for the figures of the trained network, run python train.py first")
    save(draw_losses(metrics), flags.out, "losses")
    save(draw_denoising(metrics, pictures), flags.out, "denoising")
    save(draw_quality(metrics), flags.out, "quality")
    save(draw_reverse(model, ddpm, pictures["clean"][:6]), flags.out, "reverse")
    save(draw_generation(metrics, pictures), flags.out, "generation")
    write_file(flags.out / "metrics.json", lambda f: f.write(content))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        sys.exit(f"figures.py: {error}")
