"""The exercise sheet as theorems: each test reaches one quantity by two independent routes.

In the order of the sheet; the number in a name is that of the equation. Schedules, shapes, data and
times are random (Hypothesis), everything is float64 unless float32 is the point. Monte Carlo tests
have a fixed seed and accept five standard errors.
"""
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ddpm import DDPM, EmpiricalEps, GaussianEps, linear_beta, per_sample
from unet import ResidualBlock, TimeEmbedding, UNet

settings.register_profile("ddpm", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("ddpm")
torch.set_num_threads(1)  # threads only get in the way of tensors this small

NAN, F64 = float("nan"), torch.float64
HERE = Path(__file__).parent


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=seeded(seed))


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=F64).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@st.composite
def chain(draw, first_t=1):
    """A process of 1 to 8 steps, a time t of it, a time for each sample, and tensors of one shape.

    β_0 is NaN: it must reach no result.
    """
    beta = draw(st.lists(st.floats(1e-3, 0.999), min_size=first_t, max_size=8))
    t = draw(st.integers(first_t, len(beta)))
    B, *shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32))
    x, y, eps = normal(3, B, *shape, seed=seed)
    times = torch.randint(first_t, len(beta) + 1, (B,), generator=seeded(seed))
    return SimpleNamespace(d=DDPM([NAN] + beta), t=t, times=times, x=x, y=y, eps=eps,
                           zero=0 * x, one=0 * x + 1, seed=seed)


@given(chain())
def test_eq5_is_the_iterated_eq1(c):
    """Its ε is the normalised sum of those of (1); what a step brings in, the later ones shrink."""
    x_t, noise, variance = c.x, c.zero, 0
    for s in range(1, c.t + 1):
        beta, eps_s = c.d.beta[s], normal(*c.x.shape, seed=c.seed + s)
        x_t = c.d.q_step(x_t, s, eps_s)
        noise = (1 - beta).sqrt() * noise + beta.sqrt() * eps_s
        variance = (1 - beta) * variance + beta
    close(c.d.q_sample(c.x, c.t, noise / variance.sqrt()), x_t)


@given(chain())
def test_eq4_is_eq6_when_x_t_comes_from_eq5(c):
    x_t = c.d.q_sample(c.x, c.t, c.eps)
    close(c.d.mean_from_eps(x_t, c.eps, c.t), c.d.posterior_mean(x_t, c.x, c.t))


# 1. Forward process

def marginal(d, t):
    """√ᾱ_t and 1-ᾱ_t, without ᾱ: what (1) does to a mean and to a variance, one β at a time."""
    mean, variance = 1.0, 0.0
    for beta in d.beta[1:t + 1].tolist():
        mean = (1 - beta)**0.5 * mean
        variance = (1 - beta) * variance + beta
    return mean, variance


def assert_moments(x, mean, cov, bias=0.0):
    """The rows x have this mean and covariance, within five standard errors and a bias."""
    v = cov.diagonal()
    assert ((x.mean(0) - mean).abs() <= 5 * (v / len(x)).sqrt() + bias).all()
    assert ((x.T.cov() - cov).abs() <= 5 * ((v.outer(v) + cov**2) / len(x)).sqrt() + bias).all()


@given(chain())
def test_tables_hold_beta_alpha_and_their_product_from_alpha_bar_0_is_1(c):
    d = c.d
    assert len(d.beta) == len(d.alpha) == len(d.alpha_bar) == d.T + 1
    close(d.alpha[1:] + d.beta[1:], 1)
    close(d.alpha_bar[0], 1)
    close(d.alpha_bar[1:].log(), d.alpha[1:].log().cumsum(0))


@given(chain())
def test_eq1_is_linear_keeps_the_variance_1_and_brings_in_beta_of_it(c):
    signal, noise = c.d.q_step(c.one, c.t, c.zero), c.d.q_step(c.zero, c.t, c.one)
    close(noise**2, c.d.beta[c.t])
    close(signal**2 + noise**2, 1)
    assert (signal > 0).all() and (noise > 0).all()
    close(c.d.q_step(c.x, c.t, c.eps), signal * c.x + noise * c.eps)


@given(chain())
def test_eq5_has_the_mean_and_variance_of_the_iterated_eq1(c):
    mean, variance = marginal(c.d, c.t)
    close(c.d.q_sample(c.x, c.t, c.zero), mean * c.x)
    close(c.d.q_sample(c.zero, c.t, c.one)**2, variance)


@given(chain())
def test_eq5_solved_for_x_0_gives_the_x_0_that_explains_x_t(c):
    close(c.d.q_sample(c.d.predict_x0(c.x, c.eps, c.t), c.t, c.eps), c.x)


# 2. Reverse process

D, X = DDPM([NAN, 0.1, 0.2, 0.3]), torch.zeros(2, 5, dtype=F64)
both_variances = st.sampled_from([{}, {"variance": "posterior"}])


def wave(x, t):
    """A model: not linear in x, and another one at every t."""
    return (x.sin().transpose(0, -1) * t.cos().to(x.dtype)).transpose(0, -1)


@given(chain(first_t=2))
def test_eq4_and_the_posterior_variance_are_bayes_rule(c):
    """p(x_t | x_{t-1}) p(x_{t-1} | x_0) / p(x_t | x_0) = p(x_{t-1} | x_t, x_0), everywhere."""
    def log_p(x, given_x, q, t):
        return Normal(q(given_x, t, c.zero), q(c.zero, t, c.one)).log_prob(x)

    x_0, x_prev, x_t, d, t = c.x, c.y, c.eps, c.d, c.t
    bayes = (log_p(x_t, x_prev, d.q_step, t) + log_p(x_prev, x_0, d.q_sample, t - 1)
             - log_p(x_t, x_0, d.q_sample, t))
    posterior = Normal(d.posterior_mean(x_t, x_0, t), d.posterior_variance(t).sqrt())
    close(posterior.log_prob(x_prev), bayes, tol=1e-8)


@given(chain())
def test_eq4_and_the_posterior_variance_give_back_the_marginal_of_x_before(c):
    mean, variance = marginal(c.d, c.t - 1)
    close(c.d.posterior_mean(c.d.q_sample(c.x, c.t, c.zero), c.x, c.t), mean * c.x)
    carried = c.d.posterior_mean(c.d.q_sample(c.zero, c.t, c.one), c.zero, c.t)
    close(carried**2 + c.d.posterior_variance(c.t), variance)


@given(chain())
def test_posterior_variance_is_0_at_t_1_and_below_beta_everywhere(c):
    t = torch.arange(1, c.d.T + 1)
    variance = c.d.posterior_variance(t)
    assert variance[0] == 0 and (variance[1:] > 0).all() and (variance < c.d.beta[1:]).all()
    close(torch.stack([c.d.posterior_variance(s) for s in t.tolist()]), variance)


@given(chain(), st.floats(0, 9))
def test_posterior_variance_and_that_of_x_0_are_the_variance_of_x_before_given_x_t(c, size):
    """Var(x_{t-1} | x_t) = β̃_t + w² Var(x_0 | x_t), with w the weight of x_0 in (4).

    For Gaussian data, along each axis of its covariance. So β̃_t is right for a single point, and
    β_t for x_0 ~ N(0, I).
    """
    weight = c.d.posterior_mean(c.zero, c.one, c.t)
    (a, v), (a_prev, v_prev) = marginal(c.d, c.t), marginal(c.d, c.t - 1)
    for var in size, 0, 1:
        var_t, var_prev = a**2 * var + v, a_prev**2 * var + v_prev
        of_x_0 = var - (a * var)**2 / var_t
        of_x_prev = var_prev - (a / a_prev * var_prev)**2 / var_t
        close(c.d.posterior_variance(c.t) + weight**2 * of_x_0, of_x_prev, tol=1e-8)
    close(c.d.beta[c.t], of_x_prev, tol=1e-8)


