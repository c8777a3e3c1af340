"""The exercise sheet as theorems: each test reaches one quantity by two independent routes.

In the order of the sheet; the number in a name is that of the equation. Schedules, shapes, data and
times are random (Hypothesis), everything is float64 unless float32 is the point. Monte Carlo tests
have a fixed seed and accept five standard errors. README.md has the command for the theorems alone,
also of a DDPM of your own: see "Is my own DDPM right?" there.
"""
import ast
import copy
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imsave
from torch.distributions import MultivariateNormal, Normal

import figures
import train
from ddpm import DDPM as OurDDPM
from ddpm import EmpiricalEps, GaussianEps, linear_beta, per_sample
from unet import ResidualBlock, TimeEmbedding, UNet

DDPM = importlib.import_module(os.environ.get("DDPM_MODULE", "ddpm")).DDPM
settings.register_profile("ddpm", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("ddpm")
any_chain = st.deferred(lambda: chain())  # a process, a time t and tensors x, y, ε: see below


@given(any_chain)
def test_eq5_is_the_iterated_eq1(c):
    """Its ε is the normalised sum of the noise of (1); later steps shrink that of earlier ones."""
    x_t, noise, variance = c.x, c.zero, 0
    for s in range(1, c.t + 1):
        beta, eps_s = c.d.beta[s], normal(*c.x.shape, seed=c.seed + s)
        x_t = c.d.q_step(x_t, s, eps_s)
        noise = (1 - beta).sqrt() * noise + beta.sqrt() * eps_s
        variance = (1 - beta) * variance + beta
    close(c.d.q_sample(c.x, c.t, noise / variance.sqrt()), x_t)


@given(any_chain)
def test_eq4_is_eq6_when_x_t_comes_from_eq5(c):
    x_t = c.d.q_sample(c.x, c.t, c.eps)
    close(c.d.mean_from_eps(x_t, c.eps, c.t), c.d.posterior_mean(x_t, c.x, c.t))


# Helpers of the theorems

torch.set_num_threads(1)  # threads only get in the way of tensors this small
NAN, F64 = float("nan"), torch.float64
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=seeded(seed))


def close(actual, expected, tol=1e-9):
    expected = torch.as_tensor(expected, dtype=F64).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def process(*beta):
    """The DDPM with the steps β_1..β_T. Its β_0 is NaN: it must reach no result."""
    return DDPM(torch.tensor([NAN, *beta], dtype=F64))


@st.composite
def chain(draw, first_t=1):
    """A process of 1 to 8 steps, a time t of it, a time for each sample, and tensors of a shape."""
    beta = draw(st.lists(st.floats(1e-3, 0.999), min_size=first_t, max_size=8))
    t = draw(st.integers(first_t, len(beta)))
    B, *shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32))
    x, y, eps = normal(3, B, *shape, seed=seed)
    times = torch.randint(first_t, len(beta) + 1, (B,), generator=seeded(seed))
    return SimpleNamespace(d=process(*beta), t=t, times=times, x=x, y=y, eps=eps,
                           zero=0 * x, one=0 * x + 1, seed=seed)


# 1. Forward process

def marginal(d, t):
    """√ᾱ_t and 1-ᾱ_t, without ᾱ: what (1) does to a mean and to a variance, one β at a time."""
    mean, variance = 1.0, 0.0
    for beta in d.beta[1:t + 1].tolist():
        mean = (1 - beta)**0.5 * mean
        variance = (1 - beta) * variance + beta
    return mean, variance


def assert_moments(x, mean, cov):
    """The rows x have this mean and covariance, within five standard errors."""
    v = cov.diagonal()
    assert ((x.mean(0) - mean).abs() <= 5 * (v / len(x)).sqrt()).all()
    assert ((x.T.cov() - cov).abs() <= 5 * ((v.outer(v) + cov**2) / len(x)).sqrt()).all()


@given(any_chain)
def test_tables_hold_beta_alpha_and_their_product_from_alpha_bar_0_is_1(c):
    d = c.d
    assert len(d.beta) == len(d.alpha) == len(d.alpha_bar) == d.T + 1
    close(d.alpha[1:] + d.beta[1:], 1)
    close(d.alpha_bar[0], 1)
    close(d.alpha_bar[1:].log(), d.alpha[1:].log().cumsum(0))


@given(any_chain)
def test_eq1_is_linear_keeps_the_variance_1_and_adds_noise_of_variance_beta(c):
    signal, noise = c.d.q_step(c.one, c.t, c.zero), c.d.q_step(c.zero, c.t, c.one)
    close(noise**2, c.d.beta[c.t])
    close(signal**2 + noise**2, 1)
    assert (signal > 0).all() and (noise > 0).all()
    close(c.d.q_step(c.x, c.t, c.eps), signal * c.x + noise * c.eps)


@given(any_chain)
def test_eq5_has_the_mean_and_variance_of_the_iterated_eq1(c):
    mean, variance = marginal(c.d, c.t)
    close(c.d.q_sample(c.x, c.t, c.zero), mean * c.x)
    close(c.d.q_sample(c.zero, c.t, c.one)**2, variance)


@given(any_chain)
def test_eq5_solved_for_x_0_gives_the_x_0_that_explains_x_t(c):
    close(c.d.q_sample(c.d.predict_x0(c.x, c.eps, c.t), c.t, c.eps), c.x)


# 2. Reverse process

D, X = process(0.1, 0.2, 0.3), normal(2, 5)
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


@given(any_chain, st.floats(0, 9))
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
    assert 0 <= c.d.posterior_variance(c.t) <= c.d.beta[c.t]
    assert (c.d.posterior_variance(c.t) == 0) == (c.t == 1)


def variance_before_given_0(d, t):
    """Var(x_{t-1} | x_t = 0) / β_t for x_0 = ±1: x_t = 0 says nothing of the sign."""
    weight = d.posterior_mean(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), t)
    return ((d.posterior_variance(t) + weight**2) / d.beta[t]).item()


@given(any_chain)
def test_posterior_variance_and_beta_bound_the_variance_on_average_over_x_t(c):
    """For x_0 = ±1, whose mean given x_t is tanh(√ᾱ x_t / (1-ᾱ)); at one x_t it can be more."""
    a, v = marginal(c.d, c.t)
    x = torch.linspace(-a - 9 * v**0.5, a + 9 * v**0.5, 20_001, dtype=F64)
    density = Normal(a, v**0.5).log_prob(x).exp() / 2 + Normal(-a, v**0.5).log_prob(x).exp() / 2
    of_x_0 = torch.trapezoid(density * (1 - (a * x / v).tanh()**2), x)
    weight = c.d.posterior_mean(c.zero, c.one, c.t).flatten()[0]
    average = c.d.posterior_variance(c.t) + weight**2 * of_x_0
    assert c.d.posterior_variance(c.t) <= average <= c.d.beta[c.t] * (1 + 1e-9)
    assert variance_before_given_0(DDPM(linear_beta()), 2) > 1000


@given(any_chain, both_variances)
def test_eq2_is_iterated_from_t_to_0_without_noise_in_the_last_step(c, variance):
    def path(seed, **t):
        return list(c.d.p_sample_loop(wave, c.x, generator=seeded(seed), **t, **variance))

    steps, generator, x = path(c.seed, t=c.t), seeded(c.seed), c.x
    assert [s for s, _ in steps] == list(range(c.t))[::-1]
    for s, x_s in steps:
        x_prev, x = x, c.d.p_sample(wave, x, s + 1, generator=generator, **variance)
        assert x.equal(x_s)
    close(x, c.d.mean_from_eps(x_prev, wave(x_prev, torch.ones(len(x))), 1))
    assert [s for s, _ in path(c.seed)] == list(range(c.d.T))[::-1]
    other = path(c.seed + 1, t=c.t)
    assert steps[0][1].equal(other[0][1]) == (c.t == 1)  # another seed, another path


def test_eq2_has_no_gradient_and_asks_the_model_with_an_int64_t_for_each_sample():
    seen, weight = [], torch.ones((), requires_grad=True)
    path = D.p_sample_loop(lambda x, t: seen.append(t) or weight * x, X)
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

