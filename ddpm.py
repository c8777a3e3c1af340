"""Denoising diffusion: the equations of the exercise sheet, in its order and with its numbers.

q is the forward process, which adds noise to the data x_0 step by step; p is the reverse process,
which removes it with the help of a network ε_θ(x_t, t). The data may have any shape.

Every table is indexed by the t of the sheet: t = 0 is the data, the steps are t = 1..T.
"""
import torch


def linear_beta(T=200, beta_0=1e-4, beta_T=0.02):
    """β_0..β_T on a straight line (sheet, 3): β_t = β_0 + (β_T - β_0) t/T.

    Returns T+1 float64 values; the steps use β_1..β_T. Raises ValueError if T < 1.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    return torch.linspace(beta_0, beta_T, T + 1, dtype=torch.float64)


def per_sample(coefficient, x):
    """A float64 coefficient of shape (B,) as one of shape (B, 1, ..., 1), dtype and device of x.

    The only place where a coefficient is rounded: at t = 1, 1 - ᾱ_t is 2e-4, and a subtraction in
    float32 would lose four of its digits.
    """
    return coefficient.reshape(-1, *[1] * (x.dim() - 1)).to(x)


def randn_like(x, generator=None):
    """N(0, 1) noise like x, drawn where the generator lives: a CPU one serves all devices alike."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


