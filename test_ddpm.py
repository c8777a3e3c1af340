"""The exercise sheet as theorems: each test reaches one quantity by two independent routes.

In the order of the sheet; the number in a name is that of the equation. Schedules, shapes, data and times
are random (Hypothesis), everything is float64 unless float32 is the point. Monte Carlo tests have a fixed
seed and accept five standard errors.
"""
import errno, gzip, hashlib, json, multiprocessing, os, runpy, shutil, signal, subprocess, sys, tempfile, time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.distributions import MultivariateNormal, Normal

import figures
import train
from ddpm import DDPM, EmpiricalEps, GaussianEps, linear_beta
from unet import TimeEmbedding, UNet

settings.register_profile("ddpm", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("ddpm")
torch.set_num_threads(1)  # threads only get in the way of tensors this small

NAN, F64 = float("nan"), torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=seeded(seed))


def close(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64).expand_as(actual), rtol=tol, atol=tol)


@st.composite
def chain(draw, first_t=1):
    """A schedule of 1 to 8 steps, three tensors of one shape, a time t ≥ first_t, and one t for each sample.

    β_0 is NaN: it must reach no result.
    """
    T, seed = draw(st.integers(first_t, 8)), draw(st.integers(0, 2**32))
    t, beta = draw(st.integers(first_t, T)), draw(st.lists(st.floats(1e-3, 0.999), min_size=T, max_size=T))
    B, *shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    x, y, eps = normal(3, B, *shape, seed=seed)
    ts = torch.randint(first_t, T + 1, (B,), generator=seeded(seed))
    d, zero = DDPM([NAN] + beta), torch.zeros_like(x)
    return SimpleNamespace(d=d, x=x, y=y, eps=eps, zero=zero, one=zero + 1, t=t, ts=ts, seed=seed)


def marginal(d, t):
    """√ᾱ_t and 1-ᾱ_t, without ᾱ: what (1) does to a mean and to a variance, one β at a time."""
    mean, variance = 1.0, 0.0
    for beta in d.beta[1:t + 1].tolist():
        mean, variance = (1 - beta)**0.5 * mean, (1 - beta) * variance + beta
    return mean, variance


def wave(x, t):
    """A model: not linear in x, and another one at every t."""
    return (x.sin().transpose(0, -1) * t.cos().to(x.dtype)).transpose(0, -1)


