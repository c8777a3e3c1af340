"""Denoising diffusion: the equations of the exercise sheet, in its order and with its numbers.

q is the forward process, which adds noise to the data x_0 step by step; p is the reverse process,
which removes it with the help of a network ε_θ(x_t, t). The data may have any shape.
"""
import torch


def linear_beta(T=200, beta_0=1e-4, beta_T=0.02):
    """T+1 float64 numbers on a straight line (sheet, 3): β_t = β_0 + (β_T - β_0) t/T."""
    return torch.linspace(beta_0, beta_T, T + 1, dtype=torch.float64)


def per_sample(coefficient, x):
    """A float64 coefficient of shape (B,) as one of shape (B, 1, ..., 1), dtype and device of x."""
    # Rounded only here: in float32, the subtraction in 1 - ᾱ_1 = 2e-4 would lose four digits.
    return coefficient.reshape(-1, *[1] * (x.dim() - 1)).to(x)


def randn_like(x, generator=None):
    """N(0, 1) noise like x, drawn on the generator's device: one on the CPU serves all devices."""
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    return noise.to(x.device)


def describe(x):
    if torch.is_tensor(x):
        return f"{x.dtype} {tuple(x.shape)} on {x.device}"
    return type(x).__name__


class DDPM:
    """A diffusion process, given by its β.

    beta: T+1 numbers β_0..β_T, of which β_0 is never used: the T numbers of a tutorial go in as
        [0, *betas]. ValueError unless β_1..β_T lie in (0, 1) and ᾱ_T ≥ 1e-30.
    T: the number of steps; beta, alpha, alpha_bar: float64 tables of T+1 entries indexed by t,
        with α_t = 1 - β_t, ᾱ_t = ∏_{1 ≤ s ≤ t} α_s, and ᾱ_0 = 1 since x_0 is the data itself.

    In every method x is a float tensor (B, ...), not empty; ε has the shape, dtype, device of x;
    1 ≤ t ≤ T is an int, or an int64 tensor (B,), a time for each sample. `model` is any callable
    model(x_t, t) -> ε, with t of shape (B,), ε of the shape of x_t. ValueError if it does not fit.
    """

    def __init__(self, beta):
        self.beta = torch.asarray(beta, dtype=torch.float64, device="cpu", copy=True)
        if self.beta.dim() != 1 or len(self.beta) < 2:
            raise ValueError(f"beta must be T+1 ≥ 2 numbers, got shape {tuple(self.beta.shape)}")
        self.T = len(self.beta) - 1
        self.alpha = 1 - self.beta
        low, high = self.alpha[1:].aminmax()
        if not 0 < low <= high < 1:
            raise ValueError(f"β_1..β_T must lie in (0, 1), got {1 - high:.3g} to {1 - low:.3g}")
        self.alpha_bar = torch.cat([self.alpha.new_ones(1), self.alpha[1:]]).cumprod(0)
        if self.alpha_bar[-1] < 1e-30:  # the squares of x̂_0, about 1 / ᾱ_T, stay finite in float32
            raise ValueError(f"ᾱ_T is {self.alpha_bar[-1]:.3g}, below 1e-30: take fewer steps")

    # 1. Forward process

    def q_step(self, x_prev, t, eps):
        """x_t from x_{t-1}, eq. (1): √(1-β_t) x_{t-1} + √β_t ε."""
        t = self.check(t, x_prev, eps)
        beta = self.beta[t]
        mean = per_sample((1 - beta).sqrt(), x_prev) * x_prev
        return mean + per_sample(beta.sqrt(), eps) * eps

    def q_step_loop(self, x, *, generator=None):
        """The forward process from x = x_0 up to x_T, eq. (1) for t = 1, 2, ..., T.

        Yields (t, x_t) for t = 1, ..., T, each x_t a copy. Sheet (3).
        """
        self.check(1, x)  # before randn_like, which would fail first, and less clearly
        for t in range(1, self.T + 1):
            x = self.q_step(x, t, randn_like(x, generator))
            yield t, x.clone()

    def q_sample(self, x_0, t, eps):
        """x_t straight from x_0, eq. (5): √ᾱ_t x_0 + √(1-ᾱ_t) ε."""
        t = self.check(t, x_0, eps)
        alpha_bar = self.alpha_bar[t]
        mean = per_sample(alpha_bar.sqrt(), x_0) * x_0
        return mean + per_sample((1 - alpha_bar).sqrt(), eps) * eps

    # 2. Reverse process

    def posterior_mean(self, x_t, x_0, t):
        """Mean of p(x_{t-1} | x_t, x_0), eqs. (3) and (4).

        μ(x_t, x_0) = √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t + √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0.
        """
        t = self.check(t, x_t, x_0)
        beta = self.beta[t]
        alpha = self.alpha[t]
        alpha_bar = self.alpha_bar[t]
        alpha_bar_prev = self.alpha_bar[t - 1]
        weight_t = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        weight_0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
        return per_sample(weight_t, x_t) * x_t + per_sample(weight_0, x_t) * x_0

    def posterior_variance(self, t):
        """β̃_t = β_t (1-ᾱ_{t-1}) / (1-ᾱ_t), the variance of p(x_{t-1} | x_t, x_0).

        Ho et al. 2020, eq. 7. Returns float64, of the shape of t. β̃_1 = 0: x_0 is known.
        """
        t = self.check(t)
        return self.beta[t] * (1 - self.alpha_bar[t - 1]) / (1 - self.alpha_bar[t])

    def predict_x0(self, x_t, eps, t):
        """x_0 from x_t and ε: eq. (5) solved for x_0, (x_t - √(1-ᾱ_t) ε) / √ᾱ_t."""
        t = self.check(t, x_t, eps)
        alpha_bar = self.alpha_bar[t]
        noise = per_sample((1 - alpha_bar).sqrt(), x_t) * eps
        return (x_t - noise) / per_sample(alpha_bar.sqrt(), x_t)

    def mean_from_eps(self, x_t, eps, t):
        """The mean (4) written with ε, eqs. (6) and (7): (x_t - β_t/√(1-ᾱ_t) ε) / √α_t."""
        t = self.check(t, x_t, eps)
        alpha_bar = self.alpha_bar[t]
        noise = per_sample(self.beta[t] / (1 - alpha_bar).sqrt(), x_t) * eps
        return (x_t - noise) / per_sample(self.alpha[t].sqrt(), x_t)

    def predict_eps(self, model, x_t, t):
        """ε_θ(x_t, t) of (7) and (8). A subclass can convert a model that predicts x_0."""
        t = self.check(t, x_t)
        eps = model(x_t, t.to(x_t.device))
        if not torch.is_tensor(eps) or eps.shape != x_t.shape:  # it would broadcast silently
            raise ValueError(f"model must return {describe(x_t)}, got {describe(eps)}")
        return eps.to(x_t.dtype)

    @torch.no_grad()
    def p_sample(self, model, x_t, t, *, variance="beta", generator=None):
        """x_{t-1} from x_t, eq. (2) with the mean (7): μ_θ(x_t) + σ_t ε, and no noise at t = 1.

        variance: "beta" for σ_t² = β_t, as in the sheet, exact for x_0 ~ N(0, I); "posterior" for
        σ_t² = β̃_t, exact for a single x_0 (Ho et al. 2020, §3.2; the last step: Algorithm 2).
        """
        t = self.check(t, x_t)
        if variance not in ("beta", "posterior"):
            raise ValueError(f'variance must be "beta" or "posterior", got {variance!r}')
        sigma2 = self.beta[t] if variance == "beta" else self.posterior_variance(t)
        sigma = sigma2.sqrt() * (t > 1)
        mean = self.mean_from_eps(x_t, self.predict_eps(model, x_t, t), t)
        return mean + per_sample(sigma, x_t) * randn_like(x_t, generator)

    def p_sample_loop(self, model, x_t, t=None, *, variance="beta", generator=None):
        """The reverse process from x_t down to x_0, eq. (2) for t, t-1, ..., 1.

        Yields (s, x_s) for s = t-1, ..., 0, each x_s a copy: to steer the process (inpainting,
        say), write this loop with p_sample. t: the time of x_t, one int, T if None. See p_sample.
        Call model.eval() before: dropout and batch norm behave as the module's mode says.
        """
        t = self.check(self.T if t is None else t)
        if t.dim():
            raise ValueError(f"t must be one int, the time of all samples, got {describe(t)}")
        for s in range(t, 0, -1):
            x_t = self.p_sample(model, x_t, s, variance=variance, generator=generator)
            yield s - 1, x_t.clone()

    # 5. Loss

    def loss(self, model, x_0, *, generator=None):
        """‖ε - ε_θ(x_t(x_0, ε), t)‖², eq. (8), averaged over every element.

        Each sample has its own t, uniform on {1, ..., T}, and its own ε ~ N(0, I).
        """
        device = "cpu" if generator is None else generator.device
        t = torch.randint(1, self.T + 1, x_0.shape[:1], generator=generator, device=device)
        t = self.check(t, x_0)
        eps = randn_like(x_0, generator)
        x_t = self.q_sample(x_0, t, eps)
        return (eps - self.predict_eps(model, x_t, t)).square().mean()

    # What all methods ask of their arguments

    def check(self, t, x=None, other=None):
        """t on the CPU, one for each sample of x; ValueError if t or the tensors do not fit."""
        is_float = torch.is_tensor(x) and x.is_floating_point()
        if x is not None and not (is_float and x.dim() and x.numel()):
            raise ValueError(f"x must be a float tensor (B, ...), not empty, got {describe(x)}")
        is_like_x = torch.is_tensor(other) and (other.shape, other.dtype) == (x.shape, x.dtype)
        if other is not None and not is_like_x:
            raise ValueError(f"both tensors must be {describe(x)}, got {describe(other)}")
        t = torch.as_tensor(t, device="cpu")
        if t.dtype != torch.int64 or t.dim() > 1:
            raise ValueError(f"t must be an int or an int64 tensor (B,), got {describe(t)}")
        if t.dim() and x is not None and len(t) != len(x):
            raise ValueError(f"t must have one time for each of {len(x)} samples, got {len(t)}")
        outside = (t < 1) | (t > self.T)
        if outside.any():
            raise ValueError(f"t must be in 1..{self.T}, got {t[outside][0]}")
        return t if x is None else t.expand(len(x))