@given(chain(), both_variances)
def test_eq2_is_iterated_from_t_to_0_without_noise_in_the_last_step(c, variance):
    def path(seed, **t):
        return list(c.d.p_sample(wave, c.x, generator=seeded(seed), **t, **variance))

    steps, generator, x = path(c.seed, t=c.t), seeded(c.seed), c.x
    assert [s for s, _ in steps] == list(range(c.t))[::-1]
    for s, x_s in steps:
        x_prev, x = x, c.d.p_step(wave, x, s + 1, generator=generator, **variance)
        assert x.equal(x_s)
    close(x, c.d.mean_from_eps(x_prev, wave(x_prev, torch.ones(len(x))), 1))
    assert [s for s, _ in path(c.seed)] == list(range(c.d.T))[::-1]
    other = path(c.seed + 1, t=c.t)
    assert steps[0][1].equal(other[0][1]) == (c.t == 1)  # another seed, another path


def test_eq2_has_no_gradient_and_asks_the_model_with_an_int64_t_for_each_sample():
    seen, weight = [], torch.ones((), requires_grad=True)
    path = D.p_sample(lambda x, t: seen.append(t) or weight * x, X)
    assert not any(x.requires_grad for _, x in path)
    assert [(t.dtype, t.shape) for t in seen] == 3 * [(torch.int64, (2,))]


# 3. The schedule of the condor

@given(st.integers(1, 50), st.floats(0, 1), st.floats(0, 1))
def test_linear_beta_is_a_straight_line_and_by_default_that_of_the_sheet(T, beta_0, beta_T):
    beta = linear_beta(T, beta_0, beta_T)
    close(beta[[0, -1]], [beta_0, beta_T])
    close(beta.diff(), (beta_T - beta_0) / T)
    close(linear_beta()[[0, -1]], [0.0001, 0.02])
    close(DDPM(linear_beta()).alpha_bar[200], 0.130865, tol=5e-7)  # the sheet's T


# 5. Loss

@given(chain())
def test_eq8_is_the_squared_error_as_a_mean_over_every_element_of_any_batch(c):
    """And 0 for the true ε: the t that the model sees is the t that x_t was made with."""
    def true(x_t, t):
        mean, variance = torch.tensor([marginal(c.d, s) for s in t], dtype=F64).T
        return (x_t - per_sample(mean, x_t) * c.x) / per_sample(variance.sqrt(), x_t)

    wrong = c.y.clone().requires_grad_()
    for error in c.zero, wrong:
        loss = c.d.loss(lambda x_t, t: true(x_t, t) + error, c.x, seeded(c.seed))
        close(loss, error.square().sum() / error.numel())
    close(torch.autograd.grad(loss, wrong)[0], 2 * wrong / wrong.numel())


@given(chain())
def test_eq8_is_the_error_of_the_picture_but_for_the_ratio_of_noise_to_signal(c):
    """‖x̂_0 - x_0‖² = (1-ᾱ_t)/ᾱ_t ‖ε - ε_θ‖²: why a large loss at small t is a small error."""
    mean, variance = marginal(c.d, c.t)
    picture = c.d.predict_x0(c.d.q_sample(c.x, c.t, c.eps), c.y, c.t)
    close((picture - c.x)**2, variance / mean**2 * (c.eps - c.y)**2)


def test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element():
    """χ² with 6 and with 48 degrees of freedom: above 32 and above 99 once in 50,000."""
    d, n, model = DDPM([NAN] + 7 * [0.5]), 19_600, Mock(side_effect=lambda x_t, t: x_t)
    d.loss(model, torch.zeros(n, 3, dtype=F64), seeded(0))
    x_t, t = model.call_args.args
    assert (t.min(), t.max()) == (1, 7)
    counts = torch.bincount(t - 1, minlength=7)
    assert ((counts - n / 7)**2 / (n / 7)).sum() < 32
    pairs = torch.bincount(7 * (t[::2] - 1) + t[1::2] - 1, minlength=49)
    assert ((pairs - n / 98)**2 / (n / 98)).sum() < 99
    eps = x_t / (1 - 0.5**t[:, None]).sqrt()
    assert len(eps.unique()) == eps.numel()
    assert_moments(eps, 0, torch.eye(3, dtype=F64))


def test_generator_decides_the_noise_alike_on_every_device():
    """The draws from a CPU generator are made on the CPU, and leave it in the same state."""
    generators = seeded(0), seeded(0)
    for generator, device in zip(generators, ("cpu", "meta")):
        D.loss(wave, X.to(device), generator)
        D.p_step(wave, X.to(device), 2, generator=generator)
    assert generators[0].get_state().equal(generators[1].get_state())
    assert len({D.loss(wave, X, seeded(0)).item() for _ in range(9)}) == 1
    torch.manual_seed(0)
    first, second = D.loss(wave, X), D.loss(wave, X)
    torch.manual_seed(0)
    assert first == D.loss(wave, X) != second


# The exact ε in the place of the network

MEAN, I2 = torch.tensor([1.0, -0.5], dtype=F64), torch.eye(2, dtype=F64)
COV = torch.tensor([[0.8, 0.3], [0.3, 0.2]], dtype=F64)


def tweedie(d, log_p, x_t, t):
    """E[ε | x_t] = -√(1-ᾱ) ∇ log p(x_t), for each sample; log_p(x, √ᾱ, 1-ᾱ) is for one."""
    expected = []
    for x, s in zip(x_t, t):
        mean, variance = marginal(d, s)
        expected.append(-variance**0.5 * torch.func.grad(log_p)(x, mean, variance))
    return torch.stack(expected)


@given(chain(), st.integers(0, 3))
def test_exact_eps_of_gaussian_data_is_tweedies_for_a_covariance_of_any_rank(c, rank):
    mean, root = c.y[0], normal(c.y[0].numel(), rank, seed=c.seed + 1)
    cov, noise = root @ root.T, torch.eye(len(root), dtype=F64)

    def log_p(x, a, v):
        return MultivariateNormal(a * mean.flatten(), a**2 * cov + v * noise).log_prob(x.flatten())

    exact = GaussianEps(c.d, mean, cov)
    close(exact(c.x, c.times), tweedie(c.d, log_p, c.x, c.times), tol=1e-8)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**32))
def test_draws_of_gaussian_data_have_its_mean_and_covariance_of_any_rank(D, rank, seed):
    mean, root = normal(D, seed=seed), normal(D, rank, seed=seed + 1)
    data = GaussianEps(DDPM([NAN, 0.5]), mean, root @ root.T)
    draws = data.sample(2000, seeded(seed))
    assert draws.equal(data.sample(2000, seeded(seed)))
    assert_moments(draws, mean, root @ root.T, bias=1e-6)  # the rounding of a variance of 0


@given(chain(), st.integers(1, 5), st.integers(1, 4))
def test_exact_eps_of_a_few_points_is_tweedies_in_chunks_of_any_size(c, N, chunk):
    points = normal(N, *c.x[0].shape, seed=c.seed + 1)

    def log_p(x, a, v):
        return Normal(a * points, v**0.5).log_prob(x).reshape(N, -1).sum(1).logsumexp(0)

    for exact in EmpiricalEps(c.d, points, chunk), EmpiricalEps(c.d, points):
        close(exact(c.x, c.times), tweedie(c.d, log_p, c.x, c.times), tol=1e-8)


def reverse_gain(d, t):
    """m_{t-1}, K, m_t with E[x_{t-1} | x_t] = m_{t-1} + K (x_t - m_t), for x_0 ~ N(MEAN, COV)."""
    (a_prev, v_prev), (a, v) = marginal(d, t - 1), marginal(d, t)
    cov_prev, cov_t = a_prev**2 * COV + v_prev * I2, a**2 * COV + v * I2
    return a_prev * MEAN, (1 - d.beta[t]).sqrt() * cov_prev @ cov_t.inverse(), a * MEAN


@given(chain())
def test_eq7_with_the_exact_eps_is_the_mean_of_x_before_given_x_t(c):
    x_t, (m_prev, K, m_t) = normal(5, 2, seed=c.seed), reverse_gain(c.d, c.t)
    eps = GaussianEps(c.d, MEAN, COV)(x_t, torch.full((5,), c.t))
    close(c.d.mean_from_eps(x_t, eps, c.t), m_prev + (x_t - m_t) @ K.T)