class DDPM:
    """A diffusion process, given by its β.

    beta: T+1 numbers β_0..β_T, of which β_1..β_T must lie in (0, 1); ValueError if they do not.
    T: the number of steps; beta, alpha, alpha_bar: float64 tables of T+1 entries indexed by t,
        with α_t = 1 - β_t, ᾱ_t = ∏_{1 ≤ s ≤ t} α_s, and ᾱ_0 = 1 since x_0 is the data itself.

    In every method x is a float tensor of shape (B, ...); t is an int, or an int64 tensor of shape
    (B,) that gives each sample its own time; 1 ≤ t ≤ T. ε has the shape of x. Whatever does not fit
    raises ValueError. `model` is any callable model(x_t, t) -> ε of the shape of x_t, with t (B,).
    """

    def __init__(self, beta):
        self.beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu")
        if self.beta.dim() != 1 or len(self.beta) < 2:
            raise ValueError("beta must be T+1 ≥ 2 numbers β_0..β_T, "
                             f"got shape {tuple(self.beta.shape)}")
        self.T = len(self.beta) - 1
        self.alpha = 1 - self.beta
        if not ((0 < self.alpha[1:]) & (self.alpha[1:] < 1)).all():
            raise ValueError("every β_t with t ≥ 1 must lie in (0, 1), got values from "
                             f"{self.beta[1:].min():.3g} to {self.beta[1:].max():.3g}")
        self.alpha_bar = torch.cat([self.alpha.new_ones(1), self.alpha[1:]]).cumprod(0)

    # 1. Forward process

    def q_step(self, x_prev, t, eps):
        """x_t from x_{t-1}, eq. (1): √(1-β_t) x_{t-1} + √β_t ε."""
        t = self._check(t, x_prev, eps)
        beta = self.beta[t]
        return (per_sample((1 - beta).sqrt(), x_prev) * x_prev
                + per_sample(beta.sqrt(), x_prev) * eps)

    def q_sample(self, x_0, t, eps):
        """x_t straight from x_0, eq. (5): √ᾱ_t x_0 + √(1-ᾱ_t) ε."""
        t = self._check(t, x_0, eps)
        alpha_bar = self.alpha_bar[t]
        return (per_sample(alpha_bar.sqrt(), x_0) * x_0
                + per_sample((1 - alpha_bar).sqrt(), x_0) * eps)

    # 2. Reverse process

    def posterior_mean(self, x_t, x_0, t):
        """Mean of p(x_{t-1} | x_t, x_0), eqs. (3) and (4).

        μ(x_t, x_0) = √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t + √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0.
        """
        t = self._check(t, x_t, x_0)
        beta, alpha = self.beta[t], self.alpha[t]
        alpha_bar, alpha_bar_prev = self.alpha_bar[t], self.alpha_bar[t - 1]
        weight_t = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        weight_0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
        return per_sample(weight_t, x_t) * x_t + per_sample(weight_0, x_t) * x_0

    def posterior_variance(self, t):
        """β̃_t = β_t (1-ᾱ_{t-1}) / (1-ᾱ_t), the variance of p(x_{t-1} | x_t, x_0).

        Ho et al. 2020, eq. 7. Returns float64, of the shape of t. β̃_1 = 0: x_0 is known.
        """
        t = self._check(t)
        return self.beta[t] * (1 - self.alpha_bar[t - 1]) / (1 - self.alpha_bar[t])

    def predict_x0(self, x_t, eps, t):
        """x_0 from x_t and ε: eq. (5) solved for x_0, (x_t - √(1-ᾱ_t) ε) / √ᾱ_t."""
        t = self._check(t, x_t, eps)
        alpha_bar = self.alpha_bar[t]
        noise = per_sample((1 - alpha_bar).sqrt(), x_t) * eps
        return (x_t - noise) / per_sample(alpha_bar.sqrt(), x_t)

    def mean_from_eps(self, x_t, eps, t):
        """The mean (4) written with ε, eqs. (6) and (7): (x_t - β_t/√(1-ᾱ_t) ε) / √α_t."""
        t = self._check(t, x_t, eps)
        beta, alpha, alpha_bar = self.beta[t], self.alpha[t], self.alpha_bar[t]
        noise = per_sample(beta / (1 - alpha_bar).sqrt(), x_t) * eps
        return (x_t - noise) / per_sample(alpha.sqrt(), x_t)

    @torch.no_grad()
    def p_step(self, model, x_t, t, variance="beta", generator=None):
        """x_{t-1} from x_t, eq. (2) with the mean (7): μ_θ(x_t) + σ_t ε, and no noise at t = 1.

        variance: "beta" for σ_t² = β_t, as in the sheet, exact for x_0 ~ N(0, I); "posterior" for
        σ_t² = β̃_t, exact for a single x_0 (Ho et al. 2020, §3.2; the last step: Algorithm 2).
        """
        t = self._check(t, x_t)
        self._check_variance(variance)
        sigma2 = self.beta[t] if variance == "beta" else self.posterior_variance(t)
        sigma = sigma2.sqrt() * (t > 1)
        mean = self.mean_from_eps(x_t, self._eps(model, x_t, t), t)
        return mean + per_sample(sigma, x_t) * randn_like(x_t, generator)

    def p_sample(self, model, x_t, t=None, variance="beta", generator=None):
        """The reverse process from x_t down to x_0, eq. (2) for t, t-1, ..., 1.

        t: the time of x_t, an int, T if None. Returns a generator that yields (s, x_s) for
        s = t-1, ..., 0; the last one is x_0. Arguments as in p_step.
        """
        t = self.T if t is None else t
        if self._check(t).dim():
            raise ValueError(f"p_sample takes one int as the t of all samples, got {len(t)}")
        self._check(t, x_t)
        self._check_variance(variance)

        def path(x):
            for s in range(t, 0, -1):
                x = self.p_step(model, x, s, variance, generator)
                yield s - 1, x
        return path(x_t)

    # 5. Loss

    def loss(self, model, x_0, generator=None):
        """‖ε - ε_θ(x_t(x_0, ε), t)‖², eq. (8), as a mean over every element: differentiate it.

        Each sample has its own t, uniform on {1, ..., T}, and its own ε ~ N(0, I).
        """
        device = "cpu" if generator is None else generator.device
        t = torch.randint(1, self.T + 1, (len(x_0),), generator=generator, device=device)
        t = self._check(t, x_0)
        eps = randn_like(x_0, generator)
        x_t = self.q_sample(x_0, t, eps)
        return (eps - self._eps(model, x_t, t)).square().mean()

    # What every method asks of its arguments

    def _check(self, t, x=None, other=None):
        """t on the CPU, one for each sample of x; ValueError if t or the shapes do not fit."""
        if other is not None and x.shape != other.shape:
            raise ValueError("the two tensors must have one shape, "
                             f"got {tuple(x.shape)} and {tuple(other.shape)}")
        if x is not None and not (x.dim() and x.is_floating_point()):
            raise ValueError("x must be a float tensor of shape (B, ...), "
                             f"got {x.dtype} of shape {tuple(x.shape)}")
        t = torch.as_tensor(t, device="cpu")
        if t.dtype != torch.int64 or t.dim() > 1:
            raise ValueError("t must be an int or an int64 tensor of shape (B,), "
                             f"got {t.dtype} of shape {tuple(t.shape)}")
        if t.dim() and x is not None and len(t) != len(x):
            raise ValueError(f"t must have one time for each of {len(x)} samples, got {len(t)}")
        if ((t < 1) | (t > self.T)).any():
            raise ValueError(f"t must be in 1..{self.T}, got {t.tolist()}")
        return t if x is None else t.expand(len(x))

    def _check_variance(self, variance):
        if variance not in ("beta", "posterior"):
            raise ValueError(f'variance must be "beta" or "posterior", got {variance!r}')

    def _eps(self, model, x_t, t):
        """ε_θ(x_t, t), of the shape of x_t: another shape would broadcast in silence."""
        eps = model(x_t, t.to(x_t.device))
        if eps.shape != x_t.shape:
            raise ValueError(f"model must return the shape of x_t, {tuple(x_t.shape)}, "
                             f"got {tuple(eps.shape)}")
        return eps