# The exact ε in the place of a network, for two kinds of data

def finite_floats(data):
    data = torch.as_tensor(data)
    if not data.is_floating_point() or not data.numel() or not data.isfinite().all():
        raise ValueError(f"the data must be finite floats, one or more, got {describe(data)}")
    return data


class GaussianEps:
    """The minimiser of (8) for x_0 ~ N(m, C); for other data of this m and C, the best linear one.

        x_t = √ᾱ x_0 + √(1-ᾱ) ε is Gaussian too, with mean √ᾱ m and covariance S = ᾱ C + (1-ᾱ) I.
        Its covariance with ε is √(1-ᾱ) I, hence E[ε | x_t] = √(1-ᾱ) S⁻¹ (x_t - √ᾱ m).
        With C = U diag(λ) Uᵀ, found once, S⁻¹ = U diag(1 / (ᾱ λ + 1-ᾱ)) Uᵀ for every t.

    mean: D finite numbers, of any shape; cov: (D, D), symmetric, positive semidefinite; both on the
    device of x_t, which has D numbers a sample. ValueError if they do not fit. Called like a model.
    """

    def __init__(self, ddpm, mean, cov):
        self.ddpm = ddpm
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        cov = torch.as_tensor(cov, dtype=torch.float64)
        D = self.mean.numel()
        rounding = 1e-4 * cov.abs().max()  # of a covariance in float32
        is_finite = self.mean.isfinite().all() and cov.isfinite().all()
        if not is_finite or cov.shape != (D, D) or (cov - cov.T).abs().max() > rounding:
            raise ValueError(f"mean and cov must be finite, cov {D} x {D} and symmetric")
        eigenvalues, self.eigenvectors = torch.linalg.eigh((cov + cov.T) / 2)
        if eigenvalues[0] < -rounding:
            raise ValueError(f"cov must have no negative eigenvalue, got {eigenvalues[0]:.3g}")
        self.eigenvalues = eigenvalues.clamp(min=0)

    @classmethod
    def fit(cls, ddpm, x):
        """With the mean and covariance of data x, (N, ...): the best linear denoiser of it."""
        x = finite_floats(x).float()
        return cls(ddpm, x.mean(0), torch.atleast_2d(x.flatten(1).T.cov(correction=0)))

    def __call__(self, x_t, t):
        t = self.ddpm.check(t, x_t)
        x = x_t.reshape(len(x_t), self.mean.numel()).double()
        alpha_bar = per_sample(self.ddpm.alpha_bar[t], x)
        x = (x - alpha_bar.sqrt() * self.mean.flatten()) @ self.eigenvectors
        x = (1 - alpha_bar).sqrt() * x / (alpha_bar * self.eigenvalues + 1 - alpha_bar)
        return (x @ self.eigenvectors.T).to(x_t).reshape(x_t.shape)

    def sample_x_T(self, n, *, generator=None):
        """n draws of x_T, of the shape of the mean, float32: N(√ᾱ_T m, ᾱ_T C + (1-ᾱ_T) I)."""
        alpha_bar = self.ddpm.alpha_bar[-1]
        variances = alpha_bar * self.eigenvalues + 1 - alpha_bar
        z = randn_like(self.mean.flatten().expand(n, -1), generator)
        noise = z * variances.sqrt() @ self.eigenvectors.T
        return (alpha_bar.sqrt() * self.mean + noise.reshape(n, *self.mean.shape)).float()