@given(both_variances)
def test_eq2_with_the_exact_eps_follows_the_linear_recursion(variance):
    """mean ← m_{t-1} + K (mean - m_t), cov ← K cov Kᵀ + σ_t² I from x_T ~ N(0, I) on; σ_1 = 0."""
    d, mean, cov = DDPM([NAN, 0.2, 0.4, 0.3, 0.5]), 0 * MEAN, I2
    exact = GaussianEps(d, MEAN, COV)
    path = d.p_sample(exact, normal(100_000, 2), generator=seeded(1), **variance)
    for t, (_, x) in zip((4, 3, 2, 1), path, strict=True):
        m_prev, K, m_t = reverse_gain(d, t)
        sigma2 = d.posterior_variance(t) if variance else d.beta[t]
        mean = m_prev + K @ (mean - m_t)
        cov = K @ cov @ K.T + sigma2 * I2 * (t > 1)
        assert_moments(x, mean, cov)


@given(both_variances)
def test_eq2_with_the_exact_eps_in_many_small_steps_gives_back_gaussian_data(variance):
    d = DDPM(linear_beta(400, 1e-4, 0.05))
    exact = GaussianEps(d, MEAN, COV)
    *_, (_, x_0) = d.p_sample(exact, normal(10_000, 2), generator=seeded(1), **variance)
    assert_moments(x_0, MEAN, COV, bias=0.01)


def test_eq2_with_the_exact_eps_in_many_small_steps_lands_on_the_points_in_their_proportions():
    d, n = DDPM(linear_beta(400, 1e-4, 0.05)), 4000
    points = torch.tensor([[0.0, 0], [2, 1], [2, 1], [-1, 2]], dtype=F64)
    exact = EmpiricalEps(d, points)
    *_, (_, x_0) = d.p_sample(exact, normal(n, 2), None, "posterior", seeded(1))
    share = (torch.cdist(x_0, points) < 1e-6).double().mean(0)
    expected = torch.tensor([0.25, 0.5, 0.5, 0.25])
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


# Mistakes that stand in public code, and a theorem that fails on each

MISTAKES = [  # a mistake, the right code in ddpm.py and the wrong one, and a theorem that fails
    ("β_0 multiplied into ᾱ", "torch.cat([self.alpha.new_ones(1), self.alpha[1:]])", "self.alpha",
     test_tables_hold_beta_alpha_and_their_product_from_alpha_bar_0_is_1),
    ("ᾱ shifted by one", "self.alpha.new_ones(1)", "self.alpha.new_ones(2)",
     test_eq5_has_the_mean_and_variance_of_the_iterated_eq1),
    ("the √ of 1-ᾱ forgotten in (5)", "(1 - alpha_bar).sqrt(), x_0", "1 - alpha_bar, x_0",
     test_eq5_is_the_iterated_eq1),
    ("x̂_0 divided by ᾱ", "per_sample(alpha_bar.sqrt(), x_t)", "per_sample(alpha_bar, x_t)",
     test_eq5_solved_for_x_0_gives_the_x_0_that_explains_x_t),
    ("the coefficients of (4) swapped", "x_t + per_sample(weight_0, x_t) * x_0",
     "x_0 + per_sample(weight_0, x_t) * x_t", test_eq4_is_eq6_when_x_t_comes_from_eq5),
    ("β_t for β̃_t", " * (1 - self.alpha_bar[t - 1]) / (1 - self.alpha_bar[t])", "",
     test_eq4_and_the_posterior_variance_are_bayes_rule),
    ("β ε for √β ε in (2)", "sigma2.sqrt() * (t > 1)", "sigma2 * (t > 1)",
     test_eq2_with_the_exact_eps_follows_the_linear_recursion),
    ("noise in the last step", "sigma2.sqrt() * (t > 1)", "sigma2.sqrt()",
     test_eq2_is_iterated_from_t_to_0_without_noise_in_the_last_step),
    ("T never drawn", "torch.randint(1, self.T + 1", "torch.randint(1, self.T",
     test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element),
    ("t = 0 drawn", "torch.randint(1, self.T + 1", "torch.randint(0, self.T + 1",
     test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element),
    ("one ε for the whole batch", "eps = randn_like(x_0, generator)",
     "eps = randn_like(x_0[:1], generator).expand_as(x_0)",
     test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element),
    ("the model asked at t-1", "(model, x_t, t)).square()", "(model, x_t, t - 1)).square()",
     test_eq8_is_the_squared_error_as_a_mean_over_every_element_of_any_batch),
    ("the loss summed, not averaged", ".square().mean()", ".square().sum()",
     test_eq8_is_the_squared_error_as_a_mean_over_every_element_of_any_batch),
]


@pytest.mark.parametrize("mistake, right, wrong, theorem", MISTAKES,
                         ids=[mistake for mistake, *_ in MISTAKES])
def test_a_mistake_of_others_makes_a_theorem_fail(mistake, right, wrong, theorem, monkeypatch):
    names, source = {}, (HERE / "ddpm.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    exec(source.replace(right, wrong), names)
    monkeypatch.setitem(globals(), "DDPM", names["DDPM"])
    with pytest.raises((AssertionError, ValueError)):
        theorem()


# 4. Network

README = (HERE / "README.md").read_text(encoding="utf-8")


def network(channels=(4, 8), **options):
    """A small UNet with random weights everywhere, also where a fresh one has zeros."""
    torch.manual_seed(0)
    net = UNet(channels=channels, **options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


few = st.integers(1, 3)


@given(few, few, few, few, st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3))
def test_unet_returns_the_shape_it_was_given_and_starts_at_zero(n, colours, rows, columns, widths):
    smallest, t = 2 ** (len(widths) - 1), torch.arange(n)
    x = torch.randn(n, colours, rows * smallest, columns * smallest)
    assert network(widths, in_channels=colours)(x, t).shape == x.shape
    assert not UNet(colours, widths)(x, t).any()


def test_unet_depends_on_the_time_and_treats_each_sample_alone():
    net, x, t = network(), torch.randn(5, 1, 8, 8), torch.tensor([50, 1, 200, 2, 199])
    alone = torch.cat([net(a[None], b[None]) for a, b in zip(x, t)])
    torch.testing.assert_close(net(x, t), alone)
    same, untold = x[:1].expand(5, -1, -1, -1), network(told_t=False)
    assert torch.pdist(net(same, t).flatten(1)).min() > 1e-3
    assert untold(same, t).equal(untold(same, t * 0))


@pytest.mark.parametrize("level", [0, 1])
def test_a_skip_takes_the_way_down_to_the_way_up(level):
    """With all that lies deeper cut off, a level is still heard at the output."""
    net = network((4, 8, 8))
    torch.nn.init.zeros_(net.narrow[level].weight)
    net(torch.randn(2, 1, 8, 8), torch.tensor([1, 200])).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in net.down[level].parameters())


def test_the_drawing_of_the_unet_has_the_widths_and_the_sides_of_its_levels():
    sides, net = [], UNet()
    for level in net.down:
        level[-1].register_forward_hook(
            lambda _, inputs, h: sides.append("{} x {} x {}".format(*h.shape[1:])))
    net(torch.zeros(1, 1, 28, 28), torch.ones(1))
    drawn = [line for line in UNet.__doc__.splitlines() if line.endswith(tuple(sides))]
    assert len(drawn) == 3 and all(line.strip() in README for line in drawn)


def test_a_residual_block_begins_with_nothing_and_adds_a_normalised_correction():
    x, (time, another) = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 64)
    block = ResidualBlock(4, 4, 64)
    assert block(x, time).equal(x)
    torch.nn.init.normal_(block.conv2.weight)
    assert block(x, time).equal(block(x, another))  # the scale and the shift are still zero
    norm, block.norm = block.norm, torch.nn.Identity()
    correction, mirrored, at_0 = (block(y, time) - y for y in (x, -x, 0 * x))
    assert (correction + mirrored - 2 * at_0).abs().max() > 0.1  # and it is no affine map of x
    block.norm = norm
    torch.nn.init.normal_(block.time.weight)
    before = block(x, time)
    block.conv1.register_forward_hook(lambda conv, inputs, h: 100 * h)
    torch.testing.assert_close(block(x, time), before, rtol=1e-3, atol=1e-3)