# Two kinds of data for which the best ε_θ, the minimiser E[ε | x_t] of (8), is known exactly.
# They are called like the network, model(x_t, t), and stand beside it: as a test of the reverse
# process that trains nothing, and as yardsticks of what a network learned.


class GaussianEps:
    """E[ε | x_t] for data x_0 ~ N(m, C); for other data with these moments, the best linear one.

        x_t = √ᾱ x_0 + √(1-ᾱ) ε is Gaussian too, with mean √ᾱ m and covariance S = ᾱ C + (1-ᾱ) I.
        Its covariance with ε is √(1-ᾱ) I, hence E[ε | x_t] = √(1-ᾱ) S⁻¹ (x_t - √ᾱ m).
        With C = U diag(λ) Uᵀ, found once, S⁻¹ = U diag(1 / (ᾱ λ + 1-ᾱ)) Uᵀ for every t.

    mean: D numbers, of any shape; cov: (D, D), symmetric, positive semidefinite; both on the device
    of x_t. Raises ValueError if their sizes do not fit.
    """

    def __init__(self, ddpm, mean, cov):
        D = mean.numel()
        if cov.shape != (D, D):
            raise ValueError(f"cov must be {D} x {D} for this mean, got {tuple(cov.shape)}")
        self.ddpm, self.mean = ddpm, mean.flatten()
        self.variances, self.axes = torch.linalg.eigh(cov.double())

    def sample(self, n, generator=None):
        """n draws from N(m, C), shape (n, D), float64: m + U √λ z."""
        z = randn_like(self.mean.expand(n, -1), generator)
        return self.mean + z * self.variances.clamp(min=0).sqrt() @ self.axes.T

    def __call__(self, x_t, t):
        x = x_t.double().reshape(len(x_t), -1)
        alpha_bar = per_sample(self.ddpm.alpha_bar[t.cpu()], x)
        x = (x - alpha_bar.sqrt() * self.mean) @ self.axes
        x = (1 - alpha_bar).sqrt() * x / (alpha_bar * self.variances + 1 - alpha_bar)
        return (x @ self.axes.T).to(x_t).reshape(x_t.shape)


class EmpiricalEps:
    """E[ε | x_t] for data that is one of N points, all as likely: over them, the minimiser of (8).

        Given x_t, point i has the weight w_i ∝ exp(-‖x_t - √ᾱ x_i‖² / 2(1-ᾱ)): a softmax.
        E[x_0 | x_t] = Σ w_i x_i, and (5) gives E[ε | x_t] = (x_t - √ᾱ E[x_0 | x_t]) / √(1-ᾱ).
        ‖x_t‖² is common to all i and drops out of the softmax.

    points: (N, ...), of the dtype and on the device of x_t; `chunk` samples meet them at a time.
    """

    def __init__(self, ddpm, points, chunk=100):
        self.ddpm, self.points, self.chunk = ddpm, points.reshape(len(points), -1), chunk
        self.half_norms = self.points.square().sum(1) / 2

    def __call__(self, x_t, t):
        chunks = zip(x_t.split(self.chunk), t.split(self.chunk))
        return torch.cat([self._eps(x, s) for x, s in chunks])

    def _eps(self, x_t, t):
        x, alpha_bar = x_t.reshape(len(x_t), -1), self.ddpm.alpha_bar[t.cpu()]
        signal, noise = per_sample(alpha_bar.sqrt(), x), per_sample((1 - alpha_bar).sqrt(), x)
        snr = (signal / noise)**2
        weights = ((snr / signal * x) @ self.points.T - snr * self.half_norms).softmax(1)
        return ((x - signal * (weights @ self.points)) / noise).reshape(x_t.shape)