METHODS = {  # all that makes a tensor like x from x, another tensor y and a time
    "eq1": lambda d, x, y, t: d.q_step(x, t, y),
    "eq2": lambda d, x, y, t: d.p_step(lambda _, t: wave(y, t), x, t, generator=seeded(0)),
    "eq2_posterior": lambda d, x, y, t: d.p_step(lambda _, t: wave(y, t), x, t, "posterior", seeded(0)),
    "eq4": lambda d, x, y, t: d.posterior_mean(x, y, t),
    "eq5": lambda d, x, y, t: d.q_sample(x, t, y),
    "eq5_solved": lambda d, x, y, t: d.predict_x0(x, y, t),
    "eq6": lambda d, x, y, t: d.mean_from_eps(x, y, t),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
both_variances = pytest.mark.parametrize("variance", [{}, {"variance": "posterior"}], ids=["default", "posterior"])


def assert_moments(x, mean, cov, bias=0.0):
    """The samples x, one a row, have this mean and this covariance, within five standard errors and a bias."""
    v = cov.diagonal()
    assert ((x.mean(0) - mean).abs() <= 5 * (v / len(x)).sqrt() + bias).all()
    assert ((x.T.cov() - cov).abs() <= 5 * ((v.outer(v) + cov**2) / len(x)).sqrt() + bias).all()


# Tables and arguments


@given(st.integers(1, 50), st.floats(0, 1), st.floats(0, 1))
def test_linear_beta_is_a_straight_line_and_by_default_that_of_the_sheet(T, beta_0, beta_T):
    beta = linear_beta(T, beta_0, beta_T)
    assert len(beta) == T + 1
    close(beta[[0, -1]], [beta_0, beta_T])
    close(beta.diff(), (beta_T - beta_0) / T)
    close(linear_beta()[[0, -1]], [0.0001, 0.02])
    close(DDPM(linear_beta()).alpha_bar[200], 0.130865, tol=5e-7)  # the sheet's T


@given(chain())
def test_tables_hold_beta_alpha_and_their_product_from_alpha_bar_0_is_1(c):
    d = c.d
    assert len(d.beta) == len(d.alpha) == len(d.alpha_bar) == d.T + 1
    close(d.alpha[1:] + d.beta[1:], 1)
    close(d.alpha_bar[0], 1)
    close(d.alpha_bar[1:].log(), d.alpha[1:].log().cumsum(0))


D, X = DDPM([NAN, 0.1, 0.2, 0.3]), torch.zeros(2, 5, dtype=F64)
WRONG = {
    "no_steps": (lambda: linear_beta(0), "T must be at least 1, got 0"),
    "beta_0_alone": (lambda: DDPM([0.1]), r"T\+1 ≥ 2 numbers .*\(1,\)"),
    "beta_a_number": (lambda: DDPM(0.1), r"T\+1 ≥ 2 numbers .*\(\)"),
    "beta_a_matrix": (lambda: DDPM([[0.1, 0.1]] * 2), r"T\+1 ≥ 2 numbers .*\(2, 2\)"),
    "beta_0": (lambda: DDPM([0.2, 0.0, 0.1]), r"in \(0, 1\), got values from 0 to 0.1"),
    "beta_1": (lambda: DDPM([0.2, 1.0, 0.1]), r"in \(0, 1\), got values from 0.1 to 1"),
    "beta_negative": (lambda: DDPM([0.2, 0.1, -0.1]), r"in \(0, 1\), got values from -0.1 to 0.1"),
    "beta_above_1": (lambda: DDPM([0.2, 0.1, 1.1]), r"in \(0, 1\), got values from 0.1 to 1.1"),
    "beta_nan": (lambda: DDPM([0.2, 0.1, NAN]), r"in \(0, 1\), got values from nan"),
    "alpha_rounds_to_1": (lambda: DDPM([0.2, 1e-17, 0.1]), r"in \(0, 1\), got values from 1e-17 to 0.1"),
    "posterior_variance_t": (lambda: D.posterior_variance(0), "in 1..3, got 0"),
    "posterior_variance_ts": (lambda: D.posterior_variance(torch.ones(2, 1).long()), r"\(B,\), got .*\(2, 1\)$"),
    "loss_int": (lambda: D.loss(wave, X.long()), "float tensor"),
    "loss_model": (lambda: D.loss(lambda x, t: x[:1], X), r"shape of x_t, \(2, 5\), got \(1, 5\)"),
    "variance": (lambda: D.p_step(wave, X, 1, variance="beta_t"), '"beta" or "posterior", got \'beta_t\''),
    "p_sample_t": (lambda: D.p_sample(wave, X, 4), "in 1..3, got 4"),  # at the call, not at the first next()
    "p_sample_ts": (lambda: D.p_sample(wave, X, torch.tensor([1, 2])), "one int as the t of all samples, got 2"),
    "p_sample_x": (lambda: D.p_sample(wave, X.long()), "float tensor"),
    "p_sample_variance": (lambda: D.p_sample(wave, X, variance="beta_t"), '"beta" or "posterior"'),
    "cov": (lambda: GaussianEps(D, X[0], torch.eye(4)), r"5 x 5 for this mean, got \(4, 4\)"),
}
WRONG_X_Y_T = {
    "x_int": (X.long(), X.long(), 1, r"float tensor of shape \(B, ...\), got torch.int64 of shape \(2, 5\)"),
    "x_no_batch": (X[0, 0], X[0, 0], 1, r"float tensor of shape \(B, ...\), got torch.float64 of shape \(\)"),
    "y_shape": (X, X[:, 1:], 1, r"got \(2, 5\) and \(2, 4\)|model must return .*\(2, 5\), got \(2, 4\)"),
    "t_0": (X, X, 0, "in 1..3, got 0"),
    "t_T_plus_1": (X, X, 4, "in 1..3, got 4"),
    "ts_with_0": (X, X, torch.tensor([0, 3]), r"in 1..3, got \[0, 3\]"),
    "ts_with_T_plus_1": (X, X, torch.tensor([1, 4]), r"in 1..3, got \[1, 4\]"),
    "t_float": (X, X, 1.0, "an int or an int64 tensor .*float"),
    "t_bool": (X, X, True, "an int or an int64 tensor .*bool"),
    "ts_int32": (X, X, torch.tensor([1, 2]).int(), "an int or an int64 tensor .*int32"),
    "ts_too_long": (X, X, torch.tensor([1, 2, 3]), r"shape \(B,\), got .*\(3,\) for B = 2"),
    "ts_column": (X, X, torch.tensor([[1], [2]]), r"shape \(B,\), got .*\(2, 1\) for B = 2"),
}
WRONG |= {f"{eq}_{name}": (lambda method=method, x=x, y=y, t=t: method(D, x, y, t), said)
          for eq, method in METHODS.items() for name, (x, y, t, said) in WRONG_X_Y_T.items()}


@pytest.mark.parametrize("call, said", WRONG.values(), ids=WRONG)
def test_value_error_says_what_was_expected(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@every_method
@given(c=chain())
def test_a_t_for_each_sample_is_each_sample_with_its_own_t(method, c):
    """Also in (2), where t = 1 has no noise beside t > 1 that has: the seed is the same, hence the ε."""
    together = method(c.d, c.x, c.y, c.ts)
    close(together, torch.stack([method(c.d, c.x, c.y, t)[i] for i, t in enumerate(c.ts.tolist())]))


@every_method
@pytest.mark.parametrize("like", [torch.float16, torch.bfloat16, torch.float32, F64, "meta"], ids=str)
def test_result_has_the_dtype_and_device_of_x_whatever_the_defaults_of_torch(method, like):
    """The meta device stands for a GPU: it computes nothing, but refuses to mix with the CPU."""
    x = X.to(like)
    with torch.device("cpu" if like == "meta" else "meta"):
        result = method(D, x, x, torch.tensor([1, 3], device="cpu"))
        losses = D.loss(wave, x, seeded(0)) + D.loss(wave, x)
    assert (result.dtype, result.device, result.shape) == (x.dtype, x.device, x.shape)
    assert (losses.dtype, losses.device, losses.shape) == (x.dtype, x.device, ())


def test_float32_keeps_six_digits_at_every_t_of_the_default_schedule():
    d, t = DDPM(linear_beta()), torch.arange(1, 201)
    x, y = normal(2, 200, 50).float()
    exact = GaussianEps(d, y[0], torch.eye(50) / 1000)
    for method in METHODS["eq4"], METHODS["eq5"], METHODS["eq6"], lambda d, x, y, t: exact(x, t):
        assert method(d, x, y, t).dtype == torch.float32
        close(method(d, x, y, t).double(), method(d, x.double(), y.double(), t), tol=1e-6)


# 1. Forward process


def iterate_eq1(d, x_0, noises):
    for t, eps in enumerate(noises, start=1):
        x_0 = d.q_step(x_0, t, eps)
    return x_0


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
def test_eq5_eps_is_a_sum_of_the_eps_of_eq1_with_weights_whose_squares_add_to_1(c):
    noises, nothing = normal(c.t, *c.x.shape, seed=c.seed + 1), torch.zeros(1, dtype=F64)
    impulses = torch.eye(c.t, dtype=F64)[..., None]  # ε_s = 1 and the others 0, for each s
    weights = torch.cat([iterate_eq1(c.d, nothing, impulse) for impulse in impulses])
    weights = weights / c.d.q_sample(nothing, c.t, nothing + 1)
    close(weights.square().sum(), 1)
    close(iterate_eq1(c.d, c.x, noises), c.d.q_sample(c.x, c.t, torch.tensordot(weights, noises, 1)))


def test_eq5_draws_have_the_mean_and_covariance_of_iterated_paths():
    d, n = DDPM([NAN, 0.1, 0.5, 0.3, 0.2]), 20_000
    x_0 = torch.tensor([3.0, -1.0, 0.0], dtype=F64).expand(n, 3)
    mean, variance = marginal(d, 4)
    for x_4 in iterate_eq1(d, x_0, normal(4, n, 3)), d.q_sample(x_0, 4, normal(n, 3, seed=1)):
        assert_moments(x_4, mean * x_0[0], variance * torch.eye(3, dtype=F64))


@given(chain(first_t=2), st.data())
def test_eq5_from_0_to_s_and_from_s_to_t_is_eq5_from_0_to_t(c, data):
    """From s on, the process is the one whose schedule is β_{s+1}, β_{s+2}, ..."""
    s = data.draw(st.integers(1, c.t - 1))
    rest = DDPM(c.d.beta[s:])
    close(rest.q_sample(c.d.q_sample(c.x, s, c.zero), c.t - s, c.zero), c.d.q_sample(c.x, c.t, c.zero))
    early = rest.q_sample(c.d.q_sample(c.zero, s, c.one), c.t - s, c.zero)
    late = rest.q_sample(c.zero, c.t - s, c.one)
    close(early**2 + late**2, c.d.q_sample(c.zero, c.t, c.one)**2)


@given(chain())
def test_eq5_solved_for_x_0_gives_the_x_0_that_explains_x_t(c):
    close(c.d.q_sample(c.d.predict_x0(c.x, c.eps, c.t), c.t, c.eps), c.x)


# 2. Reverse process


@given(chain(first_t=2))
def test_eq4_and_the_posterior_variance_are_bayes_rule(c):
    """log p(x_t | x_{t-1}) + log p(x_{t-1} | x_0) - log p(x_t | x_0) = log p(x_{t-1} | x_t, x_0), everywhere."""
    def log_p(x, given_x, q, t):
        return Normal(q(given_x, t, c.zero), q(c.zero, t, c.one)).log_prob(x)

    x_0, x_prev, x_t, d, t = c.x, c.y, c.eps, c.d, c.t
    bayes = (log_p(x_t, x_prev, d.q_step, t) + log_p(x_prev, x_0, d.q_sample, t - 1)
             - log_p(x_t, x_0, d.q_sample, t))
    close(Normal(d.posterior_mean(x_t, x_0, t), d.posterior_variance(t).sqrt()).log_prob(x_prev), bayes, tol=1e-8)


@given(chain())
def test_eq4_and_the_posterior_variance_give_back_the_marginal_of_x_before(c):
    mean, variance = marginal(c.d, c.t - 1)
    close(c.d.posterior_mean(c.d.q_sample(c.x, c.t, c.zero), c.x, c.t), mean * c.x)
    carried = c.d.posterior_mean(c.d.q_sample(c.zero, c.t, c.one), c.zero, c.t)
    close(carried**2 + c.d.posterior_variance(c.t), variance)


@given(chain())
def test_eq4_is_eq6_when_x_t_comes_from_eq5(c):
    x_t = c.d.q_sample(c.x, c.t, c.eps)
    close(c.d.mean_from_eps(x_t, c.eps, c.t), c.d.posterior_mean(x_t, c.x, c.t))


@given(chain())
def test_posterior_variance_is_0_at_t_1_and_below_beta_everywhere(c):
    t = torch.arange(1, c.d.T + 1)
    variance = c.d.posterior_variance(t)
    assert variance[0] == 0 and (variance[1:] > 0).all() and (variance < c.d.beta[1:]).all()
    close(torch.stack([c.d.posterior_variance(s) for s in t.tolist()]), variance)


# 2 and 7. The whole reverse process, with the exact ε in the place of the network


MEAN, I = torch.tensor([1.0, -0.5], dtype=F64), torch.eye(2, dtype=F64)
COV = torch.tensor([[0.8, 0.3], [0.3, 0.2]], dtype=F64)


def tweedie(d, log_p, x_t, t):
    """E[ε | x_t] = -√(1-ᾱ) ∇ log p(x_t), Tweedie's formula, for each sample; log_p(x, √ᾱ, 1-ᾱ) is for one."""
    expected = []
    for x, s in zip(x_t, t):
        mean, variance = marginal(d, s)
        x = x.clone().requires_grad_()
        expected.append(-variance**0.5 * torch.autograd.grad(log_p(x, mean, variance), x)[0])
    return torch.stack(expected)


@given(chain(), st.integers(0, 3))
def test_exact_eps_of_gaussian_data_is_tweedies_for_a_covariance_of_any_rank(c, rank):
    mean, root = c.y[0], normal(c.y[0].numel(), rank, seed=c.seed + 1)
    cov, noise = root @ root.T, torch.eye(len(root), dtype=F64)

    def log_p(x, a, v):
        return MultivariateNormal(a * mean.flatten(), a**2 * cov + v * noise).log_prob(x.flatten())

    close(GaussianEps(c.d, mean, cov)(c.x, c.ts), tweedie(c.d, log_p, c.x, c.ts), tol=1e-8)


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

    for model in EmpiricalEps(c.d, points, chunk), EmpiricalEps(c.d, points):
        close(model(c.x, c.ts), tweedie(c.d, log_p, c.x, c.ts), tol=1e-8)


def reverse_gain(d, t):
    """m_{t-1}, K, m_t: E[x_{t-1} | x_t] = m_{t-1} + K (x_t - m_t) for x_0 ~ N(MEAN, COV), as (1) is linear."""
    (a_prev, v_prev), (a, v) = marginal(d, t - 1), marginal(d, t)
    cov_prev, cov_t = a_prev**2 * COV + v_prev * I, a**2 * COV + v * I
    return a_prev * MEAN, (1 - d.beta[t]).sqrt() * cov_prev @ cov_t.inverse(), a * MEAN


@given(chain())
def test_eq7_with_the_exact_eps_is_the_mean_of_x_before_given_x_t(c):
    x_t, (m_prev, K, m_t) = normal(5, 2, seed=c.seed), reverse_gain(c.d, c.t)
    eps = GaussianEps(c.d, MEAN, COV)(x_t, torch.full((5,), c.t))
    close(c.d.mean_from_eps(x_t, eps, c.t), m_prev + (x_t - m_t) @ K.T)


@both_variances
def test_eq2_with_the_exact_eps_follows_the_linear_recursion(variance):
    """From x_T ~ N(0, I) on: mean ← m_{t-1} + K (mean - m_t), cov ← K cov Kᵀ + σ_t² I, with σ_1 = 0."""
    d, mean, cov = DDPM([NAN, 0.2, 0.4, 0.3, 0.5]), 0 * MEAN, I
    path = d.p_sample(GaussianEps(d, MEAN, COV), normal(100_000, 2), generator=seeded(1), **variance)
    for t, (_, x) in zip((4, 3, 2, 1), path, strict=True):
        m_prev, K, m_t = reverse_gain(d, t)
        sigma2 = 0 if t == 1 else d.posterior_variance(t) if variance else d.beta[t]
        mean, cov = m_prev + K @ (mean - m_t), K @ cov @ K.T + sigma2 * I
        assert_moments(x, mean, cov)


@both_variances
def test_eq2_with_the_exact_eps_in_many_small_steps_gives_back_gaussian_data(variance):
    d = DDPM(linear_beta(400, 1e-4, 0.05))
    *_, (_, x_0) = d.p_sample(GaussianEps(d, MEAN, COV), normal(10_000, 2), generator=seeded(1), **variance)
    assert_moments(x_0, MEAN, COV, bias=0.01)


def test_eq2_with_the_exact_eps_in_many_small_steps_lands_on_the_points_in_their_proportions():
    d, points, n = DDPM(linear_beta(400, 1e-4, 0.05)), torch.tensor([[0.0, 0], [2, 1], [2, 1], [-1, 2]]), 4000
    *_, (_, x_0) = d.p_sample(EmpiricalEps(d, points.double()), normal(n, 2), None, "posterior", seeded(1))
    share = (torch.cdist(x_0, points.double()) < 1e-6).double().mean(0)
    expected = torch.tensor([0.25, 0.5, 0.5, 0.25])
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


@both_variances
@given(c=chain())
def test_eq2_is_iterated_from_t_to_0_without_noise_in_the_last_step(variance, c):
    def path(seed, **t):
        return list(c.d.p_sample(wave, c.x, generator=seeded(seed), **t, **variance))

    steps, generator, x = path(c.seed, t=c.t), seeded(c.seed), c.x
    assert [s for s, _ in steps] == list(range(c.t))[::-1]
    for s, x_s in steps:
        x_prev, x = x, c.d.p_step(wave, x, s + 1, generator=generator, **variance)
        assert x.equal(x_s)
    close(x, c.d.mean_from_eps(x_prev, wave(x_prev, torch.ones(len(x))), 1))
    assert [s for s, _ in path(c.seed)] == list(range(c.d.T))[::-1]
    assert steps[0][1].equal(path(c.seed + 1, t=c.t)[0][1]) == (c.t == 1)  # another seed, another path


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_eq2_has_no_gradient_and_asks_the_model_with_an_int64_t_for_each_sample(device):
    seen, weight = [], torch.ones((), requires_grad=True)
    path = D.p_sample(lambda x, t: seen.append(t) or weight * x, X.to(device))
    assert not any(x.requires_grad for _, x in path)
    assert [(t.dtype, t.shape, t.device.type) for t in seen] == 3 * [(torch.int64, (2,), device)]


# 4. Network


def network(channels=(4, 8), seed=0, **options):
    """A small UNet with random weights everywhere, also where a fresh one has zeros."""
    torch.manual_seed(seed)
    net = UNet(channels=channels, **options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3), st.data())
def test_unet_returns_the_shape_it_was_given_and_starts_at_zero(batch, in_channels, channels, data):
    height, width = (2 ** (len(channels) - 1) * data.draw(st.integers(1, 3)) for _ in range(2))
    x = torch.randn(batch, in_channels, height, width)
    assert network(channels, in_channels=in_channels)(x, torch.arange(batch)).shape == x.shape
    assert not UNet(in_channels, channels)(x, torch.arange(batch)).any()


@pytest.mark.parametrize("arguments, x, t, said", [
    ({"channels": ()}, None, None, "multiples of 4"), ({"channels": (4, 6)}, None, None, "multiples of 4"),
    ({"channels": (4, -4)}, None, None, "multiples of 4"),
    ({"channels": (4, 8)}, (2, 1, 6, 7), (2,), "multiples of 2"),
    ({"channels": (4, 8, 8)}, (2, 1, 6, 8), (2,), "multiples of 4"),
    ({"channels": (4,)}, (2, 3, 8, 8), (2,), r"\(B, 1, H, W\)"),
    ({"channels": (4,)}, (1, 8, 8), (1,), r"\(B, 1, H, W\)"),
    ({"channels": (4,)}, (1, 1, 8, 8, 2), (1,), r"\(B, 1, H, W\)"),
    ({"channels": (4,)}, (2, 1, 8, 8), (1,), r"shape \(2,\)"),
    ({"channels": (4,)}, (2, 1, 8, 8), (), r"shape \(2,\)"),
])
def test_unet_refuses_what_does_not_fit(arguments, x, t, said):
    with pytest.raises(ValueError, match=said):
        UNet(**arguments)(torch.zeros(x), torch.ones(t))


def test_unet_depends_on_the_time_and_treats_each_sample_alone():
    net, x, t = network(), torch.randn(5, 1, 8, 8), torch.tensor([1, 2, 50, 199, 200])
    out, order = net(x, t), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(net(x[order], t[order]), out[order])
    torch.testing.assert_close(torch.cat([net(a[None], b[None]) for a, b in zip(x, t)]), out)
    same = net(x[:1].expand(5, -1, -1, -1), t)
    assert (torch.cdist(same.flatten(1), same.flatten(1)) + torch.eye(5) > 1e-3).all()


def test_every_parameter_of_the_unet_gets_a_gradient():
    net = network((4, 8, 8))
    net(torch.randn(2, 1, 8, 8), torch.tensor([1, 200])).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("level", [0, 1])
def test_a_skip_takes_the_way_down_to_the_way_up(level):
    """With all that lies deeper cut off, a level is still heard at the output."""
    net = network((4, 8, 8))
    torch.nn.init.zeros_(net.narrow[level].weight)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 200])
    before = net(x, t)
    net.down[level].load_state_dict(network((4, 8, 8), seed=1).down[level].state_dict())
    assert (net(x, t) - before).abs().max() > 1e-3