def test_time_embedding_tells_1_to_1000_apart_from_fast_to_slow():
    torch.manual_seed(0)
    embedding = TimeEmbedding(64)
    assert torch.pdist(embedding(torch.arange(1, 1001)).double()).min() > 1e-4
    sines, cosines = embedding.waves(torch.arange(1001)).chunk(2, dim=1)
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones_like(sines))
    angles = torch.atan2(sines[1], cosines[1]).log()  # at t = 1 the angles are the frequencies
    torch.testing.assert_close(angles, torch.linspace(0, -math.log(1000), 32), rtol=1e-4, atol=1e-4)


# 6. Training: from here on, what runs the program and looks at its files

import ast
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from matplotlib.image import imsave

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # before train could change it

import figures
import train

CPU, BARS = torch.device("cpu"), torch.eye(8).repeat(3, 1, 1)[:, None].mul(255).byte()
TINY = {"steps": 40, "batch_size": 2, "lr": 1e-3, "timesteps": 8, "channels": [4, 8], "told_t": 1,
        "muon": 1, "seed": 0}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_muon_keeps_the_singular_vectors_and_brings_the_singular_values_together(m, n, seed):
    """Singular values from 0.1 to 1, as they are found, end between 0.4 and 1.3."""
    u, _, v = torch.linalg.svd(normal(m, n, seed=seed), full_matrices=False)
    direction = train.orthogonal(u * torch.linspace(0.3, 1, len(v), dtype=F64) @ v)
    values = (u.T @ direction @ v.T).diagonal()
    close(direction, u * values @ v)
    assert ((values > 0.4) & (values < 1.3)).all()


def test_muon_is_that_of_torch_within_the_rounding_of_its_bfloat16():
    gradients = normal(3, 16, 8 * 9).float()
    kernel = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    matrix = torch.nn.Parameter(torch.zeros(16, 72))
    mine = train.Muon([kernel], {"lr": 1.0})
    theirs = torch.optim.Muon([matrix], 1.0, weight_decay=0, momentum=0.9, ns_steps=3,
                              adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        kernel.grad, matrix.grad = gradient.view_as(kernel).clone(), gradient.clone()
        mine.step()
        theirs.step()
        torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0.02)
    assert matrix.abs().max() > 1


def test_every_parameter_of_the_unet_gets_a_gradient_and_learns_and_one_with_0_stays():
    net = network((4, 8, 8))
    optimizers = train.new_optimizers(net, 0.1)
    assert all(kernel.shape[2:] == (3, 3) for kernel in optimizers[0].param_groups[0]["params"])
    assert len(optimizers[0].param_groups[0]["params"]) == 20
    assert not train.new_optimizers(net, 0.1, muon=0)[0].param_groups[0]["params"]
    before = {name: p.clone() for name, p in net.named_parameters()}
    net(torch.randn(2, 1, 8, 8), torch.tensor([1, 200])).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in net.parameters())
    still = net.down[0][0].conv2.weight
    still.grad.zero_()
    train.take_step(optimizers, 0.1)
    for name, p in net.named_parameters():
        assert p.equal(before[name]) == (p is still) and p.isfinite().all(), name
        assert p.grad is None


def test_the_learning_rate_rises_for_a_tenth_of_the_run_and_falls_along_a_line_to_0():
    rates = [[optimizer.param_groups[0]["lr"] for optimizer in optimizers]
             for _, _, optimizers, _, _ in train.train(TINY, BARS, CPU)]
    muon, adamw = np.array(rates).T / TINY["lr"]
    assert (muon == adamw).all()
    assert muon[:4] == pytest.approx(np.array([1, 2, 3, 4]) / 4, rel=0.1)
    assert muon[3:] == pytest.approx(1 - np.arange(3, 40) / 40)


def test_the_average_is_of_the_last_weights_and_lags_by_a_thirtieth_of_the_run():
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step in range(1, 601):
        torch.nn.init.constant_(model.weight, step)
        train.update_average(average, model, step, 600)
        assert average.weight.item() == 1 or step > 1
    assert average.weight.item() == pytest.approx(600 - 600 / 30 + 1, abs=0.1)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_can_be_saved(monkeypatch):
    steps = []
    monkeypatch.setattr(train, "learning_rate", lambda _, step: NAN if step == 34 else 0)
    with pytest.raises(train.InputError, match="at step 35: try a smaller --lr"):
        steps.extend(step for *_, step in train.train(TINY, BARS, CPU))
    assert steps == list(range(1, 35))


def test_train_works_in_a_thread_and_leaves_the_random_numbers_of_the_caller_alone():
    before = torch.get_rng_state()
    states = ThreadPoolExecutor().submit(list, train.train(TINY, BARS, CPU)).result(60)
    assert len(states) == 40 and torch.get_rng_state().equal(before)


# 6. The commands, most of them in this process: each of the others imports torch for seconds

SMALL = "--data data --steps 60 --batch-size 4 --channels 4 8 --timesteps 8 --device cpu"
DIGITS, CHECKPOINT = "data/train-images-idx3-ubyte.gz", "out/model.pt"


def command(line, codes=(0,)):
    """What train.py or figures.py prints here, ending with such a code; if 0, ASCII and narrow."""
    printed, main = io.StringIO(), train.main if line.startswith("train.py") else figures.main
    with (patch.dict(os.environ, COLUMNS="80"), pytest.raises(SystemExit) as stop,
          patch.multiple(sys, argv=line.split(), stdout=printed, stderr=printed)):
        sys.exit(train.run_command(main))
    code = stop.value.code or 0
    if isinstance(code, str):  # Python prints it, and ends with 1
        printed.write(f"{code}\n")
        code = 1
    printed = printed.getvalue()
    assert code in codes, printed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert code or printed.isascii() and max(map(len, printed.splitlines())) < 80
    return printed


def python(*arguments, folder=None, **environment):
    """What Python prints, as a process of its own, which must end well and in 90 seconds."""
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=ENVIRONMENT | environment, timeout=90,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    assert process.returncode == 0, process.stdout
    return process.stdout


def write_idx(path, array):
    """An array of 0..255 as a gzipped IDX file of bytes."""
    header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    Path(path).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


def write_data(folder="data", train=60, test=40, side=8, seed=0):
    """Bright bars on black, one for each label: a data set with the names of MNIST."""
    os.makedirs(folder, exist_ok=True)
    for split, n in ("train", train), ("t10k", test):
        labels = np.random.default_rng(seed + n).integers(0, min(side, 10), n)
        images = 255 * np.eye(side)[labels][:, :, None].repeat(side, 2)
        write_idx(f"{folder}/{split}-images-idx3-ubyte.gz", images)
        write_idx(f"{folder}/{split}-labels-idx1-ubyte.gz", labels)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with data/, and out/ of a small run on it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data()
        command(f"train.py {SMALL}")
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of it for one test, which works there."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