@given(any_chain)
def test_eq8_is_the_squared_error_as_a_mean_over_every_element_of_any_batch(c):
    """And 0 for the true ε: the t that the model sees is the t that x_t was made with."""
    def model(x_t, t):
        mean, variance = torch.tensor([marginal(c.d, s) for s in t], dtype=F64).T
        true = (x_t - per_sample(mean, x_t) * c.x) / per_sample(variance.sqrt(), x_t)
        return true + size * c.y

    squares = c.y.square().sum() / c.y.numel()
    for factor in 0.0, 3.0:
        size = torch.tensor(factor, dtype=F64, requires_grad=True)
        loss = c.d.loss(model, c.x, seeded(c.seed))
        close(loss, factor**2 * squares)
        close(torch.autograd.grad(loss, size)[0], 2 * factor * squares)


@given(any_chain)
def test_eq8_is_the_error_of_the_picture_but_for_the_ratio_of_noise_to_signal(c):
    """‖x̂_0 - x_0‖² = (1-ᾱ_t)/ᾱ_t ‖ε - ε_θ‖²: why a large loss at small t is a small error."""
    mean, variance = marginal(c.d, c.t)
    picture = c.d.predict_x0(c.d.q_sample(c.x, c.t, c.eps), c.y, c.t)
    close((picture - c.x)**2, variance / mean**2 * (c.eps - c.y)**2)


def test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element():
    """χ² with 6 and with 48 degrees of freedom: above 32 and above 99 once in 50,000."""
    d, n, model = process(*7 * [0.5]), 19_600, Mock(side_effect=lambda x_t, t: x_t)
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
        D.p_sample(wave, X.to(device), 2, generator=generator)
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


@given(any_chain, st.integers(0, 3))
def test_exact_eps_of_gaussian_data_is_tweedies_for_a_covariance_of_any_rank(c, rank):
    mean, root = c.y[0], normal(c.y[0].numel(), rank, seed=c.seed + 1)
    cov, noise = root @ root.T, torch.eye(len(root), dtype=F64)

    def log_p(x, a, v):
        return MultivariateNormal(a * mean.flatten(), a**2 * cov + v * noise).log_prob(x.flatten())

    exact = GaussianEps(OurDDPM(c.d.beta), mean, cov)
    close(exact(c.x, c.times), tweedie(c.d, log_p, c.x, c.times), tol=1e-8)


@given(any_chain, st.integers(1, 5))
def test_exact_eps_of_a_few_points_is_tweedies(c, N):
    points = normal(N, *c.x[0].shape, seed=c.seed + 1)

    def log_p(x, a, v):
        return Normal(a * points, v**0.5).log_prob(x).reshape(N, -1).sum(1).logsumexp(0)

    exact = EmpiricalEps(OurDDPM(c.d.beta), points)
    close(exact(c.x, c.times), tweedie(c.d, log_p, c.x, c.times), tol=1e-8)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32))
def test_best_linear_eps_of_data_is_that_of_a_gaussian_with_its_moments(N, D, seed):
    """Also of one picture, whose covariance is 0, in half precision, and in pictures of 2 x D."""
    x, d = normal(N, 2, D, seed=seed).half(), OurDDPM([NAN, 0.1, 0.9])
    away = x.double().flatten(1) - x.double().flatten(1).mean(0)
    same = GaussianEps(d, x.double().mean(0), away.T @ away / N)
    x_t, t = normal(N, 2, D, seed=seed + 1), 1 + torch.arange(N) % 2
    close(GaussianEps.fit(d, x)(x_t, t), same(x_t, t), tol=1e-5)


@given(both_variances)
def test_eq2_and_eq7_with_the_exact_eps_follow_the_linear_recursion(variance):
    """With E[x_{t-1} | x_t] = m_{t-1} + K (x_t - m_t), and σ_1 = 0, from x_T ~ N(0, I) on."""
    d, mean, cov = process(0.2, 0.4, 0.3, 0.5), 0 * MEAN, I2
    exact = GaussianEps(OurDDPM(d.beta), MEAN, COV)
    path = d.p_sample_loop(exact, normal(100_000, 2), generator=seeded(1), **variance)
    for t, (_, x) in zip((4, 3, 2, 1), path, strict=True):
        (a_prev, v_prev), (a, v) = marginal(d, t - 1), marginal(d, t)
        cov_prev, cov_t = a_prev**2 * COV + v_prev * I2, a**2 * COV + v * I2
        K = (1 - d.beta[t]).sqrt() * cov_prev @ cov_t.inverse()
        sigma2 = d.posterior_variance(t) if variance else d.beta[t]
        mean = a_prev * MEAN + K @ (mean - a * MEAN)
        cov = K @ cov @ K.T + sigma2 * I2 * (t > 1)
        assert_moments(x, mean, cov)


def test_eq2_with_the_exact_eps_in_many_small_steps_lands_on_the_points_in_their_proportions():
    d, n = DDPM(linear_beta(400, 1e-4, 0.05)), 4000
    points = torch.tensor([[0.0, 0], [2, 1], [2, 1], [-1, 2]], dtype=F64)
    exact = EmpiricalEps(OurDDPM(d.beta), points)
    *_, (_, x_0) = d.p_sample_loop(exact, normal(n, 2), None, "posterior", seeded(1))
    share = (torch.cdist(x_0, points) < 1e-6).double().mean(0)
    expected = torch.tensor([0.25, 0.5, 0.5, 0.25])
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


# What the methods promise of any tensors