def test_a_residual_block_adds_a_normalised_correction():
    """x + f(x): with the last layer of f at zero nothing is added, and f normalises the scale away."""
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 64)
    block = network().middle
    before = block(x, time)
    with torch.no_grad():
        block.conv1.weight *= 100
        block.conv1.bias *= 100
    torch.testing.assert_close(block(x, time), before, rtol=1e-3, atol=1e-3)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    assert block(x, time).equal(x)


def test_a_fresh_residual_block_adds_nothing_and_begins_with_a_correction_of_x_alone():
    x, times = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 64)
    block = UNet(channels=(4, 8)).down[0]
    assert block(x, times[0]).equal(x)
    torch.nn.init.normal_(block.conv2.weight)
    assert block(x, times[0]).equal(block(x, times[1]))  # the scale and the shift are still zero
    block.norm = torch.nn.Identity()
    correction, mirrored, at_0 = (block(y, times[0]) - y for y in (x, -x, 0 * x))
    assert (correction + mirrored - 2 * at_0).abs().max() > 0.1  # and it is not an affine map of x


def test_time_embedding_tells_1_to_1000_apart_from_fast_to_slow():
    torch.manual_seed(0)
    embedding = TimeEmbedding(64)
    apart = torch.pdist(embedding(torch.arange(1, 1001)).double())
    assert apart.min() > 1e-4
    seen = []
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedding(torch.arange(1001))
    sines, cosines = seen[0][:, :32], seen[0][:, 32:]
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones_like(sines))
    angles = torch.atan2(sines[1], cosines[1]).log()  # at t = 1 the angles are the frequencies
    torch.testing.assert_close(angles, torch.linspace(0, -torch.tensor(1e4).log().item(), 32), rtol=1e-4, atol=1e-4)