def test_the_shipped_data_is_mnist():
    for name, sha in {
        "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }.items():
        content = (HERE / f"mnist/{name}-ubyte.gz").read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha
    train_x, train_y, test_x, test_y = train.load_mnist(HERE / "mnist")
    assert (train_x.shape, test_x.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert train_y[:5].tolist() == [5, 0, 4, 1, 9] and len(test_y) == 10000
    pixels = train.to_pixels(train_x[:100])
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_a_run_depends_on_its_seed_but_neither_on_saves_between_nor_on_the_test_digits(folder):
    whole = Path(CHECKPOINT).read_bytes()
    write_data(test=30)
    command(f"train.py {SMALL} --overwrite --save-every 7")
    assert os.listdir("out") == ["model.pt"] and Path(CHECKPOINT).read_bytes() == whole
    command(f"train.py {SMALL} --overwrite --seed 1")
    assert Path(CHECKPOINT).read_bytes() != whole


def test_every_step_of_every_process_has_its_own_noise_and_so_has_the_test():
    keys = [(0, step, rank) for step in range(99) for rank in range(3)]  # the test's: (0, 0, 0)
    assert len({torch.randn(1, generator=train.generator(*key)).item() for key in keys}) == 297


def test_two_runs_do_not_write_one_file_nor_does_a_second_process(tmp_path):
    """The other writes at the end of a step, when this one asks whether it must stop."""
    path, run = tmp_path / "model.pt", train.train(TINY, BARS, CPU)
    path.write_bytes(b"of another run")
    with pytest.raises(train.InputError, match="another run: give each its own --out"):
        train.save_run(run, path, {"settings": TINY}, 3, stop=lambda: os.utime(path, (1, 1)))
    assert next(run)[-1] == 4  # after the first save, which is due at step 3
    train.save_run(run, path, {"settings": TINY}, 3, stop=lambda: False, rank=1)
    assert path.read_bytes() == b"of another run"


def test_a_run_brings_the_loss_down_from_1_and_its_averaged_weights_are_measured(finished, folder):
    state = train.read_checkpoint(CHECKPOINT)
    assert abs(state["losses"][0] - 1) < 0.2 and state["losses"][-20:].mean() < 0.5
    model, ddpm = state["network"], state["ddpm"]
    assert not model.training and ddpm.T == 8
    assert all(p.equal(state["average"][name]) for name, p in model.state_dict().items())
    assert any(not p.equal(state["model"][name]) for name, p in model.state_dict().items())
    loss = train.test_losses(model, ddpm, train.to_pixels(train.load_mnist("data")[2])).mean()
    assert f"test loss (8): {loss:.4f} +-" in command("train.py --resume --data data")
    assert Path(CHECKPOINT).read_bytes() == (finished / CHECKPOINT).read_bytes()


def test_a_test_set_of_one_digit_a_T_of_1_and_other_sides_and_widths_are_no_special_cases(folder):
    write_data(test=1, side=32)
    printed = command(f"train.py {SMALL} --overwrite --steps 2 --timesteps 1 --batch-size 1")
    assert "+- 0.0000 over 1 test" in printed and "nan" not in printed
    values = normal(1000)
    assert train.mean_and_error(values)[1] == pytest.approx(values.std().item() / 1000**0.5)


@pytest.mark.parametrize("seconds", [0.05, 0.3])
def test_a_killed_run_goes_on_and_ends_bit_for_bit_where_it_would_have(seconds, folder):
    """Killed at any moment, also during a write: with a save after every step, most are writing."""
    flags, deadline = f"{SMALL} --out killed --save-every 1".split(), time.monotonic() + 90
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags], env=ENVIRONMENT)
    while not os.path.exists("killed/model.pt"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(seconds)
    process.kill()
    process.wait()
    command("train.py --resume --data data --out killed")
    a, b = (torch.load(f"{out}/model.pt", weights_only=True) for out in ("killed", "out"))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_ctrl_c_saves_and_two_processes_go_on_as_one_on_whole_batches(folder, monkeypatch):
    monkeypatch.setattr(train, "update_average", lambda *_: signal.raise_signal(signal.SIGINT))
    printed = command(f"train.py {SMALL} --overwrite --steps 3 --batch-size 2 --lr 0.001", [130])
    assert "after step 1, which is saved: --resume goes on" in printed
    path, images = Path(CHECKPOINT), train.load_mnist("data")[0]
    begun = train.read_checkpoint(path)
    flags = "--resume --data data --device cpu --save-every 1".split()
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    python(*torchrun, HERE / "train.py", *flags)
    model, _, optimizers, _, _ = train.begin(begun["settings"], CPU, begun)
    for step in 2, 3:
        for rank in 0, 1:
            random = train.generator(0, step, rank)
            x_0 = train.to_pixels(images[torch.randint(len(images), (1,), generator=random)])
            (begun["ddpm"].loss(model, x_0, random) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        train.take_step(optimizers, train.learning_rate(begun["settings"], step))
    torch.testing.assert_close(train.read_checkpoint(path)["model"], model.state_dict())
    command("train.py --resume --data data")  # what two have written, one can read


def test_the_clone_may_have_any_name_move_and_print_in_any_encoding(tmp_path):
    old, new = tmp_path / "Mi tarea 100% ñ", tmp_path / "条件"
    write_data(old / "mnist")
    for name in "ddpm.py", "unet.py", "train.py":
        shutil.copy(HERE / name, old)

    flags = f"train.py {SMALL} --data mnist".split()
    assert "step 60/60" in python(*flags, folder=old, PYTHONIOENCODING="cp932")
    old.rename(new)
    printed = python("train.py", "--resume", folder=new, PYTHONIOENCODING="cp1251")
    assert "test loss (8)" in printed
    assert b"tarea" not in (new / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("script", ["train.py", "figures.py"])
def test_help_is_ascii_in_80_columns_as_all_that_is_printed(script):
    assert "--data" in command(f"{script} --help")


def test_a_bug_of_a_student_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda self, x, t: x.reshape(7))
    with pytest.raises(RuntimeError, match="shape"):
        command(f"train.py {SMALL} --overwrite")


def test_an_import_leaves_the_notebook_as_it_is():
    python("-c", "import os, signal, sys\n"
                 "before = signal.getsignal(signal.SIGINT), dict(os.environ), sys.stdout\n"
                 "import matplotlib\nmatplotlib.use('svg')\nimport torch, figures, train\n"
                 "assert before == (signal.getsignal(signal.SIGINT), os.environ, sys.stdout)\n"
                 "assert matplotlib.get_backend() == 'svg' and torch.is_grad_enabled()\n"
                 "assert 'matplotlib.pyplot' not in sys.modules", folder=HERE)


# 6. Files

@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_whole(call, monkeypatch, tmp_path):
    train.write_file(tmp_path / "file", lambda file: file.write(b"earlier"))
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(train.InputError, match="file can't be written .No space left.*whole"):
        train.write_file(tmp_path / "file", lambda file: file.write(b"later"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"earlier"}


@pytest.mark.parametrize("name, read", [
    (DIGITS, lambda path: train.read_idx(path, 3)),
    (CHECKPOINT, lambda path: train.read_checkpoint(path)["network"].parameters())])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_rightly(name, read, data, finished, tmp_path_factory):
    """Cut short, with up to three bytes changed, or random; refused in one line."""
    whole, path = (finished / name).read_bytes(), tmp_path_factory.mktemp("damaged") / "file"
    place = st.floats(0, 0.999).map(lambda part: int(part * len(whole)))
    masks = data.draw(st.dictionaries(place, st.integers(1, 255), min_size=1, max_size=3))
    changed = bytes(byte ^ masks.get(i, 0) for i, byte in enumerate(whole))
    cut = place.map(lambda end: whole[:end])
    path.write_bytes(data.draw(st.one_of(st.just(changed), cut, st.binary(max_size=200))))
    try:
        assert all(a.equal(b) for a, b in zip(read(path), read(finished / name), strict=True))
    except train.InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


class Call:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("change", [
    {"model": Call()}, {"average": {}}, {"settings": 1},
    {"average": {name: NAN * p for name, p in UNet(channels=[4, 8]).state_dict().items()}},
    {"settings": TINY | {"steps": 60, "batch_size": 0}},
    {"settings": TINY | {"steps": 60, "channels": [8, 8]}}])
def test_a_checkpoint_with_a_call_or_of_another_network_is_refused_unexecuted(change, folder):
    torch.save(torch.load(CHECKPOINT, weights_only=True) | change, CHECKPOINT)
    with pytest.raises(train.InputError, match="model.pt is no whole"):
        train.read_checkpoint(CHECKPOINT)
    assert not Path("executed").exists()


# 6. Measuring and drawing

def test_every_method_is_measured_alike():
    """Called as the network, the best linear denoiser and the memory get their own numbers."""
    data = [torch.randint(top, (n, *shape), generator=seeded(n)).to(kind) for n in (50, 40)
            for top, shape, kind in ((256, (1, 4, 4), torch.uint8), (3, (), torch.int64))]
    d, x = DDPM(linear_beta(4)), train.to_pixels(data[0])
    linear, memory = GaussianEps(d, x.mean(0), x.flatten(1).T.cov()), EmpiricalEps(d, x)
    for name, model in ("linear", linear), ("memory", memory):
        metrics, _ = figures.measure(model, d, data, 16, seed=0)
        losses, denoising = metrics["losses"], metrics["denoising"]
        assert losses["network"]["loss"] == pytest.approx(losses[name]["loss"])
        assert all(row["network"]["psnr"] == row[name]["psnr"] for row in denoising.values())
    loss, error = losses["noisy"]["loss"]
    assert loss == pytest.approx(1, abs=5 * error)
    for t, row in denoising.items():
        mean, error = row["noisy"]["psnr"]
        snr = (d.alpha_bar[t] / (1 - d.alpha_bar[t])).item()
        assert mean == pytest.approx(10 * np.log10(4 * snr), abs=5 * error + 0.4)


def test_the_digits_that_walk_back_are_measured_against_themselves(tmp_path):
    """From t = 1 the reverse process is a step without noise, the one-shot estimate."""
    write_data(tmp_path, train=4000, test=60)
    data = train.load_mnist(tmp_path)
    d, x = DDPM(linear_beta(4, beta_T=0.5)), train.to_pixels(data[0])
    exact = GaussianEps(d, x.mean(0), x.flatten(1).T.cov())
    metrics, pictures = figures.measure(exact, d, data, 20, seed=0)
    torch.testing.assert_close(pictures["reverse"][1][0], pictures["network"][1][0])
    measured, clean = metrics["denoising"], pictures["clean"]
    assert list(measured) == [1, 2, 3, 4] and list(pictures["reverse"]) == [1, 2, 4]
    for t, (walked, _) in pictures["reverse"].items():
        errors = (walked - clean).square().flatten(1).mean(1)
        psnr = (10 * (4 / errors).log10()).mean().item()
        assert measured[t]["reverse"]["psnr"][0] == pytest.approx(psnr, abs=1e-3)
    assert min(metrics["clean"][0], *(row["read"][0] for row in measured[1].values())) > 0.9
    made = pictures["made"]
    assert made["real digits"].equal(clean)
    torch.testing.assert_close(made["noised digits"].clamp(-1, 1), pictures["reverse"][4][0])
    assert made["matched Gaussian"].mean() == pytest.approx(x.mean().item(), abs=0.1)


@pytest.mark.parametrize("T, t", [(40, [1.5 + 2 * i for i in range(20)]), (3, [1, 2, 3])])
def test_losses_by_time_are_means_over_spans_of_equal_length(T, t):
    """Of a model that is wrong by √t everywhere, so that its loss at t is t."""
    d, black = DDPM(linear_beta(T)), torch.zeros(400, 1, 2, 2, dtype=F64)

    def wrong(x_t, t):
        eps = x_t / per_sample((1 - d.alpha_bar[t]).sqrt(), x_t)
        return eps + per_sample(t.double().sqrt(), x_t)
    row = figures.measure_loss(wrong, d, black)
    assert row["t"] == t and row["loss_by_t"] == pytest.approx(t)


def test_frechet_distance_of_a_stretched_and_shifted_set():
    """(m_a - m_b)² + (s_a - s_b)² along each axis; 0 for equal sets, and no favourite axis."""
    a, distance = normal(99, 3), figures.frechet_distance
    b = 3 * a + 2
    expected = (a.mean(0) - b.mean(0))**2 + (a.std(0) - b.std(0))**2
    assert distance(a, b) == pytest.approx(expected.sum().item())
    turn, x, y = torch.linalg.qr(normal(4, 4))[0], normal(99, 4), normal(99, 4, seed=1) * 2
    assert distance(x, x) == pytest.approx(0, abs=1e-6)
    assert distance(x @ turn, y @ turn) == pytest.approx(distance(x, y))


def test_the_spread_of_the_frechet_distance_is_that_over_many_draws():
    b = normal(5000, 3)
    draws = [figures.frechet_and_error(1 + normal(200, 3, seed=seed), b) for seed in range(60)]
    distances, errors = torch.tensor(draws).T
    assert errors.mean() == pytest.approx(distances.std().item(), rel=0.3)


def test_the_fit_of_losses_finds_the_limit_that_they_were_made_with():
    runs = [{"settings": {"steps": steps}, "loss": (0.04 + 2 / steps**0.8, 0)}
            for steps in (300, 600, 1200, 2400)]
    assert figures.fit_limit(runs) == pytest.approx((0.04, 2, 0.8), rel=1e-3)


def both_kinds(*names):
    return {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}


def test_figures_draws_what_it_can_without_a_network(folder):
    os.remove(CHECKPOINT)
    imsave("x.png", np.zeros((6, 5)))
    assert "python train.py" in command("figures.py --data data --image x.png")
    drawn = both_kinds("forward", "marginal", "bayes", "schedule", "embedding")
    assert set(os.listdir("out/figures")) == drawn


def test_figures_draws_a_network_beside_others_and_leaves_the_runs_as_they_were(
        folder, monkeypatch):
    monkeypatch.setattr(figures, "draw_without_network", lambda *_: None)
    before = Path(CHECKPOINT).read_bytes()
    for steps in 10, 20, 30:
        command(f"train.py {SMALL} --steps {steps} --out {steps}")
    runs = f"{CHECKPOINT} 10/model.pt 20/model.pt 30/model.pt"
    command(f"figures.py --data data --digits 16 --checkpoint {runs} --out drawn")
    drawn = both_kinds("losses", "quality", "denoising", "generation", "reverse", "compute")
    assert set(os.listdir("drawn")) == drawn | {"metrics.json", "reverse.gif"}
    assert os.listdir("out") == ["model.pt"] and Path(CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("pixels, value", [
    (np.zeros((6, 5)), -1), (np.full((6, 5), 65535, np.uint16), 1),
    (np.ones((6, 5, 3)), 1), (np.zeros((6, 5, 4), np.uint8), 1)], ids=["L", "I;16", "RGB", "RGBA"])
def test_any_png_can_go_through_the_forward_process(pixels, value, monkeypatch):
    monkeypatch.setattr(figures, "imread", lambda path: pixels)
    assert figures.read_image("x.png").equal(torch.full((3, 6, 5), float(value)))


def test_a_large_picture_keeps_no_frame_that_is_not_drawn(monkeypatch):
    made, alive, q_step = [], [], DDPM.q_step

    def watched(*arguments):
        alive.append(sum(frame() is not None for frame in made))
        x = q_step(*arguments)
        made.append(weakref.ref(x))
        return x
    monkeypatch.setattr(DDPM, "q_step", watched)
    figures.draw_forward(torch.zeros(3, 4, 5))
    assert len(made) == 200 and max(alive) <= 2


# What is refused, in one sentence

METHODS = {  # all that makes a tensor like x from x, another tensor y and a time
    "eq1": lambda d, x, y, t: d.q_step(x, t, y),
    "eq2": lambda d, x, y, t: d.p_step(lambda _, t: wave(y, t), x, t, generator=seeded(0)),
    "eq2_posterior": lambda d, x, y, t: d.p_step(
        lambda _, t: wave(y, t), x, t, "posterior", seeded(0)),
    "eq4": lambda d, x, y, t: d.posterior_mean(x, y, t),
    "eq5": lambda d, x, y, t: d.q_sample(x, t, y),
    "eq5_solved": lambda d, x, y, t: d.predict_x0(x, y, t),
    "eq6": lambda d, x, y, t: d.mean_from_eps(x, y, t),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
@given(c=chain())
def test_a_t_for_each_sample_is_each_sample_with_its_own_t(method, c):
    """Also in (2), where only t > 1 has noise: the seed is the same, hence the ε."""
    together = method(c.d, c.x, c.y, c.times)
    alone = [method(c.d, c.x, c.y, t)[i] for i, t in enumerate(c.times.tolist())]
    close(together, torch.stack(alone))


@every_method
@pytest.mark.parametrize("like", [torch.float16, torch.bfloat16, torch.float32, F64, "meta"],
                         ids=str)
def test_result_has_the_dtype_and_device_of_x_whatever_the_defaults_of_torch(method, like):
    """The meta device stands for a GPU: it computes nothing, but refuses to mix with the CPU."""
    x = X.to(like)
    with torch.device("cpu" if like == "meta" else "meta"):
        d = DDPM(D.beta.tolist())
        result = method(d, x, x, torch.tensor([1, 3], device="cpu"))
        losses = d.loss(wave, x, seeded(0)) + d.loss(wave, x)
    assert (result.dtype, result.device, result.shape) == (x.dtype, x.device, x.shape)
    assert (losses.dtype, losses.device, losses.shape) == (x.dtype, x.device, ())


def test_float32_keeps_six_digits_at_every_t_of_the_default_schedule():
    d, t = DDPM(linear_beta()), torch.arange(1, 201)
    x, y = normal(2, 200, 50).float()
    exact = GaussianEps(d, y[0], torch.eye(50) / 1000)
    for method in METHODS["eq4"], METHODS["eq5"], METHODS["eq6"], lambda d, x, y, t: exact(x, t):
        assert method(d, x, y, t).dtype == torch.float32
        close(method(d, x, y, t).double(), method(d, x.double(), y.double(), t), tol=1e-6)


def unet(channels, *shapes):
    """A UNet asked with zeros of these shapes for x and t."""
    return lambda: UNet(channels=channels)(*map(torch.zeros, shapes))


WRONG = [  # what the ValueError says, and the calls that raise it
    ("T must be at least 1, got 0", lambda: linear_beta(0)),
    (r"T\+1 ≥ 2 numbers .*\(1,\)", lambda: DDPM([0.1])),
    (r"T\+1 ≥ 2 numbers .*\(\)", lambda: DDPM(0.1)),
    (r"T\+1 ≥ 2 numbers .*\(2, 2\)", lambda: DDPM([[0.1, 0.1]] * 2)),
    (r"in \(0, 1\), got values from 0.1 to 1", lambda: DDPM([0.2, 1.0, 0.1])),
    (r"in \(0, 1\), got values from nan", lambda: DDPM([0.2, 0.1, NAN])),
    (r"in \(0, 1\), got values from 1e-17 to 0.1", lambda: DDPM([0.2, 1e-17, 0.1])),
    ("in 1..3, got 0", lambda: D.posterior_variance(0)),
    (r"got .*\(2, 1\)$", lambda: D.posterior_variance(torch.ones(2, 1).long())),
    ("float tensor", lambda: D.loss(wave, X.long()), lambda: D.p_sample(wave, X.long())),
    (r"shape of x_t, \(2, 5\), got \(1, 5\)", lambda: D.loss(lambda x, t: x[:1], X)),
    ("\"posterior\", got 'beta_t'", lambda: D.p_step(wave, X, 1, variance="beta_t"),
     lambda: D.p_sample(wave, X, variance="beta_t")),
    ("in 1..3, got 4", lambda: D.p_sample(wave, X, 4)),  # at the call, not at next()
    ("one int as the t of all", lambda: D.p_sample(wave, X, torch.tensor([1, 2]))),
    (r"5 x 5 for this mean, got \(4, 4\)", lambda: GaussianEps(D, X[0], torch.eye(4))),
    ("multiples of 4, one", unet(()), unet((4, 6)), unet((4, -4))),
    ("H and W multiples of 2", unet((4, 8), (2, 1, 6, 7), (2,))),
    ("H and W multiples of 4", unet((4, 8, 8), (2, 1, 6, 8), (2,))),
    (r"\(B, 1, H, W\)", unet((4,), (2, 3, 8, 8), (2,)), unet((4,), (1, 1, 8, 8, 2), (1,))),
    (r"shape \(2,\)", unet((4,), (2, 1, 8, 8), (1,)), unet((4,), (2, 1, 8, 8), ())),
]
float_x, int_t = r"float tensor of shape \(B, ...\), got ", "an int or an int64 tensor .*"
WRONG_X_Y_T = [
    (X.long(), X.long(), 1, float_x + r"torch.int64 of shape \(2, 5\)"),
    (X[0, 0], X[0, 0], 1, float_x + r"torch.float64 of shape \(\)"),
    (X, X[:, 1:], 1, r"\(2, 5\)(,| and|, got) .*\(2, 4\)"),
    (X, X, torch.tensor([0, 3]), r"in 1..3, got \[0, 3\]"),
    (X, X, torch.tensor([1, 4]), r"in 1..3, got \[1, 4\]"),
    (X, X, 1.0, int_t + "float"),
    (X, X, True, int_t + "bool"),
    (X, X, torch.tensor([1, 2]).int(), int_t + "int32"),
    (X, X, torch.tensor([1, 2, 3]), "one time for each of 2 samples, got 3"),
    (X, X, torch.tensor([[1], [2]]), int_t + r"\(2, 1\)"),
]
WRONG += [(said, lambda method=method, x=x, y=y, t=t: method(D, x, y, t))
          for method in METHODS.values() for x, y, t, said in WRONG_X_Y_T]


@pytest.mark.parametrize("said, call", [(said, call) for said, *calls in WRONG for call in calls])
def test_value_error_says_what_was_expected(said, call):
    with pytest.raises(ValueError, match=said):
        call()


NEW, RESUME = "train.py --data data --out new", "train.py --data data --resume"
DRAW = "figures.py --data data --digits 16"
REFUSED = [
    *[(f"{NEW} {flag}", flag.split()[0], None) for flag in (
        "--steps 0", "--steps x", "--batch-size -1", "--timesteps 0", "--lr nan", "--lr 0",
        "--lr inf", "--seed -1", "--told-t 2", "--muon 2", "--channels 0", "--channels 6",
        "--save-every 0", "--device tpu", "--nonsense")],
    ("train.py --data missing --out new", "missing/train-images-idx3-ubyte.gz", None),
    (NEW, DIGITS, lambda: Path(DIGITS).write_bytes(2 * Path(DIGITS).read_bytes())),
    (NEW, DIGITS, lambda: write_idx(DIGITS, np.zeros((0, 8, 8)))),
    (NEW, DIGITS, lambda: write_idx(DIGITS, np.zeros((9, 8, 8, 3)))),
    (NEW, "label", lambda: write_idx(DIGITS, np.zeros((5, 8, 8)))),
    (NEW, "one size", lambda: write_idx(DIGITS, np.zeros((60, 8, 9)))),
    (f"{NEW} --channels 4 8 8 8 8", "can't be halved 4 times", None),
    ("train.py --data data --out data/train-labels-idx1-ubyte.gz/x", "labels-idx1", None),
    ("train.py --data data", "--resume to go on with it, --overwrite to replace it", None),
    ("train.py --resume --out fresh", "fresh", None),
    (f"{RESUME} --steps 9999", "--resume goes on to the end", None),
    (RESUME, "other digits", lambda: write_data(seed=3)),
    (DRAW, "other digits", lambda: write_data(seed=3)),
    (f"{DRAW} --digits 21", "--digits", None),
    (f"{DRAW} --seed -1", "--seed", None),
    (f"{DRAW} --checkpoint missing.pt", "missing.pt", None),
    (f"{DRAW} --image {CHECKPOINT}", CHECKPOINT, None),
]


@pytest.mark.parametrize("line, named, spoil", REFUSED)
def test_bad_input_ends_with_one_sentence_and_writes_nothing(line, named, spoil, folder):
    if spoil:
        spoil()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    printed = command(line, codes=(1, 2))
    assert named in printed.replace("\\", "/") and printed.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# The text

def rounded(value, error):
    """Both, to the first digit of the error."""
    digits = max(0, -math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def linear_losses(ddpm, mean, cov):
    """The loss (8) of the best linear estimate of ε for data with this mean and covariance.

    Told t, with a matrix for each; not told, with one for all. With S the covariance of x_t and s
    the mean of √(1-ᾱ_t), it is 1 - s² tr(S⁻¹)/D; not told, S has the variance of √ᾱ_t m as well.
    """
    alpha_bar = ddpm.alpha_bar[1:, None]
    variances = torch.linalg.eigvalsh(cov.double())
    told = 1 - (1 - alpha_bar) / (alpha_bar * variances + 1 - alpha_bar)
    mixed = alpha_bar.mean() * cov + (1 - alpha_bar.mean()) * torch.eye(len(cov))
    mixed += alpha_bar.sqrt().var(correction=0) * torch.outer(mean.flatten(), mean.flatten())
    not_told = 1 - (1 - alpha_bar).sqrt().mean() ** 2 / torch.linalg.eigvalsh(mixed)
    return {"told_t": told.mean().item(), "not_told_t": not_told.mean().item()}


def test_linear_losses_are_those_of_the_best_linear_estimates_told_t_and_not():
    """By least squares over draws, with one matrix for each t and with one for all."""
    d, n = DDPM([NAN, 0.1, 0.5, 0.3]), 200_000
    x_0 = GaussianEps(d, MEAN, COV).sample(n, seeded(0))
    t, eps = 1 + torch.arange(n) % 3, normal(n, 2, seed=1)
    x_t = torch.cat([d.q_sample(x_0, t, eps), torch.ones(n, 1, dtype=F64)], dim=1)

    def least(chosen):
        weights = torch.linalg.lstsq(x_t[chosen], eps[chosen]).solution
        return (eps[chosen] - x_t[chosen] @ weights).square().mean().item()

    told, not_told = linear_losses(d, MEAN, COV).values()
    assert told == pytest.approx(np.mean([least(t == s) for s in (1, 2, 3)]), rel=0.01)
    assert not_told == pytest.approx(least(t > 0), rel=0.01) and not_told > 1.02 * told


def rows_of_the_readme(metrics, growth):
    """The rows of its tables, from the measurements."""
    yield ["test loss (8)", *(rounded(*row["loss"]) for row in metrics["losses"].values())]
    for t, row in metrics["denoising"].items():
        yield [t] + [f"{cell['psnr'][0]:.1f}, {cell['read'][0]:.0%}" for cell in row.values()]
    for name, row in metrics["generation"].items():
        sure = rounded(*(100 * number for number in row["sure"]))
        yield [name, rounded(*row["frechet"]), f"{sure} %"]
    for name, (seconds, megabytes) in growth.items():
        yield [name, f"{seconds:.2g}", f"{megabytes:.0f}"]
    for mistake, _, _, theorem in MISTAKES:
        yield [mistake, theorem.__name__.removeprefix("test_").replace("_", " ")]


def phrases_of_the_readme(metrics, growth):
    """The numbers in its sentences, from the measurements and from the schedule."""
    d, told, not_told = DDPM(linear_beta()), *metrics["runs"][:2]
    ratio = d.posterior_variance([2, 10, 100]) / d.beta[[2, 10, 100]]
    yield "is 0, {:.2f}, {:.2f} and {:.3f} at $t$ = 1, 2, 10 and 100".format(*ratio)
    weight = d.beta / (2 * d.alpha * (1 - d.alpha_bar))
    yield f"falls from {weight[1]:.2f} at $t = 1$ to {weight[200]:.3f} at $t = 200$"
    snr = d.alpha_bar / (1 - d.alpha_bar)
    yield f"falls from {(1 + snr[1])**0.5:.0f} at $t=1$ to {(1 + snr[200])**0.5:.2f} at $t=200$"
    yield f"$x_3$: {snr[3]:,.0f} times as much signal"
    yield f"$x_{{200}}$: {snr[200]:.2f} times as much signal"
    yield f"equal near $t = {(d.alpha_bar - 0.5).abs().argmin()}$"
    yield f"$\\bar\\alpha_T = {d.alpha_bar[-1]:.6f}$"
    yield f"which makes it ${(1 - torch.linspace(1e-4, 0.02, 200, dtype=F64)).prod():.6f}$"
    yield f"$\\sqrt{{\\bar\\alpha_T}} = {d.alpha_bar[-1].sqrt():.2f}$"
    yield f"$\\bar\\alpha_T = {1e5 * DDPM(linear_beta(1000)).alpha_bar[-1]:.0f}\\cdot10^{{-5}}$"
    yield f"{sum(p.numel() for p in UNet().parameters()):,} parameters"
    runs, adamw = {run["settings"]["steps"]: run for run in metrics["runs"]}, metrics["runs"][2]
    yield f"`--muon 0 --lr {adamw['settings']['lr']}`"
    yield f"in {adamw['settings']['steps']:,} steps to {rounded(*adamw['loss'])}"
    yield f"with Muon 1,200 are enough for {rounded(*runs[1200]['loss'])}"
    above = [a / b - 1 for a, b in zip(runs[300]["loss_by_t"], told["loss_by_t"])]
    yield f"by $t$, {min(above):.0%} to {max(above):.0%} above that of the default run"
    worse = [a / b - 1 for a, b in zip(not_told["loss_by_t"], told["loss_by_t"])]
    yield f"By $t$ it is {min(worse):.0%} to {max(worse):.0%} worse"
    data, (mean, variance) = train.load_mnist(HERE / "mnist"), marginal(d, 200)
    nats = sum(kl_divergence(Normal(mean * x, variance**0.5), Normal(0, 1)).sum() / len(data[2])
               for x in train.to_pixels(data[2]).split(1000))
    x = train.to_pixels(data[0]).flatten(1)
    m = x.mean(0)
    linear = linear_losses(d, m, x.T @ x / len(x) - m.outer(m))
    yield "{told_t:.3f} told and {not_told_t:.3f} not told (exact".format(**linear)
    yield (f"{rounded(*told['loss'])} told and {rounded(*not_told['loss'])} not told, "
           f"which is {not_told['loss'][0] / told['loss'][0] - 1:.1%} worse")
    cells = [cell for row in metrics["denoising"].values() for cell in row.values()]
    yield f"standard errors are at most {max(cell['psnr'][1] for cell in cells):.2f} dB"
    yield f"Standard errors are at most {max(cell['read'][1] for cell in cells):.1%}"
    yield f"reads {metrics['clean'][0]:.0%} of the clean ones"
    lost = [row["network"]["psnr"][0] - row["reverse"]["psnr"][0]
            for row in metrics["denoising"].values() if "reverse" in row]
    yield f"is {min(lost):.1f} to {max(lost):.1f} dB below the one-shot estimate"
    yield ("at $t = {t}$, grey pixels, at the edges of the strokes, are {pixels:.0%} of the pixels "
           "and carry {loss:.0%} of the loss".format(**metrics["grey"]))
    a, b, c = figures.fit_limit(figures.like_the_default(metrics["runs"]))
    yield f"${a:.4f} + {b:.2f}/\\mathrm{{steps}}^{{{c:.2f}}}$, says {a:.3f} for ever"
    yield f"{1 - a / told['loss'][0]:.0%} below the default run"
    yield (f"is {nats:.0f} nats, on average over the test digits, and "
           f"{(mean * m).square().sum() / 2:.0f} of them are the mean image alone")
    minutes = told["settings"]["steps"] * growth["`--batch-size 32`"][0] / 60
    yield f"{minutes:.0f} minutes at best on 2 CPU cores"


def test_the_readme_shows_the_numbers_of_the_committed_files():
    metrics = json.loads((HERE / "figures/metrics.json").read_text(encoding="utf-8"))
    measured = (HERE / "figures/growth.txt").read_text(encoding="utf-8")
    runs = np.array(re.findall(r"(\S+)/s,\n(\S+) kB", measured), float).reshape(2, -1, 2)
    speed, kilobytes = runs.max(0).T  # of the faster of two runs, and of the larger
    flags = re.findall('"(--.*?)"', re.search("for flags in (.*); do", README)[1])
    rows = [f"`{flag}`" for flag in flags] + ["`torchrun`, two processes"]
    growth = dict(zip(rows, zip(1 / speed, kilobytes / 1024), strict=True))
    lines, text = README.splitlines(), " ".join(README.split())
    for row in rows_of_the_readme(metrics, growth):
        assert any(line.startswith("| " + " | ".join(row) + " |") for line in lines), row
    for phrase in phrases_of_the_readme(metrics, growth):
        assert phrase in text
    steps = [run["settings"]["steps"] for run in metrics["runs"]]
    assert steps == [2000, 2000, 2200, 300, 600, 1200, 4000]
    assert metrics["digits"] == 1000 and metrics["seed"] == 0


def test_the_python_of_the_readme_runs_as_it_stands(folder):
    imports, training, drawing = re.findall("```python\n(.*?)```", README, re.DOTALL)
    assert max(imports.count("\n"), training.count("\n"), drawing.count("\n")) <= 6
    names = {}
    exec(imports + training, names)
    assert names["model"](names["x_0"], torch.ones(32)).abs().max() > 0
    exec(imports + drawing, names)
    assert names["t"] == 0 and names["x"].shape == (16, 1, 28, 28)


def test_every_name_in_the_table_of_equations_selects_a_test():
    names = re.findall(r"^\|.*\| (`\w+`(?:, `\w+`)*) \|$", README, re.MULTILINE)
    assert len(names) == 8
    for name in re.findall(r"\w+", " ".join(names)):
        assert any(name in test for test in globals() if test.startswith("test_")), name


def test_no_line_is_over_100_columns_and_no_function_over_60_lines():
    for name in "ddpm.py", "unet.py", "train.py", "figures.py", "test_ddpm.py":
        text = (HERE / name).read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 100, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, node.name