class EmpiricalEps:
    """The minimiser of (8) for data that is uniform on N points: as a denoiser, it memorises them.

        Given x_t, point i has the weight w_i ∝ exp(-‖x_t - √ᾱ x_i‖² / 2(1-ᾱ)): a softmax.
        E[x_0 | x_t] = Σ w_i x_i, and (5) gives E[ε | x_t] = (x_t - √ᾱ E[x_0 | x_t]) / √(1-ᾱ).
        ‖x_t‖² is common to all i and drops out of the softmax.

    points: finite floats (N, ...), N ≥ 1, on the device of x_t; the arithmetic is in their dtype.
    ValueError if they are not. Called like a model.
    """

    def __init__(self, ddpm, points):
        self.ddpm = ddpm
        points = finite_floats(points)
        self.points = points.reshape(len(points), -1)
        self.half_norms = self.points.square().sum(1) / 2

    def __call__(self, x_t, t):
        t = self.ddpm.check(t, x_t)
        x = x_t.reshape(len(x_t), self.points.shape[1]).to(self.points.dtype)
        alpha_bar = self.ddpm.alpha_bar[t]
        signal = per_sample(alpha_bar.sqrt(), x)
        sigma = per_sample((1 - alpha_bar).sqrt(), x)
        exponents = (signal * x @ self.points.T - signal**2 * self.half_norms) / sigma**2
        x_0 = exponents.softmax(1) @ self.points
        return ((x - signal * x_0) / sigma).to(x_t).reshape(x_t.shape)