def test_ten_steps_reduce_the_loss_from_1():
    torch.manual_seed(0)
    net, x_0 = UNet(channels=(8, 8)), torch.randn(8, 1, 1, 1).expand(-1, -1, 8, 8)
    adam, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(11):
        losses.append(DDPM(linear_beta()).loss(net, x_0, seeded(0)))
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    assert abs(losses[0] - 1) < 0.2 and losses[-1] < 0.7 * losses[0]


# 5. Loss


def oracle(d, x_0):
    """A model that knows x_0, and so the ε of (5)."""
    def model(x_t, t):
        moments = [marginal(d, s) for s in t]
        return torch.stack([(x - mean * x0) / var**0.5 for x, x0, (mean, var) in zip(x_t, x_0, moments)])
    return model


def what_the_model_sees(d, x_0, generator=None):
    seen = []
    d.loss(lambda x_t, t: seen.extend((x_t, t)) or x_t, x_0, generator)
    return seen


@given(chain(), st.floats(-2, 2))
def test_eq8_is_the_squared_error_as_a_mean_over_every_element_of_any_batch(c, wrong):
    """And 0 for the true ε: the t that the model sees is the t that x_t was made with."""
    true, one_element = oracle(c.d, c.x), torch.eye(c.x.numel(), dtype=F64)[0].reshape(c.x.shape)
    for error, expected in (0, 0), (wrong, wrong**2), (one_element, 1 / c.x.numel()):
        close(c.d.loss(lambda x_t, t: true(x_t, t) + error, c.x, seeded(c.seed)), expected)