METHODS = {  # all that makes a tensor like x from x, another tensor y and a time
    "q_step": lambda d, x, y, t: d.q_step(x, t, y),
    "p_sample": lambda d, x, y, t: d.p_sample(
        lambda _, t: wave(y, t), x, t, generator=seeded(0)),
    "p_sample_posterior": lambda d, x, y, t: d.p_sample(
        lambda _, t: wave(y, t), x, t, "posterior", seeded(0)),
    "posterior_mean": lambda d, x, y, t: d.posterior_mean(x, y, t),
    "q_sample": lambda d, x, y, t: d.q_sample(x, t, y),
    "predict_x0": lambda d, x, y, t: d.predict_x0(x, y, t),
    "mean_from_eps": lambda d, x, y, t: d.mean_from_eps(x, y, t),
}
EXACT = {
    "gaussian": lambda d, x, y, t: GaussianEps(d, torch.zeros(5), torch.eye(5))(x, t),
    "points": lambda d, x, y, t: EmpiricalEps(d, torch.eye(5))(x, t),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
@given(c=any_chain)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_may_answer_in_less_precision(dtype):
    x = X.float()
    for result in D.p_sample(lambda x, t: x.to(dtype), x, 2), D.loss(lambda x, t: x.to(dtype), x):
        assert result.dtype == torch.float32


@pytest.mark.parametrize("name", ["posterior_mean", "q_sample", "mean_from_eps", "gaussian"])
def test_float32_keeps_six_digits_at_every_t_of_the_default_schedule(name):
    d, t, method = DDPM(linear_beta()), torch.arange(1, 201), (METHODS | EXACT)[name]
    x, y = normal(2, 200, 5).float()
    assert method(d, x, y, t).dtype == torch.float32
    close(method(d, x, y, t).double(), method(d, x.double(), y.double(), t), tol=1e-6)


def test_exact_eps_is_finite_in_half_precision_and_in_the_longest_run_in_float32():
    """‖x‖² and the ratio of signal to noise are beyond the 65504 of float16."""
    d, t, x = OurDDPM(linear_beta(5000)), torch.tensor([1, 2500, 5000]), normal(3, 784).float()
    points, x_t = x.half(), d.q_sample(x, t, x.flip(0)).half()
    expected = EmpiricalEps(d, points.float())(x_t.float(), t).half()
    assert expected.isfinite().all()
    torch.testing.assert_close(EmpiricalEps(d, points)(x_t, t), expected)
    assert GaussianEps.fit(d, x)(x, t).isfinite().all()
    assert d.predict_x0(x, -x, t).square().sum().isfinite()


def test_a_covariance_that_is_negative_by_a_rounding_error_counts_as_singular():
    """Else the variance ᾱ λ + 1-ᾱ of x_t could be 0."""
    d, negative = OurDDPM([NAN, 1e-6]), torch.diag(torch.tensor([1, -1e-6 / (1 - 1e-6)], dtype=F64))
    x, mean = normal(3, 2), torch.zeros(2, dtype=F64)
    close(GaussianEps(d, mean, negative)(x, 1), GaussianEps(d, mean, negative.clamp(min=0))(x, 1))


@pytest.mark.parametrize("like", [torch.tensor, np.array])
def test_changing_beta_points_mean_or_covariance_afterwards_has_no_effect(like):
    beta, points, x = like([0.5, 0.1, 0.2]), normal(4, 5), X
    mean, cov = points.mean(0), points.T.cov()
    d = DDPM(beta)
    tensors = [d.beta, d.alpha_bar, EmpiricalEps(d, points), GaussianEps(d, mean, cov)]
    before = [each(x, 2) if callable(each) else each.clone() for each in tensors]
    for given_away in beta, points, mean, cov:
        given_away[:] = 0.3
    assert same(before, [each(x, 2) if callable(each) else each for each in tensors])


def test_changing_the_x_or_t_that_was_given_has_no_effect_on_path_and_loss():
    def rude(x, t):
        eps = wave(x, t)
        x.zero_()
        t.zero_()
        return eps

    x_0, times, x_T = X.clone(), torch.tensor([1, 3]), X.clone()
    assert D.loss(rude, x_0, seeded(0)) == D.loss(wave, X, seeded(0))
    step = D.p_sample(rude, x_0, times, generator=seeded(0))
    assert step.equal(D.p_sample(wave, X, torch.tensor([1, 3]), generator=seeded(0)))
    assert x_0.equal(X) and times.tolist() == [1, 3]
    path = D.p_sample_loop(rude, x_T, generator=seeded(0))
    x_T.zero_()
    for (_, x), (_, expected) in zip(path, D.p_sample_loop(wave, X, generator=seeded(0))):
        assert x.equal(expected)
        x.zero_()


def same(a, b):
    """Equal to the last bit, tensors and what holds them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if torch.is_tensor(a) else a == b


def unet(channels, *shapes):
    return lambda: UNet(channels=channels)(*map(torch.zeros, shapes))


def cov(*numbers):
    return lambda: GaussianEps(D, MEAN, torch.tensor(numbers).reshape(2, 2))


WRONG = [  # what the ValueError says, and the calls that raise it
    ("T must be at least 1, got 0", lambda: linear_beta(0)),
    (r"T\+1 ≥ 2 numbers, .*\(1,\)", lambda: DDPM([0.1])),
    (r"T\+1 ≥ 2 numbers, .*\(2, 2\)", lambda: DDPM([[0.1, 0.1]] * 2)),
    (r"in \(0, 1\), got 0.1 to 1$", lambda: DDPM([0.2, 1.0, 0.1])),
    (r"in \(0, 1\), got 1e-17 to 0.1$", lambda: DDPM([0.2, 1e-17, 0.1])),
    (r"in \(0, 1\), got nan", lambda: DDPM([0.2, 0.1, NAN])),
    ("is 1e-32, below 1e-30: take fewer steps", lambda: DDPM([0.2] + 8 * [0.9999])),
    ("in 1..3, got 0", lambda: D.posterior_variance(0), lambda: D.p_sample_loop(wave, X, 0)),
    ("float tensor", lambda: D.loss(wave, X.long()), lambda: D.p_sample_loop(wave, X.long())),
    ("not empty", lambda: D.loss(wave, X[:0]), lambda: D.p_sample_loop(wave, X[:0])),
    (r"must be torch.float32 .* on cpu, got torch.float64", lambda: D.q_sample(X.float(), 1, X)),
    (r"both tensors must be .*\(2, 5\) on .*\(2, 4\) on", lambda: D.posterior_mean(X, X[:, 1:], 1)),
    ("both tensors must be .*on cpu, got .*on meta", lambda: D.predict_x0(X, X.to("meta"), 1)),
    (r"model must return .*\(2, 5\).* got .*\(1, 5\)", lambda: D.loss(lambda x, t: x[:1], X)),
    ("model must return .*, got tuple", lambda: D.p_sample(lambda x, t: (x, t), X, 1)),
    ("model must return .*float32.*got .*float64", lambda: D.loss(lambda x, t: X, X.float())),
    ("\"posterior\", got 'beta_t'", lambda: D.p_sample(wave, X, 1, variance="beta_t"),
     lambda: next(D.p_sample_loop(wave, X, variance="beta_t"))),
    ("in 1..3, got 4", lambda: D.p_sample_loop(wave, X, 4)),  # at the call, not at next()
    ("all samples must start at one t, got 1 to 2",
     lambda: D.p_sample_loop(wave, X, torch.tensor([1, 2]))),
    (r"5 x 5, .*\(4, 4\)", lambda: GaussianEps(D, X[0], torch.eye(4))),
    ("symmetric, finite", cov(1, 0.5, 0, 1), cov(1, NAN, NAN, 1), cov(np.inf, 0, 0, 1)),
    ("negative eigenvalue, got -1", cov(1.0, 2, 2, 1)),
    ("must be 5 numbers", *(lambda method=method: method(D, X[:, 1:], X, 1)
                            for method in EXACT.values())),
    ("one or more, got ", lambda: EmpiricalEps(D, X[:0])),
    ("n_features must be even", lambda: TimeEmbedding(4, 3), lambda: TimeEmbedding(4, 0)),
    ("multiples of 4, one", unet(()), unet((4, 6)), unet((4, -4))),
    ("H and W multiples of 2", unet((4, 8), (2, 1, 6, 7), (2,))),
    (r"\(B, 1, H, W\)", unet((4,), (2, 3, 8, 8), (2,)), unet((4,), (1, 1, 8, 8, 2), (1,))),
    (r"shape \(2,\)", unet((4,), (2, 1, 8, 8), (1,)), unet((4,), (2, 1, 8, 8), ())),
]
WRONG_X_T = [  # for every method, the exact ε too
    (X.long(), 1, r"float tensor .*torch.int64 \(2, 5\)"),
    (X[0, 0], 1, r"float tensor .*torch.float64 \(\)"),
    (X[:, :0], 1, r"not empty, got torch.float64 \(2, 0\)"),
    (X.numpy(), 1, "float tensor .*ndarray"),
    (X, torch.tensor([1, -1]), "in 1..3, got -1$"),
    (X[:1].expand(5000, 5), torch.arange(5000), "in 1..3, got 0$"),
    (X, 1.0, "int64 tensor .*float"),
    (X, True, "int64 tensor .*bool"),
    (X, torch.tensor([1, 2]).int(), "int64 tensor .*int32"),
    (X, torch.tensor([1, 2, 3]), "one time for each of 2 samples, got 3"),
    (X, torch.tensor([[1], [2]]), r"int64 tensor .*\(2, 1\)"),
]
WRONG += [(said, lambda method=method, x=x, t=t: method(D, x, x, t))
          for method in (METHODS | EXACT).values() for x, t, said in WRONG_X_T]


@pytest.mark.parametrize("said, call", [(said, call) for said, *calls in WRONG for call in calls])
def test_value_error_says_in_a_line_what_was_expected(said, call):
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


# Mistakes found in public code, and a theorem that fails on each

MISTAKES = [  # a mistake, the right code in ddpm.py and the wrong one, and a theorem that fails
    ("β₀ multiplied into ᾱ", "torch.cat([self.alpha.new_ones(1), self.alpha[1:]])", "self.alpha",
     test_tables_hold_beta_alpha_and_their_product_from_alpha_bar_0_is_1),
    ("ᾱ shifted by one", "self.alpha.new_ones(1)", "self.alpha.new_ones(2)",
     test_eq5_has_the_mean_and_variance_of_the_iterated_eq1),
    ("the √ of 1-ᾱ forgotten in (5)", "(1 - alpha_bar).sqrt(), x_0", "1 - alpha_bar, x_0",
     test_eq5_is_the_iterated_eq1),
    ("x̂₀ divided by ᾱ", "per_sample(alpha_bar.sqrt(), x_t)", "per_sample(alpha_bar, x_t)",
     test_eq5_solved_for_x_0_gives_the_x_0_that_explains_x_t),
    ("the coefficients of (4) swapped", "x_t + per_sample(weight_0, x_t) * x_0",
     "x_0 + per_sample(weight_0, x_t) * x_t", test_eq4_is_eq6_when_x_t_comes_from_eq5),
    ("βₜ for β̃ₜ", " * (1 - self.alpha_bar[t - 1]) / (1 - self.alpha_bar[t])", "",
     test_eq4_and_the_posterior_variance_are_bayes_rule),
    ("β ε for √β ε in (2)", "sigma2.sqrt() * (t > 1)", "sigma2 * (t > 1)",
     test_eq2_and_eq7_with_the_exact_eps_follow_the_linear_recursion),
    ("noise in the last step", "sigma2.sqrt() * (t > 1)", "sigma2.sqrt()",
     test_eq2_is_iterated_from_t_to_0_without_noise_in_the_last_step),
    ("T never drawn", "torch.randint(1, self.T + 1", "torch.randint(1, self.T",
     test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element),
    ("t = 0 drawn", "torch.randint(1, self.T + 1", "torch.randint(0, self.T + 1",
     test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element),
    ("one ε for the whole batch", "eps = randn_like(x_0, generator)",
     "eps = randn_like(x_0[:1], generator).expand_as(x_0)",
     test_eq8_draws_t_uniformly_on_1_to_T_for_every_sample_and_eps_for_every_element),
    ("the model called at t-1", "(model, x_t, t)).square()", "(model, x_t, t - 1)).square()",
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

def network(channels=(4, 8), **options):
    """A small UNet with random weights everywhere, also where a fresh one has zeros."""
    torch.manual_seed(0)
    net = UNet(channels=channels, **options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


@given(*4 * [st.integers(1, 3)], st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3))
def test_unet_returns_the_shape_it_was_given_and_starts_at_zero(n, colours, rows, columns, widths):
    smallest, t = 2 ** (len(widths) - 1), torch.arange(n)
    x = torch.randn(n, colours, rows * smallest, columns * smallest)
    assert network(widths, in_channels=colours)(x, t).shape == x.shape
    assert not UNet(colours, widths)(x, t).any()


def test_unet_depends_on_the_time_and_treats_each_sample_alone():
    net, x, t = network(), torch.randn(5, 1, 8, 8), torch.tensor([50, 1, 200, 2, 199])
    alone = torch.cat([net(a[None], b[None]) for a, b in zip(x, t)])
    torch.testing.assert_close(net(x, t), alone)
    alike, blind = x[:1].expand(5, -1, -1, -1), network(time_conditioning=False)
    assert torch.pdist(net(alike, t).flatten(1)).min() > 1e-3
    assert blind(alike, t).equal(blind(alike, t * 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64])
def test_unet_learns_in_any_precision(dtype):
    net = network((4, 8, 8)).to(dtype)
    loss = D.loss(net, normal(2, 1, 8, 8).to(dtype), seeded(0))
    loss.backward()
    assert loss.dtype == dtype
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("level", [0, 1])
def test_a_skip_takes_the_way_down_to_the_way_up(level):
    """With all deeper levels cut off, a level still affects the output."""
    net = network((4, 8, 8))
    torch.nn.init.zeros_(net.downsample[level].weight)
    net(torch.randn(2, 1, 8, 8), torch.tensor([1, 200])).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in net.down_blocks[level].parameters())


def test_the_drawing_of_the_unet_has_the_widths_and_the_sides_of_its_levels():
    sides, net = [], UNet()
    for level in *net.down_blocks, net.middle:
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
    embedding, t = TimeEmbedding(64), torch.arange(1001)
    assert torch.pdist(embedding(t[1:]).double()).min() > 1e-4
    assert embedding(t).equal(embedding(t.double()))
    sines, cosines = embedding.sinusoids(t).chunk(2, dim=1)
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones_like(sines))
    angles = torch.atan2(sines[1], cosines[1]).log()  # at t = 1 the angles are the frequencies
    torch.testing.assert_close(angles, torch.linspace(0, -math.log(1000), 32), rtol=1e-4, atol=1e-4)
    assert TimeEmbedding(4, 2)(t).isfinite().all()  # one frequency


# 5 and 6. Training

BARS = torch.eye(8).repeat(3, 1, 1)[:, None].mul(255).byte()
TINY = train.Config(steps=40, batch_size=2, lr=1e-3, timesteps=8, channels=(4, 8))
D200 = OurDDPM(linear_beta())


@given(st.integers(1, 1000), st.integers(1, 300))
def test_test_times_are_spread_evenly_for_any_number_of_pictures(n, T):
    t = train.even_times(n, T)
    counts = torch.bincount(t - 1, minlength=T)
    assert counts.sum() == n and len(counts) == T and counts.max() - counts.min() <= 1
    assert abs(t.double().mean() - (T + 1) / 2) <= 0.5
    assert n % T or t.equal(1 + torch.arange(n) % T)


def test_standard_error_is_the_spread_of_the_mean_over_many_draws():
    means, errors = torch.tensor([train.mean_and_sem(draw) for draw in normal(2000, 30)]).T
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.1)


def test_best_linear_denoiser_of_large_pictures_is_left_out_at_once(capsys):
    assert figures.linear_baseline(D200, torch.zeros(1, 1).expand(60_000, 3001)) is None
    assert capsys.readouterr().out.startswith("no best linear denoiser")


def test_pixels_are_new_floats_from_minus_1_to_1():
    for images in torch.arange(256).byte(), torch.arange(256.0):
        pixels = train.to_pixels(images)
        torch.testing.assert_close(pixels, torch.linspace(-1, 1, 256))
        assert images[-1] == 255


def test_muon_is_that_of_torch_within_the_rounding_of_its_bfloat16():
    gradients = normal(3, 16, 8 * 9).float()
    kernel = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    matrix = torch.nn.Parameter(torch.zeros(16, 72))
    mine = train.Muon([kernel], 1.0)
    theirs = torch.optim.Muon([matrix], 1.0, weight_decay=0, momentum=0.9, ns_steps=3,
                              adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        kernel.grad, matrix.grad = gradient.view_as(kernel).clone(), gradient.clone()
        mine.step()
        theirs.step()
        torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0.02)
    assert matrix.abs().max() > 1


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_every_parameter_is_trained_by_one_optimiser_and_stays_if_its_gradient_is_0(optimizer):
    net = network((4, 8, 8))
    names = {p: name for name, p in net.named_parameters()}
    optimizers = train.new_optimizers(net, train.Config(lr=0.1, optimizer=optimizer))
    learned = [[names[p] for p in each.param_groups[0]["params"]] for each in optimizers]
    assert sorted(sum(learned, [])) == sorted(names.values())
    kernels = [f"{name}.{conv}.weight" for name, block in net.named_modules()
               if isinstance(block, ResidualBlock) for conv in ("conv1", "conv2")]
    assert len(kernels) == 20 and learned[:-1] == ([kernels] if optimizer == "muon" else [])
    before = {name: p.clone() for name, p in net.named_parameters()}
    net(torch.randn(2, 1, 8, 8), torch.tensor([1, 200])).square().sum().backward()
    still = net.down_blocks[0][0].conv2.weight
    still.grad.zero_()
    for each in optimizers:
        each.step()
    for p, name in names.items():
        assert p.equal(before[name]) == (p is still) and p.isfinite().all(), name


def test_the_learning_rate_rises_for_a_tenth_of_the_run_and_falls_along_a_line_to_0():
    trainer, rates = train.Trainer(TINY), []
    for step in range(1, 41):
        trainer.train_step(BARS)
        assert trainer.step == len(trainer.losses) == step
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])
    muon, adam = np.array(rates).T / TINY.lr
    assert (muon == adam).all()
    assert muon[:4] == pytest.approx(np.array([1, 2, 3, 4]) / 4, rel=0.1)
    assert muon[3:] == pytest.approx(1 - np.arange(3, 40) / 40)
    assert train.learning_rate(train.Config(steps=4000), 50) == pytest.approx(0.005, rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_before_its_step_and_leaves_nothing(monkeypatch):
    trainer, other, loss = train.Trainer(TINY), train.Trainer(TINY), OurDDPM.loss
    trainer.train_step(BARS)
    before = copy.deepcopy(trainer.state_dict())
    monkeypatch.setattr(OurDDPM, "loss", lambda *arguments: loss(*arguments) * np.inf)
    with pytest.raises(train.InputError, match="at step 2: try a smaller --lr"):
        trainer.train_step(BARS)
    assert same(trainer.state_dict(), before)
    monkeypatch.undo()
    for each in trainer, other, other:
        each.train_step(BARS)
    assert same(trainer.state_dict(), other.state_dict())


def test_a_new_model_depends_on_its_seed_and_leaves_the_random_numbers_of_the_caller(monkeypatch):
    """torch.manual_seed would also reseed CUDA and MPS."""
    for name in "manual_seed", "random.manual_seed", "cuda.manual_seed_all", "mps.manual_seed":
        monkeypatch.setattr(f"torch.{name}", Mock(side_effect=AssertionError))
    before = torch.get_rng_state()
    a, b, c = (train.new_model(train.Config(seed=seed)).state_dict() for seed in (0, 0, 1))
    assert same(a, b) and not same(a, c)
    assert torch.get_rng_state().equal(before)


def test_every_step_of_every_process_has_its_own_noise_and_so_has_the_test():
    keys = [(0,), (0, 0), *np.ndindex(3, 99, 3)]  # of the test, of figures, (seed, step, rank)
    first = [torch.randn(1, generator=train.generator(*key)).item() for key in keys]
    assert len(set(first)) == len(keys)
    assert first[0] == torch.randn(1, generator=train.generator(0)).item()


# The commands, most of them in this process: each of the others imports torch for seconds

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


def saved(path=CHECKPOINT):
    return torch.load(path, weights_only=True)


def test_the_shipped_data_is_mnist():
    for name, sha256 in {"train-images-idx3": "440fcabf73cc", "train-labels-idx1": "3552534a0a55",
                         "t10k-images-idx3": "8d422c7b0a1c", "t10k-labels-idx1": "f7ae60f92e00"
                         }.items():
        content = (HERE / f"mnist/{name}-ubyte.gz").read_bytes()
        assert hashlib.sha256(content).hexdigest().startswith(sha256)
    images, labels, test_images, test_labels = train.load_mnist(HERE / "mnist")
    assert (images.shape, test_images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and len(test_labels) == 10000


def test_a_run_depends_on_its_seed_and_not_on_the_test_digits(folder):
    whole = saved()
    write_data(test=30)
    command(f"train.py {SMALL} --overwrite --seed 1")
    assert not same(saved()["model"], whole["model"])
    command(f"train.py {SMALL} --overwrite --seed 0")
    assert same(saved(), whole) and set(os.listdir("out")) == {"model.pt", "previous.pt"}


def test_a_run_brings_the_loss_down_from_1_and_its_network_is_measured(finished, folder):
    with patch.object(train, "new_optimizers", Mock(side_effect=AssertionError)):  # not to read
        run = train.read_checkpoint(CHECKPOINT)
    assert run["config"] == train.Config(60, 4, timesteps=8, channels=(4, 8))
    assert abs(run["losses"][0] - 1) < 0.2 and np.mean(run["losses"][-20:]) < 0.5
    assert len(run["losses"]) == 60 and run["ddpm"].T == 8 and not run["network"].training
    assert same(run["network"].state_dict(), run["model"])
    x_0 = train.to_pixels(train.load_mnist("data")[2])
    loss = train.evaluate(run["network"], run["ddpm"], x_0).mean()
    assert f"test loss (8): {loss:.4f} +-" in command("train.py --resume --data data")
    assert Path(CHECKPOINT).read_bytes() == (finished / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("flags, data", [
    ("--timesteps 1 --batch-size 1", {"side": 32}), ("--no-time-conditioning", {"train": 1}),
    ("--optimizer adam", {"test": 2})])
def test_one_step_one_picture_other_sides_and_other_kinds_of_run_are_no_special_cases(
        flags, data, folder):
    write_data(**data)
    printed = command(f"train.py {SMALL} --steps 2 {flags} --out new")
    assert "nan" not in printed and "inf" not in printed
    resumed = command("train.py --resume --data data --out new")  # measures again
    assert printed.splitlines()[-2:] == resumed.splitlines()[-2:]


def run_with(happens, step, line, codes=(0,)):
    """A command that saves every two steps, with happens() during the given step."""
    train_step = train.Trainer.train_step

    def watched(trainer, images):
        if trainer.step + 1 == step:
            happens()
        train_step(trainer, images)

    with patch.object(train.Trainer, "train_step", watched), patch.object(train, "SAVE_EVERY", 2):
        return command(line, codes)


def test_ctrl_c_costs_the_steps_since_the_last_save_and_the_old_run_is_kept(folder):
    ctrl_c, old, whole = Mock(side_effect=KeyboardInterrupt), Path(CHECKPOINT).read_bytes(), saved()
    for flags in "--out new", "--overwrite":
        assert "--resume" not in run_with(ctrl_c, 2, f"train.py {SMALL} {flags}", [130])
    assert not os.listdir("new")
    assert os.listdir("out") == ["model.pt"] and Path(CHECKPOINT).read_bytes() == old
    printed = run_with(ctrl_c, 6, f"train.py {SMALL} --overwrite", [130])
    said = f"stopped: step 4 is in {CHECKPOINT}; --resume continues from there"
    assert printed.splitlines()[-1] == said
    assert saved()["losses"] == whole["losses"][:4]
    command(f"train.py {SMALL} --resume")
    assert same(saved(), whole) and Path("out/previous.pt").read_bytes() == old


@pytest.mark.parametrize("happens", [
    lambda: os.remove(CHECKPOINT), lambda: os.utime(CHECKPOINT, (1, 1)),
    lambda: os.rename("out", "moved")], ids=["moved", "touched", "folder moved"])
def test_a_checkpoint_that_is_moved_or_touched_while_training_is_written_anew(happens, folder):
    run_with(happens, 5, f"train.py {SMALL} --overwrite --steps 6")
    assert len(saved()["losses"]) == 6


def test_a_killed_run_goes_on_and_ends_bit_for_bit_where_it_would_have(folder):
    """Killed at any moment, also during a write: with a save after every step, most are writing."""
    program = "import train; train.SAVE_EVERY = 1; train.run_command(train.main)"
    process = subprocess.Popen([sys.executable, "-c", program, *SMALL.split(), "--out", "killed"],
                               env=ENVIRONMENT | {"PYTHONPATH": str(HERE)})
    deadline = time.monotonic() + 90
    while not os.path.exists("killed/model.pt"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    process.wait()
    command("train.py --resume --data data --out killed")
    assert same(saved("killed/model.pt"), saved())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_train_as_one_on_whole_batches(folder):
    flags = f"{SMALL} --overwrite --steps 3 --batch-size 2 --lr 0.001".split()
    Path("two.py").write_text("import train; train.run_command(train.main)\n"
                              "assert not train.distributed.is_initialized()")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py"]
    assert python(*torchrun, *flags, PYTHONPATH=str(HERE)).count("test loss (8)") == 1
    images, two = train.load_mnist("data")[0], train.read_checkpoint(CHECKPOINT)
    one, loss = train.Trainer(two["config"]), OurDDPM.loss

    def loss_of_the_two(ddpm, model, x_0, rng):
        halves = []
        for rank in 0, 1:
            rng = train.generator(0, one.step + 1, rank)
            x_0 = images[torch.randint(len(images), (1,), generator=rng)]
            halves.append(loss(ddpm, model, train.to_pixels(x_0), rng))
        return sum(halves) / 2

    with patch.object(OurDDPM, "loss", loss_of_the_two):
        for _ in range(3):
            one.train_step(images)
    assert two["losses"] == pytest.approx(one.losses, rel=1e-5)
    torch.testing.assert_close(two["model"], one.model.state_dict())
    command("train.py --resume --data data")  # what two have written, one can read


def test_the_clone_may_have_any_name_move_and_print_in_any_encoding_to_any_reader(tmp_path):
    """The variables of torchrun are empty, and nothing is left out by python -OO."""
    old, new = tmp_path / "Mi tarea 100% ñ", tmp_path / "条件"
    write_data(old / "mnist")
    for name in "ddpm.py", "unet.py", "train.py":
        source = Path(shutil.copy(HERE / name, old)).read_text(encoding="utf-8")
        assert "__doc__" not in source and "assert " not in source

    odd = {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "", "PYTHONIOENCODING": "cp932"}
    flags = f"{SMALL} --data mnist".split()
    assert "step 60/60" in python("train.py", *flags, folder=old, **odd)
    old.rename(new)
    assert b"tarea" not in (new / CHECKPOINT).read_bytes()
    shell = '{ "$@" || echo failed >&2; } | head -1'
    process = subprocess.run(["sh", "-c", shell, "sh", sys.executable, "train.py", "--resume"],
                             env=ENVIRONMENT | {"PYTHONIOENCODING": "cp1251"}, cwd=new,
                             timeout=90, capture_output=True)
    assert b"60 digits" in process.stdout and not process.stderr


def test_a_run_with_its_standard_output_closed_does_its_work(folder):
    line = f"train.py {SMALL} --steps 2 --out new"
    with patch.multiple(sys, argv=line.split(), stdout=None):  # as Python begins after `>&-`
        train.run_command(train.main)
    assert len(saved("new/model.pt")["losses"]) == 2


@pytest.mark.parametrize("script", ["train.py", "figures.py"])
def test_help_is_ascii_in_80_columns_as_all_that_is_printed(script):
    assert "--data" in command(f"{script} --help")


@pytest.mark.parametrize("method", ["__init__", "forward"])
@pytest.mark.parametrize("flags", ["--out new", "--resume"])
def test_a_bug_of_a_student_keeps_its_traceback(method, flags, folder, monkeypatch):
    monkeypatch.setattr(UNet, method, lambda self, *arguments, **named: torch.ones(2).reshape(7))
    with pytest.raises(RuntimeError, match="shape"):
        command(f"train.py {SMALL} {flags}")


def test_an_import_leaves_the_notebook_as_it_is():
    python("-c", "import os, signal, sys\n"
                 "before = signal.getsignal(signal.SIGINT), dict(os.environ), sys.stdout\n"
                 "import matplotlib\nmatplotlib.use('svg')\nimport torch, figures, train\n"
                 "assert before == (signal.getsignal(signal.SIGINT), os.environ, sys.stdout)\n"
                 "assert matplotlib.get_backend() == 'svg' and torch.is_grad_enabled()\n"
                 "assert 'matplotlib.pyplot' not in sys.modules", folder=HERE)


# Files

@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_whole(call, monkeypatch, tmp_path):
    train.write_file(tmp_path / "file", b"earlier")
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(train.InputError, match="file can't be written and is unchanged .*space"):
        train.write_file(tmp_path / "file", b"later")
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
    {"model": Call()}, {"model": {}}, {"config": 1}, {"losses": Call()},
    {"model": {name: NAN * p for name, p in UNet(channels=(4, 8)).state_dict().items()}},
    {"config": train.asdict(TINY) | {"batch_size": 0}}, {"config": train.asdict(TINY) | {"lr": 1}},
    {"config": train.asdict(TINY) | {"channels": (8, 8)}}])
def test_a_checkpoint_with_a_call_or_of_another_network_is_refused_unexecuted(change, folder):
    torch.save(saved() | change, CHECKPOINT)
    with pytest.raises(train.InputError, match="model.pt is damaged or not"):
        train.read_checkpoint(CHECKPOINT)
    assert not Path("executed").exists()


# What is refused, in one sentence

NEW, RESUME = "train.py --data data --out new", "train.py --data data --resume"
DRAW = "figures.py --data data --digits 16"
REFUSED = [
    *[(f"{NEW} {flag}", flag.split()[0], None) for flag in (
        "--steps 0", "--steps x", "--batch-size -1", "--timesteps 0", "--lr nan", "--lr 0",
        "--lr inf", "--seed -1", "--optimizer sgd", "--timesteps 5001", "--channels 0",
        "--channels 6", "--device tpu", "--nonsense")],
    ("train.py --data missing --out new", "missing/train-images-idx3-ubyte.gz", None),
    (NEW, DIGITS, lambda: Path(DIGITS).write_bytes(2 * Path(DIGITS).read_bytes())),
    (NEW, DIGITS, lambda: write_idx(DIGITS, np.zeros((0, 8, 8)))),
    (NEW, DIGITS, lambda: write_idx(DIGITS, np.zeros((9, 8, 8, 3)))),
    (NEW, "label", lambda: write_idx(DIGITS, np.zeros((5, 8, 8)))),
    (NEW, "one size", lambda: write_idx(DIGITS, np.zeros((60, 8, 9)))),
    (NEW, "two test images", lambda: write_data(test=1)),
    (f"{NEW} --channels 4 8 8 8 8", "can't be halved 4 times", None),
    ("train.py --data data --out data/train-labels-idx1-ubyte.gz/x", "labels-idx1", None),
    ("train.py --data data", "--resume to continue it, --overwrite to start", None),
    ("train.py --resume --out fresh", "fresh/model.pt is not there", None),
    (f"{RESUME} --steps 9999", "--resume keeps the settings", None),
    (RESUME, "other digits", lambda: write_data(seed=3)),
    (DRAW, "other digits", lambda: write_data(seed=3)),
    (f"{DRAW} --digits 21", "--digits", None),
    (f"{DRAW}", "of which 32 are needed; there are 30", lambda: write_data(test=30)),
    (f"{DRAW} --checkpoint missing.pt", "missing.pt is not there", None),
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


# 6. Measuring and drawing

def test_every_denoiser_is_measured_alike():
    """Called as the network, the best linear and the memorising one get their own numbers."""
    data = [torch.randint(top, (n, *shape), generator=seeded(n)).to(kind) for n in (50, 40)
            for top, shape, kind in ((256, (1, 4, 4), torch.uint8), (3, (), torch.int64))]
    d, x = OurDDPM(linear_beta(4)), train.to_pixels(data[0])
    for name, model in ("linear", GaussianEps.fit(d, x)), ("memorising", EmpiricalEps(d, x)):
        metrics, _ = figures.measure(model, d, data, 16)
        losses, denoising = metrics["losses"], metrics["denoising"]
        assert losses["network"]["loss"] == pytest.approx(losses[name]["loss"])
        assert all(row["network"]["psnr"] == row[name]["psnr"] for row in denoising.values())
    loss, sem = losses["noisy"]["loss"]
    assert loss == pytest.approx(1, abs=5 * sem)
    for t, row in denoising.items():
        mean, sem = row["noisy"]["psnr"]
        snr = (d.alpha_bar[t] / (1 - d.alpha_bar[t])).item()
        assert mean == pytest.approx(10 * np.log10(4 * snr), abs=5 * sem + 0.4)


def test_results_of_the_reverse_process_are_compared_with_their_original_digits(tmp_path):
    """From t = 1 it is a step without noise, the estimate x̂_0; and shown is the path from T."""
    write_data(tmp_path, train=4000, test=60)
    data = train.load_mnist(tmp_path)
    d, x = OurDDPM(linear_beta(4, beta_T=0.5)), train.to_pixels(data[0])
    metrics, pictures = figures.measure(GaussianEps.fit(d, x), d, data, 20)
    measured, x_0, path = metrics["denoising"], pictures["x_0"], pictures["path"]
    assert list(measured) == [1, 2, 3, 4] and list(pictures["denoised"]) == [1, 2, 4]
    assert measured[1]["reverse"] == measured[1]["network"]
    assert metrics["clean"][0] > 0.9 and measured[1]["reverse"]["accuracy"][0] > 0.9
    assert [t for t, _ in path] == [4, 3, 2, 1, 0] and "generation" not in metrics
    samples, digits = pictures["samples"], data[2].unique(dim=0)
    assert samples["real digits"][:16].equal(x_0) and x_0[0] in train.to_pixels(digits)
    torch.testing.assert_close(samples["noised digits"][:16], path[-1][1].clamp(-1, 1))
    labels = [digit.sum((0, 2)).argmax().item() for digit in x_0]  # the row of the bright bar
    first = [labels.index(label) for label in sorted(set(labels))]
    assert pictures["first"] == first


def test_the_matched_gaussian_has_the_mean_and_covariance_of_x_T():
    d, mean, root = process(0.3, 0.4), normal(3), normal(3, 3, seed=1)
    cov, (signal, noise) = root @ root.T, marginal(d, 2)
    draws = figures.matched_gaussian(GaussianEps(d, mean, cov), 20_000, seeded(0))
    assert_moments(draws, signal * mean, signal**2 * cov + noise * torch.eye(3, dtype=F64))


def test_the_misread_digits_are_framed():
    """White ones, among black ones."""
    misread = torch.rand(3, 2, 4, generator=seeded(0)) > 0.5
    digits = 2 * misread.float()[..., None, None, None].expand(-1, -1, -1, 1, 6, 6) - 1
    denoised = {t: dict(zip(("noisy", "network"), zip(digits[t], misread[t]))) for t in range(3)}
    axes = figures.draw_denoising(-torch.ones(4, 1, 6, 6), denoised).axes[0]
    page, centres = axes.images[0].get_array(), [frame.get_center() for frame in axes.patches]
    assert [page[int(y), int(x), 0] for x, y in centres] == [255] * misread.sum().item()


def test_scores_are_of_the_estimate_and_of_the_class_that_is_read():
    x_0, says_0 = normal(2, 1, 2, 2), Mock(return_value=torch.tensor([[1.0, 0], [1, 0]]))
    score = figures.score(x_0 + 0.02, x_0, torch.tensor([0, 1]), says_0)
    assert score["psnr"] == pytest.approx((40, 0), abs=1e-6)
    assert score["accuracy"] == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("n, T, t", [
    (40, 200, [5.5 + 10 * i for i in range(20)]), (400, 40, [1.5 + 2 * i for i in range(20)]),
    (300, 3, [1, 2, 3])])
def test_test_loss_is_a_mean_over_all_t_and_in_bins_of_equal_length(n, T, t):
    def model(x_t, t):
        """Wrong by √t at every pixel of a black picture, so that its loss at t is t."""
        return x_t / per_sample((1 - d.alpha_bar[t]).sqrt(), x_t) + per_sample(t.sqrt(), x_t)

    d = OurDDPM(linear_beta(T))
    row = figures.measure_loss(model, d, torch.zeros(n, 1, 2, 2))
    assert row["t"] == t and row["loss_by_t"] == pytest.approx(t, rel=1e-4)
    assert row["loss"][0] == pytest.approx((T + 1) / 2)


def test_frechet_distance_of_a_stretched_and_shifted_set():
    """(m_a - m_b)² + (s_a - s_b)² along each axis; 0 for equal sets, and no favourite axis."""
    a, distance = normal(99, 3), figures.frechet_distance
    b = 3 * a + 2
    expected = (a.mean(0) - b.mean(0))**2 + (a.std(0) - b.std(0))**2
    assert distance(a, b) == pytest.approx(expected.sum().item())
    turn, x, y = torch.linalg.qr(normal(4, 4))[0], normal(99, 4), normal(99, 4, seed=1) * 2
    assert distance(x, x) == pytest.approx(0, abs=1e-6)
    assert distance(x @ turn, y @ turn) == pytest.approx(distance(x, y))


def test_the_error_of_the_frechet_distance_is_its_spread_over_many_draws():
    b = normal(5000, 3)
    draws = [figures.frechet_and_sem(1 + normal(200, 3, seed=seed), b) for seed in range(60)]
    distances, errors = torch.tensor(draws).T
    assert errors.mean() == pytest.approx(distances.std().item(), rel=0.3)


def a_run(steps, loss, made=None, **config):
    config = train.asdict(train.Config(steps=steps, **config))
    return {"config": config, "steps": made or steps, "loss": (loss, 0.001), "t": [1, 2],
            "loss_by_t": [loss, loss]}


LENGTHS = [a_run(steps, 0.04 + 2 / steps**0.8) for steps in (300, 600, 1200, 2400)]


def test_the_fit_finds_the_limit_of_like_runs_alone():
    """Not of an unfinished one, nor of those that differ in more than their steps and seed."""
    others = [a_run(2000, 9, made=500), a_run(100, 9, timesteps=50), a_run(900, 9, lr=0.1)]
    steps, _, fit, _ = figures.fit_runs(LENGTHS + others)
    assert steps.tolist() == [300, 600, 1200, 2400]
    assert fit[:, 0] == pytest.approx((0.04, 2, 0.8), rel=1e-3)
    assert figures.fit_runs(LENGTHS[:3])[3] is None
    assert figures.fit_runs(LENGTHS[:2] + [a_run(300, 0.05, seed=1)])[2] is None


def test_the_range_of_the_limit_is_that_of_fits_to_runs_of_other_seeds():
    steps = np.array(4 * [300, 600, 1200, 2400], float)
    noise = 3e-4 * np.random.default_rng(1).standard_normal((16, 2001))
    losses = (0.04 + 2 / steps**0.8)[:, None] + noise
    runs = [a_run(int(n), loss, seed=i) for i, (n, loss) in enumerate(zip(steps, losses[:, 0]))]
    expected = figures.fit_power_law(steps, losses[:, 1:])[0]
    assert np.std(figures.fit_runs(runs)[3][0]) == pytest.approx(np.std(expected), rel=0.35)


@pytest.mark.parametrize("runs", [LENGTHS, LENGTHS[:1], [a_run(9, 1, made=3)] + LENGTHS])
def test_runs_of_any_lengths_can_be_drawn(runs, tmp_path):
    figures.save({"compute": figures.draw_compute(runs)}, tmp_path)


def test_figures_draws_a_network_beside_others_and_leaves_the_runs_alone(folder, monkeypatch):
    """Of black and white digits, where an exact estimate has an infinite PSNR; unfinished.

    Without a network, the other figures, the same whatever the user's matplotlibrc says.
    """
    before, ctrl_c = Path(CHECKPOINT).read_bytes(), Mock(side_effect=KeyboardInterrupt)
    run_with(ctrl_c, 6, f"train.py {SMALL} --out cut", [130])
    for steps in 10, 20:
        command(f"train.py {SMALL} --steps {steps} --out {steps}")
    imsave("x.png", np.zeros((6, 5)))
    runs = f"cut/model.pt {CHECKPOINT} 10/model.pt 20/model.pt"
    line = "figures.py --data data --digits 16 --image x.png --out"
    printed = command(f"{line} drawn --checkpoint {runs}")
    assert "an unfinished run: step 4 of 60" in printed and "null in metrics.json" in printed
    assert "below 500 digits: --digits 1000 gives them" in printed
    first = {f"{name}.png" for name in ("forward", "marginal", "bayes", "embedding")}
    names = {f"{name}.png" for name in ("losses", "quality", "denoising", "generation", "reverse",
                                        "compute")} | first | {"metrics.json", "reverse.gif"}
    assert set(os.listdir("drawn")) == names
    text = Path("drawn/metrics.json").read_text(encoding="utf-8")
    metrics = json.loads(text, parse_constant=pytest.fail)
    assert [run["steps"] for run in metrics["runs"]] == [4, 60, 10, 20]
    assert os.listdir("out") == ["model.pt"] and Path(CHECKPOINT).read_bytes() == before

    os.remove(CHECKPOINT)
    monkeypatch.setitem(figures.matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(figures.matplotlib.rcParams, "figure.dpi", 10)
    assert "python train.py" in command(f"{line} odd")
    assert set(os.listdir("odd")) == first
    assert all(Path("drawn", name).read_bytes() == Path("odd", name).read_bytes() for name in first)


@pytest.mark.parametrize("pixels, value", [
    (np.zeros((6, 5)), -1), (np.full((6, 5), 65535, np.uint16), 1),
    (np.ones((6, 5, 3)), 1), (np.zeros((6, 5, 4), np.uint8), 1)], ids=["L", "I;16", "RGB", "RGBA"])
def test_any_png_can_go_through_the_forward_process(pixels, value, monkeypatch):
    monkeypatch.setattr(figures, "imread", lambda path: pixels)
    assert figures.read_image("x.png").equal(torch.full((3, 6, 5), float(value)))


# The text

METRICS = json.loads((HERE / "figures/metrics.json").read_text(encoding="utf-8"))


def rounded(value, error):
    """Both, to the first digit of the error."""
    digits = max(0, -math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def the_run(**config):
    """What figures.py measured of the run with these settings."""
    config = json.loads(json.dumps(train.asdict(train.Config(**config))))
    return next(run for run in METRICS["runs"] if run["config"] == config)


def linear_losses(ddpm, mean, cov):
    """The loss (8) of the best linear estimate of ε for data with this mean and covariance.

    With t, there is a matrix for each; without, one for all. With S the covariance of x_t and s the
    mean of √(1-ᾱ_t), it is 1 - s² tr(S⁻¹)/D; without t, S has the variance of √ᾱ_t m as well.
    """
    alpha_bar = ddpm.alpha_bar[1:, None]
    variances = torch.linalg.eigvalsh(cov.double())
    with_t = 1 - (1 - alpha_bar) / (alpha_bar * variances + 1 - alpha_bar)
    mixed = alpha_bar.mean() * cov + (1 - alpha_bar.mean()) * torch.eye(len(cov))
    mixed += alpha_bar.sqrt().var(correction=0) * torch.outer(mean.flatten(), mean.flatten())
    without_t = 1 - (1 - alpha_bar).sqrt().mean() ** 2 / torch.linalg.eigvalsh(mixed)
    return with_t.mean().item(), without_t.mean().item()


def test_linear_losses_are_those_of_the_best_linear_estimates_with_t_and_without():
    d, n = OurDDPM([NAN, 0.1, 0.5, 0.3]), 200_000
    x_0 = MEAN + normal(n, 2) @ torch.linalg.cholesky(COV).T
    t, eps = 1 + torch.arange(n) % 3, normal(n, 2, seed=1)
    x_t = torch.cat([d.q_sample(x_0, t, eps), torch.ones(n, 1, dtype=F64)], dim=1)

    def least(index):
        weights = torch.linalg.lstsq(x_t[index], eps[index]).solution
        return (eps[index] - x_t[index] @ weights).square().mean().item()

    with_t, without_t = linear_losses(d, MEAN, COV)
    assert with_t == pytest.approx(np.mean([least(t == s) for s in (1, 2, 3)]), rel=0.01)
    assert without_t == pytest.approx(least(t > 0), rel=0.01) and without_t > 1.02 * with_t


def rows_of_the_readme():
    yield ["test loss (8)", *(rounded(*row["loss"]) for row in METRICS["losses"].values())]
    for t, row in METRICS["denoising"].items():
        cells = [row[name] for name in figures.STYLES if name in row]
        yield [t] + [f"{cell['psnr'][0]:.1f}, {cell['accuracy'][0]:.0%}" for cell in cells]
    for name, row in METRICS["generation"].items():
        confident = rounded(*(100 * number for number in row["confident"]))
        yield [name, rounded(*row["frechet"]), f"{confident} %"]
    text = (HERE / "figures/growth.txt").read_text(encoding="utf-8")
    most = np.array(re.findall(r"(\S+)/s,\n(\S+) kB", text), float).reshape(2, -1, 2).max(0)
    flags = [f"`{flag}`" for flag in re.findall('"(--.*?)"', README)]
    for name, (speed, kilobytes) in zip([*flags, "`torchrun`, two processes"], most, strict=True):
        yield [name, f"{1 / speed:#.2g}", f"{kilobytes / 1024:.0f}"]
    for mistake, _, _, theorem in MISTAKES:
        yield [mistake, theorem.__name__.removeprefix("test_").replace("_", " ")]


def phrases_of_the_schedule():
    """The numbers in its sentences that follow from the equations."""
    d, long = D200, OurDDPM(linear_beta(1000))
    ratio = d.posterior_variance([2, 10, 100]) / d.beta[[2, 10, 100]]
    yield "is 0, {:.2f}, {:.2f} and {:.3f} at $t$ = 1, 2, 10 and 100".format(*ratio)
    weight = d.beta / (2 * d.alpha * (1 - d.alpha_bar))
    yield f"the weight is {weight[2]:.2f} at $t = 2$ and {weight[200]:.3f} at $t = 200$"
    snr = d.alpha_bar / (1 - d.alpha_bar)
    yield f"$x_3$ (SNR {snr[3]:,.0f})"
    yield f"$x_{{200}}$ (SNR {snr[200]:.2f})"
    yield f"It is 1 near $t = {(snr - 1).abs().argmin()}$"
    yield f"$\\bar\\alpha_T = {d.alpha_bar[-1]:.6f}$"
    yield f"which makes it ${(1 - torch.linspace(1e-4, 0.02, 200, dtype=F64)).prod():.6f}$"
    yield f"$\\sqrt{{\\bar\\alpha_T}} = {d.alpha_bar[-1].sqrt():.2f}$"
    yield f"$\\bar\\alpha_T = {1e5 * long.alpha_bar[-1]:.0f}\\cdot10^{{-5}}$"
    yield f"the variance is {variance_before_given_0(d, 2):,.0f} $\\beta_t$"
    yield f"{sum(p.numel() for p in UNet().parameters()):,} parameters"


def phrases_of_the_data():
    """Those that follow from the training digits: yardsticks, and how far x_T is from N(0, I)."""
    x, alpha_bar = train.to_pixels(train.load_mnist(HERE / "mnist")[0]).flatten(1), D200.alpha_bar
    m = x.mean(0)
    cov = x.T @ x / len(x) - m.outer(m)
    yield "{:.3f} with $t$ and {:.3f} without".format(*linear_losses(D200, m, cov))
    signal, noise = alpha_bar[200], 1 - alpha_bar[200]
    variances = signal * torch.linalg.eigvalsh(cov.double()).clamp(min=0) + noise
    mean_part = (signal * m.square().sum() / 2).item()
    cov_part = ((variances - 1 - variances.log()).sum() / 2).item()
    given_x_0 = (signal * x.square().sum(1).mean() / 2
                 + x.shape[1] * (noise - 1 - noise.log()) / 2).item()
    yield f"lies between {mean_part + cov_part:.1f} and {given_x_0:.1f} nats"
    yield f"with the mean ({mean_part:.1f} nats) and the covariance ({cov_part:.1f}) of $x_T$"


def phrases_of_the_runs():
    default, without = the_run(), the_run(time_conditioning=False)
    seeds = np.array([the_run(seed=seed)["loss"][0] for seed in range(3)])
    spread = np.std([the_run(seed=seed, steps=600)["loss"][0] for seed in range(3)], ddof=1)
    yield "test loss (8): {:.4f} +- {:.4f} over 10000 test digits".format(*default["loss"])
    yield f"mean {seeds.mean():.5f} and the standard deviation {np.std(seeds, ddof=1):.5f}"
    yield f", or {spread:.5f} at 600 steps"
    yield f"{rounded(*default['loss'])} with and {rounded(*without['loss'])} without"
    yield f"{without['loss'][0] / default['loss'][0] - 1:.1%} worse"
    yield f"{(without['loss'][0] - seeds.mean()) / spread:.0f} times the spread"
    worse = [a / b - 1 for a, b in zip(without["loss_by_t"], default["loss_by_t"])]
    yield f"{min(worse):.0%} to {max(worse):.0%} worse"
    yield f"from {default['loss_by_t'][0]:.2f} to {default['loss_by_t'][-1]:.3f}"
    adam = the_run(optimizer="adam", lr=0.003, steps=2200)
    yield f"Adam alone reaches {rounded(*adam['loss'])} in 2,200 steps"
    yield f"1,200 steps give {rounded(*the_run(steps=1200)['loss'])}"
    lower = (adam["loss"][0] - the_run(steps=1200)["loss"][0]) / spread
    yield f"lower by {lower:.0f} times the spread"
    _, _, fit, draws = figures.fit_runs(METRICS["runs"])
    a, b, c = fit[:, 0]
    yield f"${a:.4f} + {b:.2f}/\\mathrm{{steps}}^{{{c:.2f}}}$"
    yield "{:.4f} to {:.4f}".format(*np.percentile(draws[0], (2.5, 97.5)))
    cells = [cell for row in METRICS["denoising"].values() for cell in row.values()]
    yield (f"at most {max(cell['psnr'][1] for cell in cells):.2f} dB "
           f"and {max(cell['accuracy'][1] for cell in cells):.1%}")
    yield f"{METRICS['clean'][0]:.0%} of the clean digits"
    lost = [row["network"]["psnr"][0] - row["reverse"]["psnr"][0]
            for row in METRICS["denoising"].values() if "reverse" in row]
    yield f"{min(lost):.1f} to {max(lost):.1f} dB"


def test_the_readme_shows_the_numbers_of_the_committed_files(request):
    lines, text = README.splitlines(), " ".join(README.split())
    for row in rows_of_the_readme():
        assert any(line.startswith("| " + " | ".join(row) + " |") for line in lines), row
    for phrase in [*phrases_of_the_schedule(), *phrases_of_the_data(), *phrases_of_the_runs()]:
        assert phrase in text
    collected = request.session.testscollected
    assert collected < 300 or f"`{collected} passed`" in text  # if all tests are run
    assert METRICS["digits"] == 1000 and len(METRICS["runs"]) == 13


def test_every_function_shown_in_the_readme_is_that_of_the_code():
    """Line by line, with docstrings and checks left out."""
    functions = []
    for name in "ddpm.py", "unet.py", "train.py":
        source = (HERE / name).read_text(encoding="utf-8")
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        functions += [ast.get_source_segment(source, node, padded=True) for node in nodes]
    functions = [textwrap.dedent(function).splitlines() for function in functions]
    blocks = "\n\n".join(re.findall("```python\n(def .*?)```", README, re.DOTALL))
    shown = [block.strip().splitlines() for block in re.split(r"\n(?=def )", blocks)]
    assert len(shown) == 12
    for lines in shown:
        rests = map(iter, functions)
        assert any(all(line in rest for line in lines) for rest in rests), lines


def test_the_python_of_the_readme_runs_as_it_stands(folder):
    imports, training, sampling = re.findall("```python\n((?!def ).*?)```", README, re.DOTALL)
    names = {}
    exec(imports + training, names)
    assert names["model"](names["x_0"], torch.ones(32)).abs().max() > 0
    exec(imports + sampling, names)
    assert names["t"] == 0 and names["x"].shape == (16, 1, 28, 28)


def test_every_name_after_k_in_the_readme_selects_a_test():
    names = re.findall(r"^\|.*\| (`\w+`(?:, `\w+`)*) \|$", README, re.MULTILINE)
    assert len(names) == 8
    names += re.findall(r"`-k (\w+)`", README)
    for name in re.findall(r"\w+", " ".join(names)):
        assert any(name in test for test in globals() if test.startswith("test_")), name