@pytest.mark.parametrize("w", [0.0, 0.5, -1.0])
def test_eq8_of_a_linear_predictor_and_its_gradient_are_what_algebra_says(w):
    """For x_0 = ±1, the mean over t of (1 - w √(1-ᾱ))² + w² ᾱ, with derivative 2w - 2 √(1-ᾱ)."""
    d, n = DDPM([NAN, 0.1, 0.5, 0.3]), 900_000
    noise = torch.tensor([marginal(d, t)[1] for t in (1, 2, 3)], dtype=F64).sqrt()
    x_0, weight = torch.tensor([[-1.0], [1.0]], dtype=F64).repeat(n // 2, 1), torch.tensor(w, requires_grad=True)
    loss = d.loss(lambda x_t, t: weight * x_t, x_0, seeded(0))
    loss.backward()
    error = 5 * 7 / n**0.5  # a single sample's standard deviation is below 7
    assert abs(loss - ((1 - w * noise)**2 + w**2 * (1 - noise**2)).mean()) < error
    assert abs(weight.grad - (2 * w - 2 * noise).mean()) < error


def test_eq8_draws_a_fresh_standard_normal_eps_for_every_element():
    x_t, _ = what_the_model_sees(DDPM([NAN, 0.25]), torch.zeros(20_000, 3, dtype=F64), seeded(0))
    assert len(x_t.unique()) == x_t.numel()
    assert_moments(x_t, 0, 0.25 * torch.eye(3, dtype=F64))


@pytest.mark.parametrize("B", [1, 3, 7, 10])
def test_eq8_gives_every_sample_a_t_uniform_on_1_to_T(B):
    """χ² with 6 degrees of freedom for each place in the batch: above 30 once in 25,000."""
    d, n, generator = DDPM([NAN] + 7 * [0.5]), 1400, seeded(0)
    t = torch.stack([what_the_model_sees(d, torch.zeros(B), generator)[1] for _ in range(n)])
    counts = torch.stack([(t == s).sum(0) for s in range(1, 8)])
    assert (counts.sum(0) == n).all()
    assert (((counts - n / 7)**2 / (n / 7)).sum(0) < 30).all()


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**32))
def test_eq8_spreads_the_t_of_a_batch_evenly_round_1_to_T(T, B, seed):
    """A batch of T has every t once; in any batch the gaps, and the counts, differ by at most one."""
    _, t = what_the_model_sees(DDPM([NAN] + T * [0.5]), torch.zeros(B), seeded(seed))
    counts = torch.stack([(t == s).sum() for s in range(1, T + 1)])
    gaps = t.sort().values.diff(append=t.min()[None]) % T  # the last gap closes the circle
    assert counts.sum() == B and counts.max() - counts.min() <= 1 and gaps.max() - gaps.min() <= 1


def test_generator_decides_the_noise_alike_on_every_device():
    """On any device, the draws from a CPU generator are made on the CPU, and leave it in the same state."""
    generators = seeded(0), seeded(0)
    for generator, device in zip(generators, ("cpu", "meta")):
        D.loss(wave, X.to(device), generator)
        D.p_step(wave, X.to(device), 2, generator=generator)
    assert generators[0].get_state().equal(generators[1].get_state())
    losses, again = [[D.loss(wave, X, seeded(seed)).item() for seed in range(20)] for _ in "12"]
    assert losses == again and len(set(losses)) == 20
    torch.manual_seed(0)
    first, second = D.loss(wave, X), D.loss(wave, X)
    torch.manual_seed(0)
    assert first == D.loss(wave, X) != second


# 6. Training, evaluation and files. The commands run in children of a server that has imported torch once.

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["test_ddpm", "train", "figures"])
HERE = Path(__file__).parent
IMAGES_FILE, CHECKPOINT = "data/train-images-idx3-ubyte.gz", "out/model.pt"
SMALL = "--steps 60 --batch-size 4 --channels 4 8 --timesteps 8 --device cpu".split()


def as_command(argv, folder):
    os.chdir(folder)
    for fd, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    torch.set_num_threads(1)
    sys.argv = [str(a) for a in argv]
    runpy.run_path(str(HERE / argv[0]), run_name="__main__")


def start(*argv, folder):
    process = server.Process(target=as_command, args=(argv, folder))
    process.start()
    return process


def command(*argv, folder):
    """The command in that folder: (exit code, stdout, stderr)."""
    process = start(*argv, folder=folder)
    process.join()
    return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def write_idx(path, array):
    header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


def write_data(folder, train=60, test=40, side=8, seed=0):
    """Bright bars on black, one for each label: a data set with the names of MNIST."""
    folder.mkdir(exist_ok=True)
    for split, n in ("train", train), ("t10k", test):
        labels = np.random.default_rng(seed + n).integers(0, side, n)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", 255 * np.eye(side)[labels][:, :, None].repeat(side, 2))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with data/, and out/ of a small run on it."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder / "data")
    code, stdout, stderr = command("train.py", *SMALL, "--data", "data", folder=folder)
    assert (code, stderr) == (0, "") and "step 60/60" in stdout and "test loss (8)" in stdout
    return folder


def listing(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("out/*"))}


def tensors(folder):
    state = torch.load(folder / "out/model.pt", weights_only=True)
    return [*state["model"].values(), *state["average"].values()]


def test_the_shipped_data_is_mnist():
    for name, sha in {
        "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }.items():
        assert hashlib.sha256((HERE / f"mnist/{name}-ubyte.gz").read_bytes()).hexdigest() == sha
    train_x, train_y, test_x, test_y = train.load_mnist(HERE / "mnist")
    assert (train_x.shape, test_x.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert train_y[:5].tolist() == [5, 0, 4, 1, 9] and len(test_y) == 10000
    pixels = train.to_pixels(train_x[:100])
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_a_run_can_be_repeated_measured_again_and_drawn(finished, tmp_path):
    """The same seed gives the same files; --evaluate gives the same numbers; figures.py draws them all."""
    before = listing(finished)
    assert sorted(before) == ["metrics.json", "model.pt", "pictures.pt"]
    assert command("train.py", *SMALL, "--data", finished / "data", folder=tmp_path)[0] == 0
    assert listing(tmp_path)["metrics.json"] == before["metrics.json"]
    assert command("train.py", "--evaluate", "out/model.pt", folder=finished)[0] == 0
    assert listing(finished) == before
    assert command("figures.py", folder=finished)[0] == 0
    drawn = {p.stem for p in finished.glob("figures/*.png")}
    assert drawn == {"forward", "schedule", "losses", "denoising", "quality", "reverse", "generation"}
    assert command("figures.py", "--out", "untrained", folder=tmp_path)[0] == 0


def test_a_finished_run_is_not_overwritten_unasked(finished):
    before = listing(finished)
    code, _, stderr = command("train.py", *SMALL, "--data", "data", folder=finished)
    assert code and all(word in stderr for word in ("--resume", "--overwrite", "--out")) and listing(finished) == before
    assert command("train.py", "--resume", folder=finished)[0] == 0 and listing(finished) == before
    assert command("train.py", "--overwrite", *SMALL, "--data", "data", folder=finished)[0] == 0
    assert listing(finished) == before


def test_what_is_measured_is_the_average_of_the_weights_in_the_file(finished):
    model, ddpm = train.load_checkpoint(finished / "out/model.pt")
    state = torch.load(finished / "out/model.pt", weights_only=True)
    assert not model.training and ddpm.T == 8
    assert all(p.equal(state["average"][name]) for name, p in model.state_dict().items())
    assert any(not p.equal(state["model"][name]) for name, p in model.state_dict().items())
    metrics = json.loads((finished / "out/metrics.json").read_text())
    again, _ = train.evaluate(model, ddpm, train.load_mnist(finished / "data"), seed=0)
    assert metrics["test_loss"]["network"][0] == pytest.approx(again["test_loss"]["network"][0], rel=1e-4)


def test_training_sees_neither_the_test_split_nor_its_noise(finished, tmp_path):
    write_data(tmp_path / "data", test=30, seed=7)
    for split in "images-idx3", "labels-idx1":
        shutil.copy(finished / f"data/train-{split}-ubyte.gz", tmp_path / "data")
    assert command("train.py", *SMALL, "--data", "data", folder=tmp_path)[0] == 0
    assert listing(tmp_path)["model.pt"] == listing(finished)["model.pt"]
    first = {torch.randn(1, generator=train.generator(0, step, rank)).item() for step in range(99) for rank in range(3)}
    assert len(first) == 297
    assert torch.randn(1, generator=train.generator(5, 3)) == torch.randn(1, generator=train.generator(5, 3))


def test_every_method_is_measured_alike():
    """Called as the network, the best linear denoiser and the memory get their own numbers."""
    data = [f for n in (50, 40) for f in (torch.randint(256, (n, 1, 4, 4), dtype=torch.uint8), torch.randint(3, (n,)))]
    d, x = DDPM(linear_beta(4)), train.to_pixels(data[0])
    linear, memory = GaussianEps(d, x.mean(0), x.flatten(1).T.cov()), EmpiricalEps(d, x)
    for name, model in ("linear", linear), ("memory", memory):
        metrics, _ = train.evaluate(model, d, data, seed=0)
        assert metrics["test_loss"]["network"] == pytest.approx(metrics["test_loss"][name])
        assert metrics["denoising"]["psnr"]["network"] == metrics["denoising"]["psnr"][name]
    assert metrics["test_loss"]["noisy"][0] == pytest.approx(1, abs=5 * metrics["test_loss"]["noisy"][1])
    snr = [(a / (1 - a)).item() for a in d.alpha_bar[metrics["denoising"]["t"]]]
    for s, (mean, error) in zip(snr, metrics["denoising"]["psnr"]["noisy"]):
        assert mean == pytest.approx(10 * np.log10(4 * s), abs=5 * error + 0.4)  # mean of log against log of mean


def test_the_digits_that_walk_back_are_measured_against_themselves(monkeypatch, tmp_path):
    """From t = 1 the reverse process is one step without noise, the one-shot estimate; here for 8 of the 30 digits."""
    monkeypatch.setattr(train, "WALKS", 8)
    data = train.load_mnist(write_data(tmp_path / "data", train=4000, test=60))
    d, x = DDPM(linear_beta(4, beta_T=0.5)), train.to_pixels(data[0])
    metrics, pictures = train.evaluate(GaussianEps(d, x.mean(0), x.flatten(1).T.cov()), d, data, seed=0)
    torch.testing.assert_close(pictures["reverse"][0], pictures["network"][0][:8])
    errors = (pictures["reverse"][0] - pictures["clean"][:8]).square().flatten(1).mean(1)
    measured = metrics["denoising"]
    assert measured["digits"] == 30 and measured["t"][0] == 1
    assert measured["psnr"]["reverse"][0][0] == pytest.approx((10 * (4 / errors).log10()).mean().item(), abs=1e-3)
    assert min(measured["accuracy_clean"], *(right[0] for right in measured["accuracy"].values())) > 0.9
    torch.testing.assert_close(pictures["generated"]["noised digits"].clamp(-1, 1), pictures["reverse"][-1])
    assert pictures["generated"]["matched Gaussian"].mean() == pytest.approx(x.mean().item(), abs=0.1)


def test_frechet_distance_of_a_stretched_and_shifted_set():
    """Along each axis it is (m_a - m_b)² + (s_a - s_b)²; it is 0 for equal sets, and has no favourite axis."""
    a = normal(99, 3)
    b = 3 * a + 2
    expected = (a.mean(0) - b.mean(0))**2 + (a.std(0) - b.std(0))**2
    assert train.frechet_distance(a, b) == pytest.approx(expected.sum().item())
    turn, x, y = torch.linalg.qr(normal(4, 4))[0], normal(99, 4), normal(99, 4, seed=1) * 2
    assert train.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert train.frechet_distance(x @ turn, y @ turn) == pytest.approx(train.frechet_distance(x, y))


def test_every_parameter_learns_with_muon_on_the_inner_kernels():
    net = network().to(memory_format=torch.channels_last)
    optimizers, views = train.make_optimizers(net, 0.1)
    before = {name: p.clone() for name, p in net.named_parameters()}
    net(torch.randn(4, 1, 8, 8), torch.arange(1, 5)).square().sum().backward()
    for kernel, matrix in views:
        assert matrix.data_ptr() == kernel.data_ptr() and kernel.shape[-1] == 3
        matrix.grad = kernel.grad.permute(0, 2, 3, 1).reshape(matrix.shape)
    for optimizer in optimizers:
        optimizer.step()
    assert len(views) == 18 and all(not p.equal(before[name]) for name, p in net.named_parameters())


@settings(max_examples=5)
@given(st.floats(0.1, 2))
def test_a_killed_run_goes_on_and_ends_bit_for_bit_where_it_would_have(finished, seconds):
    """SIGKILL at any moment, also during a write: with a save after every step, most of the time is writing."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        process = start("train.py", *SMALL, "--data", str(finished / "data"), "--save-every", "1", folder=folder)
        process.join(seconds)
        process.kill()
        process.join()
        how = ["--resume"] if (folder / "out/model.pt").exists() else [*SMALL, "--data", str(finished / "data")]
        code, _, stderr = command("train.py", *how, folder=folder)
        assert code == 0, stderr
        for a, b in zip(tensors(folder), tensors(finished)):
            assert a.equal(b)
        assert (folder / "out/metrics.json").read_bytes() == listing(finished)["metrics.json"]


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(finished, tmp_path):
    options = ["--data", str(finished / "data"), "--save-every", "7"]
    process = start("train.py", *SMALL, "--steps", "9999", *options, folder=tmp_path)
    while not (tmp_path / "out/model.pt").exists():
        process.join(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and "--resume" in (tmp_path / "stderr").read_text()
    assert 7 <= torch.load(tmp_path / "out/model.pt", weights_only=True)["step"] < 9999


TINY = {"steps": 40, "batch_size": 2, "lr": 1e-3, "timesteps": 8, "channels": [4], "seed": 0}


def test_the_learning_rate_rises_for_a_tenth_of_the_run_and_falls_along_a_line_to_0():
    rates, images = [], torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    train.train(TINY, images, torch.device("cpu"), lambda state: rates.append(
        [o["param_groups"][0]["lr"] for o in state["optimizers"]]), save_every=1)
    muon, adamw = np.array(rates).T / TINY["lr"]
    assert (muon == adamw).all() and len(muon) == 40 and muon[:4] == pytest.approx(np.array([1, 2, 3, 4]) / 4, rel=0.1)
    assert np.polyfit(np.arange(4, 41), muon[3:], 1) == pytest.approx([-1 / 40, 41 / 40])
    assert muon[-1] == pytest.approx(1 / 40)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(monkeypatch):
    images, device = torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.device("cpu")
    saved, loss, calls = [], DDPM.loss, []

    def loss_that_breaks_at_32(self, *arguments):
        calls.append(1)
        return loss(self, *arguments) * (float("nan") if len(calls) == 32 else 1)
    monkeypatch.setattr(DDPM, "loss", loss_that_breaks_at_32)
    with pytest.raises(ValueError, match="by step 35: try a smaller --lr"):
        train.train(TINY, images, device, lambda state: saved.append(state["step"]), save_every=5)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert saved == [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_whole(call, monkeypatch, tmp_path):
    train.write_file(tmp_path / "file", lambda f: f.write(b"earlier"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="file could not be written .No space left on device.*whole"):
        train.write_file(tmp_path / "file", lambda f: f.write(b"later"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"earlier"


def test_a_run_on_a_disk_that_fills_up_keeps_the_checkpoint_that_fitted(finished, tmp_path):
    """On a tmpfs with room for one checkpoint and a half, the second one fails while the first is still there."""
    room = (finished / CHECKPOINT).stat().st_size * 3 // 2
    (tmp_path / "out").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", tmp_path / "out"]).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        options = ["--data", finished / "data", "--save-every", "20"]
        code, _, stderr = command("train.py", *SMALL, *options, folder=tmp_path)
        assert code == 1 and stderr.count("\n") == 1 and "No space left on device" in stderr and "whole" in stderr
        assert list(listing(tmp_path)) == ["model.pt"] and train.read_checkpoint(tmp_path / CHECKPOINT)["step"] == 20
    finally:
        subprocess.run(["umount", tmp_path / "out"], check=True)


IMAGES, BATCH = (torch.arange(50 * 64) * 7 % 256).to(torch.uint8).view(50, 1, 8, 8), {"seed": 0, "batch_size": 6}


def gradient_of_one_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    net = torch.nn.parallel.DistributedDataParallel(network())
    train.batch_loss(net, DDPM(linear_beta()), IMAGES, BATCH, 1, "cpu", rank, 2).backward()
    torch.save([p.grad for p in net.parameters()], f"{folder}/gradient{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one_on_the_same_whole_batch(tmp_path):
    processes = [server.Process(target=gradient_of_one_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    net = network()
    whole = [train.batch_loss(net, DDPM(linear_beta()), IMAGES, BATCH, 1, "cpu", rank, 2) for rank in range(2)]
    (sum(whole) / 2).backward()
    for rank in range(2):
        for p, gradient in zip(net.parameters(), torch.load(tmp_path / f"gradient{rank}")):
            torch.testing.assert_close(gradient, p.grad)


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(first, then, finished, tmp_path):
    def begin(processes, *arguments):
        several = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
        return subprocess.Popen([sys.executable, *several, HERE / "train.py", *arguments], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
    run = begin(first, *SMALL, "--steps", "300", "--data", finished / "data", "--save-every", "1")
    while not (tmp_path / CHECKPOINT).exists() and run.poll() is None:
        time.sleep(0.02)
    run.terminate()
    stdout, stderr = run.communicate()
    assert (tmp_path / CHECKPOINT).exists(), stderr
    assert train.read_checkpoint(tmp_path / CHECKPOINT)["step"] < 300
    run = begin(then, "--resume")
    stdout, stderr = run.communicate()
    assert run.returncode == 0 and stdout.count("step 300/300") == stdout.count("test loss (8)") == 1, stderr
    assert train.read_checkpoint(tmp_path / CHECKPOINT)["step"] == 300


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    for i in range(0, len(content), 50):
        content[i] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("arguments, named, spoil", [
    *[(f"train.py {flag}", flag.split()[0], None) for flag in (
        "--steps 0", "--steps x", "--batch-size -1", "--timesteps 0", "--lr nan", "--lr 0", "--lr inf", "--seed -1",
        "--channels 0", "--save-every 0", "--device tpu", "--nonsense")],
    ("train.py --evaluate missing.pt", "missing.pt", None),
    ("train.py --channels 6 --out new --data data", "channels must be multiples of 4", None),
    ("train.py --data missing --out new", "missing", None),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: (f / IMAGES_FILE).unlink()),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: truncate(f / IMAGES_FILE)),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: flip(f / IMAGES_FILE)),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: (f / IMAGES_FILE).write_bytes(b"")),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: (f / IMAGES_FILE).write_bytes(b"hello")),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: (f / IMAGES_FILE).write_bytes(gzip.compress(b"hello"))),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: (f / IMAGES_FILE).write_bytes(gzip.compress(b"?" * 40))),
    ("train.py --data data --out new", IMAGES_FILE, lambda f: write_idx(f / IMAGES_FILE, np.zeros((0, 8, 8)))),
    ("train.py --data data --out new", "data", lambda f: write_idx(f / IMAGES_FILE, np.zeros((5, 8, 8)))),
    ("train.py --data data --out new", "multiples of 4", lambda f: write_data(f / "data", side=6)),
    ("train.py --data data --out stdout/x", "stdout", None),
    ("train.py --resume --out fresh", "fresh", None),
    ("train.py --resume --lr 0.5", "--lr", None),
    ("train.py --evaluate out/model.pt --timesteps 9", "--timesteps", None),
    ("train.py --resume", CHECKPOINT, lambda f: truncate(f / CHECKPOINT)),
    ("train.py --resume", CHECKPOINT, lambda f: flip(f / CHECKPOINT)),
    ("train.py --resume", CHECKPOINT, lambda f: (f / CHECKPOINT).write_bytes(b"")),
    ("train.py --evaluate out/model.pt", CHECKPOINT, lambda f: torch.save({"weights": 1}, f / CHECKPOINT)),
    ("figures.py --checkpoint missing.pt", "missing.pt", None), ("figures.py --nonsense", "--nonsense", None),
    ("figures.py", CHECKPOINT, lambda f: truncate(f / CHECKPOINT)),
    ("figures.py", "--evaluate", lambda f: (f / "out/metrics.json").unlink()),
    ("figures.py", "--evaluate", lambda f: truncate(f / "out/pictures.pt")),
    ("figures.py --image missing.png", "missing.png", None), ("figures.py --image stdout", "stdout", None),
    ("figures.py --out stdout/x", "stdout", None),
])
def test_bad_input_ends_with_one_sentence_and_writes_nothing(arguments, named, spoil, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("figures"))
    if spoil:
        spoil(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name not in ("stdout", "stderr")}
    code, _, stderr = command(*arguments.split(), folder=tmp_path)
    assert code in (1, 2) and named in stderr and stderr.count("\n") == 1 and "Traceback" not in stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name not in ("stdout", "stderr")} == before


place = st.floats(0, 0.999)
damage = st.one_of(st.tuples(st.just("cut"), place), st.tuples(st.just("random"), st.binary(max_size=200)),
                   st.tuples(st.just("flip"), st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=3)))


def damaged(content, kind, how):
    if kind == "random":
        return how
    if kind == "cut":
        return content[:int(how * len(content))]
    content = bytearray(content)
    for place, mask in how:
        content[int(place * len(content))] ^= mask
    return bytes(content)


def read_images(path):
    return [train.read_idx(path, 3)]


def read_weights(path):
    return list(train.load_checkpoint(path)[0].parameters())


@pytest.mark.parametrize("name, read", [(IMAGES_FILE, read_images), (CHECKPOINT, read_weights)])
@settings(max_examples=100)
@given(how=damage)
def test_a_damaged_file_is_refused_or_read_rightly(name, read, how, finished):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged"
        path.write_bytes(damaged((finished / name).read_bytes(), *how))
        try:
            assert all(a.equal(b) for a, b in zip(read(path), read(finished / name), strict=True))
        except ValueError as error:
            assert str(path) in str(error)


class Call:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("change", [{"model": Call()}, {"settings": {"steps": -1}}, {"average": {}}])
def test_a_checkpoint_with_a_call_or_other_settings_is_refused_unexecuted(change, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(finished / CHECKPOINT, weights_only=True)
    state["settings"] |= change.pop("settings", {})
    torch.save(state | change, "model.pt")
    with pytest.raises(ValueError, match="model.pt is no whole checkpoint"):
        train.load_checkpoint("model.pt")
    assert not Path("executed").exists()


def test_a_header_that_lies_about_the_size_takes_no_memory(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(np.array([0x803, 2**10, 2**10, 2**10], ">u4").tobytes()))
    tracemalloc.start()
    with pytest.raises(ValueError, match="promises"):
        train.read_idx(tmp_path / "x.gz", 3)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 4)])
def test_any_png_goes_through_the_forward_process(shape, tmp_path):
    plt.imsave(tmp_path / "x.png", np.random.default_rng(0).random(shape), cmap="gray")
    image = figures.read_image(tmp_path / "x.png")
    assert image.shape == (3, 6, 5) and image.min() >= -1 and image.max() <= 1


def test_the_readme_shows_the_numbers_of_the_committed_run():
    readme, metrics = (HERE / "README.md").read_text(), json.loads((HERE / "figures/metrics.json").read_text())
    d = metrics["denoising"]
    for i, t in enumerate(d["t"]):
        psnr = [f"{d['psnr'][name][i][0]:.1f}" for name in d["psnr"]]
        assert "| " + " | ".join([str(t), *psnr]) + " |" in readme
        assert "| " + " | ".join([str(t), *(f"{d['accuracy'][name][i]:.0%}" for name in d["psnr"])]) + " |" in readme
    losses = [f"{mean:.4f} ± {error:.4f}" for mean, error in metrics["test_loss"].values()]
    assert "| " + " | ".join(losses) + " |" in readme
    for name, distance in metrics["generation"]["frechet"].items():
        assert f"| {name} | {distance:.1f} |" in readme
