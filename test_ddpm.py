"""The exercise sheet as theorems, and after them what a user of the programs notices.

A theorem, test_eq..., reaches one quantity by two independent routes, and rests on those before it:
the first red one names the cause, for which README.md has a table. For your own DDPM, in mine.py:
    DDPM_MODULE=mine python -m pytest -x -q --tb=short -k test_eq
"""
# ruff: noqa: E402  (the first theorems stand on the first screens, the other imports below them)
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

settings.register_profile("ddpm", derandomize=True, deadline=None, database=None, max_examples=50,
                          report_multiple_bugs=False, phases=[Phase.generate, Phase.shrink])
settings.load_profile("ddpm")
any_chain = st.deferred(lambda: chain())

# c is a Chain, drawn at random: c.d is the DDPM under test with the steps c.beta = [β_1, ..., β_T].
# c.x, c.y and c.eps are random tensors of one shape, for x_0, x_t, ε or what a theorem is about;
# c.one and c.zero are tensors of that shape, full of ones and of zeros.
# c.times is the time of each sample, a tensor (mostly of one sample); c.t is the first, an int.
# marginal(c.beta, c.t) is √ᾱ_t and 1-ᾱ_t, from (1) and without ᾱ. close and expect are asserts.


@given(any_chain)
def test_eq_tables_run_from_0_to_T(c):
    """α_t = 1 - β_t, and ᾱ_t = α_1 ... α_t, so that ᾱ_0 = 1."""
    logarithms = [math.log(1 - beta) for beta in c.beta]
    close(c.d.beta[1:], c.beta)
    close(c.d.alpha[1:].log(), logarithms)
    close(c.d.alpha_bar.log(), [sum(logarithms[:t]) for t in range(c.d.T + 1)])


@given(any_chain)
def test_eq1_keeps_a_variance_of_1(c):
    """The squares of its two coefficients, which a 1 in the place of x or of ε shows, add to 1."""
    signal = c.d.q_step(c.one, c.times, c.zero)
    noise = c.d.q_step(c.zero, c.times, c.one)
    close(noise, c.beta[c.t - 1]**0.5)
    close(signal, (1 - noise**2).sqrt())
    close(c.d.q_step(c.x, c.times, c.eps), signal * c.x + noise * c.eps)


@given(any_chain)
def test_eq5_is_the_iterated_eq1(c):
    """Its ε is the normalised sum of the noise of (1); later steps shrink that of earlier ones."""
    x_t = c.x
    noise = 0
    for s, beta in enumerate(c.beta[:c.t], 1):
        eps_s = randn(*c.x.shape, seed=c.seed + s)
        x_t = c.d.q_step(x_t, torch.tensor([s]), eps_s)
        noise = (1 - beta)**0.5 * noise + beta**0.5 * eps_s
    _, variance = marginal(c.beta, c.t)
    close(c.d.q_sample(c.x, c.times, noise / variance**0.5), x_t)


@given(any_chain)
def test_eq5_solved_for_x_0_explains_x_t(c):
    close(c.d.q_sample(c.d.predict_x0(c.x, c.eps, c.times), c.times, c.eps), c.x)


@given(st.deferred(lambda: chain(first_t=2)))
def test_eq4_is_bayes_rule(c):
    """p(x_t | x_{t-1}) p(x_{t-1} | x_0) / p(x_t | x_0) = p(x_{t-1} | x_t, x_0), everywhere."""
    x_0, x_prev, x_t = c.x, c.y, c.eps
    mean, variance = marginal(c.beta, c.t)
    mean_prev, variance_prev = marginal(c.beta, c.t - 1)
    beta = c.beta[c.t - 1]
    posterior_mean = c.d.posterior_mean(x_t, x_0, c.times)
    posterior_variance = c.d.posterior_variance(c.times)
    close(posterior_variance, [1 / ((1 - beta) / beta + 1 / variance_prev)])
    bayes = (log_p(x_t, (1 - beta)**0.5 * x_prev, beta)
             + log_p(x_prev, mean_prev * x_0, variance_prev) - log_p(x_t, mean * x_0, variance))
    close(log_p(x_prev, posterior_mean, posterior_variance), bayes, 10 * TOL, "log p: ")


@given(any_chain)
def test_eq4_is_x_0_at_t_1(c):
    close(c.d.posterior_mean(c.y, c.x, torch.tensor([1])), c.x)
    close(c.d.posterior_variance(torch.tensor([1])), 0)


@given(any_chain)
def test_eq4_is_eq6_when_x_t_comes_from_eq5(c):
    x_t = c.d.q_sample(c.x, c.times, c.eps)
    close(c.d.mean_from_eps(x_t, c.eps, c.times), c.d.posterior_mean(x_t, c.x, c.times))


# What the theorems stand on. A DDPM from outside gets pictures in float32, and β where the
# subtraction in 1-ᾱ costs few digits.

import ast
import gzip
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from functools import partial
from inspect import signature
from io import StringIO
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
from matplotlib.image import imsave
from torch.distributions import MultivariateNormal, Normal

import figures
import train
from ddpm import DDPM as OurDDPM
from ddpm import EmpiricalEps, GaussianEps, linear_beta, per_sample
from unet import TimeEmbedding, UNet

MODULE = os.environ.get("DDPM_MODULE", "ddpm")
DDPM = importlib.import_module(MODULE).DDPM
OURS = MODULE == "ddpm"
F64 = torch.float64
HERE = Path(__file__).parent
TOL = 1e-9 if OURS else 1e-4
LOW = 1e-3 if OURS else 0.05
HIGH = 0.999 if OURS else 0.95
DTYPE = F64 if OURS else torch.float32
BETA = [0.3, 0.5, 0.2]
I2 = torch.eye(2, dtype=F64)
exactly = partial(torch.testing.assert_close, rtol=0, atol=0)
torch.set_num_threads(1)  # threads only get in the way of tensors this small


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=DTYPE):
    return torch.randn(shape, dtype=F64, generator=seeded(seed)).to(dtype)


def expect(true, said):
    """assert, of which pytest shows what is said and no tensors."""
    __tracebackhide__ = True
    if not true:
        raise AssertionError(said)


def close(actual, expected, tol=TOL, name=""):
    """A number is expected of every element; of a tensor, the shape must be the same as well."""
    __tracebackhide__ = True
    expected = torch.as_tensor(expected, dtype=F64)
    if expected.dim():
        expect(actual.shape == expected.shape,
               f"{name}got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    expected = expected.expand_as(actual)
    error = ((actual - expected).abs() / (1 + expected.abs())).flatten()
    i = error.argmax()
    expect(error[i] <= tol,
           f"{name}got {actual.flatten()[i]:.6g}, expected {expected.flatten()[i]:.6g}")


def variances():
    return getattr(DDPM, "variances", ("beta", "posterior"))


both_variances = st.integers(-1, 0).map(lambda i: variances()[i])  # or the one that there is


def process(*beta):
    """The DDPM with the steps β_1..β_T. Its β_0 must reach no result."""
    return DDPM(torch.tensor([0.97, *beta], dtype=F64))


class Chain:
    """A process, a time for each sample, and tensors of a shape."""

    def __init__(self, beta, times, shape, seed):
        self.d = process(*beta)
        self.beta = beta
        self.t = times[0]
        self.times = torch.tensor(times)
        self.seed = seed
        self.x, self.y, self.eps = randn(3, *shape, seed=seed)
        self.zero = torch.zeros_like(self.x)
        self.one = torch.ones_like(self.x)

    def __repr__(self):
        return (f"a process with β_1..β_T = {self.beta}, t = {self.times.tolist()}, "
                f"x of shape {tuple(self.x.shape)}")


@st.composite
def chain(draw, first_t=1, batch=1):
    """2 to 8 steps. The last axis of a batch is as long as the batch: mixing them up broadcasts."""
    beta = draw(st.lists(st.floats(LOW, HIGH), min_size=2, max_size=8))
    times = draw(st.lists(st.integers(first_t, len(beta)), min_size=batch, max_size=batch))
    sides = draw(st.lists(st.integers(1, 3), min_size=0 if OURS else 2, max_size=2))
    width = batch if batch > 1 else draw(st.integers(1, 3))
    return Chain(beta, times, (batch, *sides, width), draw(st.integers(0, 2**32)))


def marginal(beta, t):
    """√ᾱ_t and 1-ᾱ_t, without ᾱ: what (1) does to a mean and to a variance, one β at a time."""
    mean, variance = 1.0, 0.0
    for beta_s in beta[:t]:
        mean = (1 - beta_s)**0.5 * mean
        variance = (1 - beta_s) * variance + beta_s
    return mean, variance


def log_p(x, mean, variance):
    return Normal(mean.double(), variance**0.5).log_prob(x.double())


def assert_near(actual, expected, variance, name):
    """Every element, within five standard errors."""
    __tracebackhide__ = True
    errors = ((actual - expected) / variance**0.5).flatten()
    i = errors.abs().argmax()
    expect(abs(errors[i]) < 5, f"{name} is {actual.flatten()[i]:.4g}, "
           f"{errors[i]:+.1f} standard errors from what is expected")


def assert_moments(x, mean, cov, name="x"):
    """The rows x have this mean and covariance."""
    __tracebackhide__ = True
    x = x.double()
    v = cov.diagonal() + TOL
    assert_near(x.mean(0), mean, v / len(x), f"a mean of {name}")
    assert_near(x.T.cov(), cov, (v.outer(v) + cov**2) / len(x), f"a covariance of {name}")


def assert_standard_normal(eps, name):
    """Rows of 4, with a fourth moment of 3, unlike noise of ±1."""
    __tracebackhide__ = True
    assert_moments(eps, 0, torch.eye(4, dtype=F64), name)
    assert_near((eps**4).mean(), 3, 96 / eps.numel(), f"the fourth moment of {name}")


def wave(x, t):
    """A model: not linear in x, and another one at every t."""
    return x.sin() * t.cos().to(x).reshape(-1, *[1] * (x.dim() - 1))


# 2. Reverse process, continued

@given(chain(batch=3))
def test_eq_methods_take_a_time_for_each_sample(c):
    q = (c.x, c.times, c.y)
    p = (c.x, c.y, c.times)
    arguments = {"q_step": q, "q_sample": q, "predict_x0": p, "posterior_mean": p,
                 "posterior_variance": [c.times], "mean_from_eps": p}
    for name, each in arguments.items():
        method = getattr(c.d, name)
        alone = [method(*sample) for sample in zip(*[tensor.split(1) for tensor in each])]
        close(method(*each), torch.cat(alone), name=f"{name}: ")


def p_sample(c, x, model, variance):
    """p_sample with noise that depends on the seed alone, also if it ignores the generator."""
    torch.manual_seed(c.seed)
    return c.d.p_sample(model, x, c.times, variance=variance, generator=seeded(c.seed))


@given(any_chain, both_variances)
def test_eq7_asks_the_model_at_x_t_and_t(c, variance):
    model = Mock(side_effect=wave)
    p_sample(c, c.x, model, variance)
    x_t, t = model.call_args.args
    close(x_t, c.x, name="x_t of the model: ")
    expect(t.dtype == torch.int64 and t.tolist() == [c.t], f"the model is asked at t = {t}")


@given(any_chain, both_variances)
def test_eq7_is_the_mean_of_eq2(c, variance):
    """Two steps with the same noise differ as their means do."""
    difference = p_sample(c, c.x, wave, variance) - p_sample(c, c.y, lambda x, t: c.zero, variance)
    mean = c.d.mean_from_eps(c.x, wave(c.x, c.times), c.times)
    close(difference, mean - c.d.mean_from_eps(c.y, c.zero, c.times))


@given(any_chain, both_variances)
def test_eq2_adds_no_noise_in_the_last_step(c, variance):
    c.times = torch.tensor([1])
    mean = c.d.mean_from_eps(c.x, wave(c.x, c.times), c.times)
    close(p_sample(c, c.x, wave, variance), mean)


@given(both_variances, st.integers(2, 3))
def test_eq2_adds_noise_of_the_chosen_variance(variance, t):
    """From x_t = 0, with mean 0. First a small batch: a wrong shape of a large one fills memory."""
    sigma2 = BETA[t - 1]
    if variance == "posterior":
        sigma2 *= marginal(BETA, t - 1)[1] / marginal(BETA, t)[1]
    for n in 3, 4000:
        x = torch.zeros(n, 2, 2, 1, dtype=DTYPE)
        times = torch.full((n,), t)
        x_prev = process(*BETA).p_sample(wave, x, times, variance=variance, generator=seeded(0))
        expect(x_prev.shape == x.shape, f"p_sample makes {tuple(x_prev.shape)} of {tuple(x.shape)}")
    assert_standard_normal(x_prev.flatten(1) / sigma2**0.5, f"σ_t ε / {sigma2**0.5:.4g}")


@given(any_chain, both_variances)
def test_eq2_is_repeated_from_t_down_to_0(c, variance):
    def path(t):
        torch.manual_seed(c.seed)
        steps = list(c.d.p_sample_loop(wave, c.x, t, variance=variance, generator=seeded(c.seed)))
        times = [s for s, _ in steps]
        expect(times == list(range(t or len(c.beta)))[::-1], f"from t = {t} it yields s = {times}")
        return steps

    path(None)
    steps = path(c.t)
    x = c.x
    generator = seeded(c.seed)
    torch.manual_seed(c.seed)
    for s, x_s in steps:
        x = c.d.p_sample(wave, x, torch.tensor([s + 1]), variance=variance, generator=generator)
        close(x_s, x, name=f"x_s at s = {s}: ")


# 5. Loss

def inputs_of_the_loss(d, x_0, **options):
    """The x_t and t that the model sees in a call of the loss; a small batch first, as above."""
    for x in x_0[:3], x_0:
        model = Mock(side_effect=lambda x_t, t: 0 * x_t)
        d.loss(model, x, **options)
        x_t, t = model.call_args.args
        shapes = tuple(x_t.shape), tuple(t.shape)
        expect(shapes == (x.shape, x.shape[:1]), f"the model gets x_t and t of shapes {shapes}")
    return x_t, t


def test_eq8_draws_t_uniformly_on_1_to_T():
    """χ² with 6 degrees of freedom is above 32 once in 50,000. The t is read off x_t ≈ √ᾱ_t x_0."""
    n = 19_600
    x_0 = torch.full((n, 1, 1, 2), 1e4, dtype=DTYPE)
    x_t, _ = inputs_of_the_loss(process(*7 * [0.5]), x_0, generator=seeded(0))
    levels = torch.tensor([marginal(7 * [0.5], t)[0] for t in range(8)])
    t = (x_t[:, 0, 0, :1] / 1e4 - levels).abs().argmin(1)
    counts = torch.bincount(t, minlength=8)
    chi2 = ((counts[1:] - n / 7)**2 / (n / 7)).sum()
    expect(counts[0] == 0 and chi2 < 32, f"t = 0, 1, ..., T drawn {counts.tolist()} times")


def loss_with_errors(c, size):
    """The loss of a model that is wrong by size times y; its ε is the true one, from x_t and t."""
    def model(x_t, t):
        mean, variance = marginal(c.beta, int(t))
        return (x_t - mean * c.x) / variance**0.5 + size * c.y

    torch.manual_seed(c.seed)
    return c.d.loss(model, c.x, generator=seeded(c.seed))


@given(any_chain)
def test_eq8_is_0_for_the_eps_of_x_t(c):
    close(loss_with_errors(c, 0), 0)


@given(any_chain)
def test_eq8_is_a_mean_over_every_element(c):
    size = torch.tensor(3.0, dtype=DTYPE, requires_grad=True)
    squares = c.y.square().mean().item()
    loss = loss_with_errors(c, size)
    close(loss, 9 * squares, name="the loss: ")
    close(torch.autograd.grad(loss, size)[0], 6 * squares, name="its gradient: ")


def test_eq8_draws_eps_for_every_element():
    x_0 = torch.zeros(30_000, 2, 2, 1, dtype=DTYPE)
    x_t, t = inputs_of_the_loss(process(*BETA), x_0, generator=seeded(0))
    noise = torch.tensor([marginal(BETA, s)[1]**0.5 for s in range(4)])
    assert_standard_normal(x_t.flatten(1) / noise[t, None], "ε")


def test_eq8_draws_anew_in_every_call():
    """Where x_0 is 0, the sign of x_t is that of ε."""
    x_0 = torch.zeros(60, 1, 1, 2, dtype=DTYPE)
    for options in {}, {"generator": seeded(0)}:
        x_t, t = inputs_of_the_loss(process(*BETA), x_0, **options)
        other_x_t, other_t = inputs_of_the_loss(process(*BETA), x_0, **options)
        expect(not t.equal(other_t), "two calls of the loss draw the same t")
        expect(not x_t.sign().equal(other_x_t.sign()), "two calls of the loss draw the same ε")


def test_eq2_and_eq8_draw_from_the_generator():
    d = process(*BETA)
    x = randn(60, 1, 1, 2)
    times = torch.full((60,), 2)
    options = {"variance": variances()[0]}
    draws = {
        "p_sample": lambda rng: d.p_sample(wave, x, times, generator=rng, **options),
        "p_sample_loop": lambda rng: next(d.p_sample_loop(wave, x, generator=rng, **options))[1],
        "loss": lambda rng: d.loss(wave, x, generator=rng),
    }
    for name, draw in draws.items():
        rng = seeded(0)
        first = draw(rng)
        same = [draw(each).equal(first) for each in (seeded(0), seeded(1), rng)]
        expect(same == [True, False, False],
               f"{name} draws the same from an equal seed, another, a second time: {same}")


# The exact ε in the place of the network

MEAN = torch.tensor([1.0, -0.5], dtype=F64)
COV = torch.tensor([[0.8, 0.3], [0.3, 0.2]], dtype=F64)


@given(both_variances)
def test_eq2_follows_the_linear_recursion(variance):
    """With E[x_{t-1} | x_t] = m_{t-1} + K (x_t - m_t), and σ_1 = 0, from x_T ~ N(0, I) on."""
    exact = GaussianEps(OurDDPM([0.5, *BETA]), MEAN, COV)
    mean = 0 * MEAN
    cov = I2
    x_T = randn(100_000, 1, 1, 2)
    path = process(*BETA).p_sample_loop(exact, x_T, variance=variance, generator=seeded(1))
    for t, (_, x) in zip((3, 2, 1), path, strict=True):
        beta = BETA[t - 1]
        a, v = marginal(BETA, t)
        a_prev, v_prev = marginal(BETA, t - 1)
        cov_t = a**2 * COV + v * I2
        cov_prev = a_prev**2 * COV + v_prev * I2
        K = (1 - beta)**0.5 * cov_prev @ cov_t.inverse()
        sigma2 = (t > 1) * (v_prev / v * beta if variance == "posterior" else beta)
        mean = a_prev * MEAN + K @ (mean - a * MEAN)
        cov = K @ cov @ K.T + sigma2 * I2
        assert_moments(x.flatten(1), mean, cov, f"x_{t - 1}")


def test_eq2_lands_on_the_points():
    """Of data that is a few points, in their proportions, after many small steps."""
    beta = linear_beta(400, 1e-4, 0.05)
    n = 4000
    points = torch.tensor([[0.0, 0], [2, 1], [2, 1], [-1, 2]], dtype=F64)
    exact = EmpiricalEps(OurDDPM(beta), points)
    *_, (_, x_0) = DDPM(beta).p_sample_loop(exact, randn(n, 1, 1, 2), variance=variances()[-1],
                                            generator=seeded(1))
    share = (torch.cdist(x_0.double().flatten(1), points) < 100 * TOL).double().mean(0)
    expected = torch.tensor([0.25, 0.5, 0.5, 0.25])
    assert_near(share, expected, expected * (1 - expected) / n, "the share of a point")


# Mistakes found in public code: README.md says what each theorem means that they turn red first

def clamped(d, x_t, eps, t):
    """The ε that belongs to x̂_0 clamped to [-1, 1]."""
    x_0 = d.predict_x0(x_t, eps, t).clamp(-1, 1)
    alpha_bar = per_sample(d.alpha_bar[t], x_t)
    return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


class Ours(OurDDPM):
    """Without its checks, as others are: an index may be 0, or wrap."""

    def check(self, t, x=None, *other):
        t = torch.as_tensor(t)
        return t if x is None else t.expand(len(x))


# Each mistake is the body of a subclass of it. Four bodies are right, until a text in them changes:
# (6) by way of (4), with ᾱ_{t-1} from a table of its own; a step with one variance; loop; loss.

POSTERIOR = """
def mean_from_eps(d, x_t, eps, t): return d.posterior_mean(x_t, d.predict_x0(x_t, eps, t), t)
def posterior_mean(d, x_t, x_0, t):
    right = Ours(d.beta)
    right.alpha_bar[t - 1] = d.alpha_bar[t - 1]
    return right.posterior_mean(x_t, x_0, t)
"""
STEP = """variances = ["beta"]
def p_sample(d, model, x, t, variance, generator):
    t = d.check(t, x)
    sigma = d.beta[t].sqrt() * (t > 1)
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return d.mean_from_eps(x, model(x, t), t) + per_sample(sigma, x) * eps
"""
LOOP = """
def p_sample_loop(d, model, x, t=None, **options):
    for s in range(t or d.T, 0, -1):
        x = d.p_sample(model, x, s, **options)
        yield s - 1, x
"""
LOSS = """
def loss(d, model, x_0, generator=None):
    t = torch.randint(1, d.T + 1, x_0.shape[:1], generator=generator)
    eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
    return (eps - model(d.q_sample(x_0, t, eps), t)).square().mean()
"""
SIGN = "def predict_x0(d, x, e, t): return Ours.predict_x0(d, x, -e, t)"

MISTAKES = {  # the theorem that goes red first, and bodies that turn it red
    test_eq_tables_run_from_0_to_T: [
        "def __init__(d, beta): Ours.__init__(d, beta); d.alpha_bar = d.alpha.cumprod(0)",
        "def __init__(d, beta): Ours.__init__(d, beta); d.alpha_bar = d.alpha_bar.roll(-1)"],
    test_eq1_keeps_a_variance_of_1: [
        "def q_step(d, x, t, e): return Ours.q_step(d, x, t, d.beta[t].sqrt() * e)",
        "def q_step(d, x, t, e): return Ours.q_step(d, e, t, x)"],
    test_eq5_is_the_iterated_eq1: [
        "def q_sample(d, x, t, e): return Ours.q_sample(d, x, t, (1 - d.alpha_bar[t]).sqrt() * e)",
        "def q_sample(d, x, t, e): return Ours.q_sample(d, x, t - 1, e)"],
    test_eq5_solved_for_x_0_explains_x_t: [
        "def predict_x0(d, x, e, t): return Ours.predict_x0(d, x, e, t) / d.alpha_bar[t].sqrt()",
        SIGN, SIGN + POSTERIOR],
    test_eq4_is_bayes_rule: [
        "def posterior_mean(d, x_t, x_0, t): return Ours.posterior_mean(d, x_0, x_t, t)",
        "def posterior_variance(d, t): return d.beta[t]",
        "def posterior_variance(d, t): return Ours.posterior_variance(d, t)[:, None, None, None]",
        POSTERIOR.replace("= d.alpha_bar[t - 1]", "= d.alpha_bar[t]")],
    test_eq4_is_x_0_at_t_1: [
        "def posterior_variance(d, t): return Ours.posterior_variance(d, t.clamp(min=2))",
        POSTERIOR.replace("= d.alpha_bar[t - 1]", "= d.alpha_bar[1:][t - 2]")],
    test_eq4_is_eq6_when_x_t_comes_from_eq5: [
        "def mean_from_eps(d, x, e, t): return Ours.mean_from_eps(d, x, -e, t)",
        POSTERIOR.replace("eps, t), t)", "eps, t).clamp(-1, 1), t)")],
    test_eq_methods_take_a_time_for_each_sample: [
        "def q_step(d, x, t, e): return (1 - d.beta[t]).sqrt() * x + d.beta[t].sqrt() * e"],
    test_eq7_asks_the_model_at_x_t_and_t: [STEP.replace("model(x, t)", "model(x, t - 1)")],
    test_eq7_is_the_mean_of_eq2: [
        STEP.replace("model(x, t)", "clamped(d, x, model(x, t), t)")],
    test_eq2_adds_no_noise_in_the_last_step: [STEP.replace(" * (t > 1)", "")],
    test_eq2_adds_noise_of_the_chosen_variance: [
        STEP.replace(".sqrt()", ""),
        STEP.replace(" * eps", " * eps.sign()"),
        STEP.replace(" * eps", " * eps[:1]"),
        STEP.replace("beta\"", "posterior\"")],
    test_eq2_is_repeated_from_t_down_to_0: [
        LOOP.replace("0, -1", "1, -1"),
        LOOP.replace("s - 1", "s")],
    test_eq8_draws_t_uniformly_on_1_to_T: [
        LOSS.replace("d.T + 1", "d.T"),
        LOSS.replace("randint(1", "randint(0")],
    test_eq8_is_0_for_the_eps_of_x_t: [LOSS.replace(", t))", ", t - 1))")],
    test_eq8_is_a_mean_over_every_element: [
        LOSS.replace("mean", "sum"),
        LOSS.replace("square", "abs")],
    test_eq8_draws_eps_for_every_element: [
        LOSS.replace("    return", "    eps = eps[:1].expand_as(eps)\n    return")],
    test_eq8_draws_anew_in_every_call: [
        LOSS.replace("    eps", "    generator = torch.manual_seed(0)\n    eps")],
    test_eq2_and_eq8_draw_from_the_generator: [
        STEP.replace("generator=generator, ", ""),
        STEP.replace("    eps", "    generator.manual_seed(generator.initial_seed())\n    eps")],
    test_eq2_follows_the_linear_recursion: [
        STEP.replace("model(x, t)", "model(x, t).clamp(-1, 1)")],
    test_eq2_lands_on_the_points: [LOOP.replace("-1)", "-1 - d.T // 100)")],
}
THEOREMS = [value for name, value in globals().items() if name.startswith("test_eq")]
CHANGES = [(theorem, body) for theorem, bodies in MISTAKES.items() for body in bodies]


def quick(theorem):
    """A theorem, with five random examples if it needs any."""
    if hasattr(theorem, "hypothesis"):
        for seed in range(5):
            theorem.hypothesis.fuzz_one_input(random.Random(seed).randbytes(200))
    else:
        theorem()


@pytest.mark.parametrize("theorem, body", CHANGES, ids=range(len(CHANGES)))
def test_a_mistake_of_others_turns_its_theorem_red_first(theorem, body, monkeypatch):
    print(body)  # pytest shows it if the test fails
    names = {}
    exec(body, globals(), names)
    monkeypatch.setitem(globals(), "DDPM", type("DDPM", (Ours,), names))
    for earlier in THEOREMS[:THEOREMS.index(theorem)]:
        quick(earlier)
    with pytest.raises(AssertionError):
        quick(theorem)


# What is promised of ours only

def test_one_step_is_enough():
    d = OurDDPM([0.5, 0.3])
    x = randn(5, 2)
    assert inputs_of_the_loss(d, x)[1].tolist() == 5 * [1]
    times = torch.ones(5, dtype=torch.int64)
    [(_, x_0)] = d.p_sample_loop(wave, x)
    close(x_0, d.mean_from_eps(x, wave(x, times), times))


def test_p_sample_takes_a_time_for_each_sample():
    def step(t):
        return d.p_sample(wave, x, t, variance="posterior", generator=seeded(0))

    d = OurDDPM([0.5, *BETA])
    x = randn(3, 2)
    alone = torch.stack([step(1)[0], step(2)[1], step(3)[2]])
    close(step(torch.tensor([1, 2, 3])), alone)


@pytest.mark.parametrize("of_v, expected", [(False, 258.9606), (True, 202.0296)])
def test_diffusers_expects_the_same_sum_after_1000_steps(of_v, expected):
    """And the same β̃_t. The numbers stand in its tests/schedulers/test_scheduler_ddpm.py.

    There β_1 is the first of the line, x̂_0 is clamped, and the model is x_t (t-1)/t, for ε or for
    v = √ᾱ ε - √(1-ᾱ) x_0, by which ε = √ᾱ v + √(1-ᾱ) x_t.
    """
    def model(x_t, t):
        eps = x_t * per_sample((t - 1) / t, x_t)
        if of_v:
            eps = d.q_sample(eps, t, x_t)
        return clamped(d, x_t, eps, t)

    d = OurDDPM([0.5, *linear_beta(999)])
    x_T = torch.arange(768.0).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / 768
    *_, (_, x_0) = d.p_sample_loop(model, x_T, variance="posterior", generator=seeded(0))
    assert x_0.abs().sum().item() == pytest.approx(expected, abs=0.01)
    close(d.posterior_variance(torch.tensor([1, 488, 1000])), [0, 0.00979, 0.02], tol=1e-5)


# 2 and 3. What README.md says of the variance, and the schedule of the sheet

@given(any_chain, st.floats(0, 9))
def test_variance_of_eq2_is_that_of_the_posterior_and_that_of_eps(c, size):
    """For Gaussian data, along each axis. So β̃_t is right for a point, and β_t for N(0, I)."""
    beta = c.beta[c.t - 1]
    a, v = marginal(c.beta, c.t)
    a_prev, v_prev = marginal(c.beta, c.t - 1)
    for var in size, 0, 1:  # of x_0
        var_t = a**2 * var + v
        var_prev = a_prev**2 * var + v_prev
        expected = var_prev - (a / a_prev * var_prev)**2 / var_t
        of_eps = 1 - v / var_t
        by_eps = beta**2 / ((1 - beta) * v) * of_eps
        assert c.d.posterior_variance(c.t) + by_eps == pytest.approx(expected, rel=1e-8)
    assert beta == pytest.approx(expected, rel=1e-8)


def test_linear_beta_is_a_straight_line_and_by_default_that_of_the_sheet():
    close(linear_beta(4, 0.1, 0.9), [0.1, 0.3, 0.5, 0.7, 0.9])
    close(linear_beta()[[0, -1]], [0.0001, 0.02])
    close(OurDDPM(linear_beta()).alpha_bar[200], 0.130865, tol=5e-7)  # the sheet's T


# The exact ε, for the data for which it is known

@given(chain(batch=2), st.integers(0, 3), st.integers(1, 5))
def test_exact_eps_is_tweedies_for_gaussian_data_of_any_rank_and_for_a_few_points(c, rank, n):
    """E[ε | x_t] = -√(1-ᾱ) ∇ log p(x_t), where p is a mixture: of one Gaussian, or of n points."""
    d = OurDDPM(c.d.beta)
    points = randn(n, *c.x[0].shape, seed=c.seed + 1)
    root = randn(points[0].numel(), rank, seed=c.seed + 2)
    C = root @ root.T
    for centres, cov, exact in (
            (points[:1], C, GaussianEps(d, points[0], C)),
            (points, 0 * C, EmpiricalEps(d, points))):
        result = exact(c.x, c.times)
        for x, t, eps in zip(c.x, c.times.tolist(), result):
            a, v = marginal(c.beta, t)
            noise = v * torch.eye(len(C), dtype=F64)
            p = MultivariateNormal(a * centres.flatten(1), a**2 * cov + noise)
            score = torch.func.grad(lambda x, p=p: p.log_prob(x.flatten()).logsumexp(0))(x)
            close(eps, -v**0.5 * score, tol=1e-8)


def test_best_linear_eps_of_data_is_that_of_a_gaussian_with_its_moments():
    """Also of one picture, whose covariance is 0."""
    for n in 1, 5:
        x = randn(n, 2, 3)
        away = (x - x.mean(0)).flatten(1)
        same = GaussianEps(D200, x.mean(0), away.T @ away / n)
        close(GaussianEps.fit(D200, x)(x, 100), same(x, 100), tol=1e-5)


def test_x_T_of_gaussian_data_has_its_mean_and_covariance():
    d = OurDDPM([0.5, 0.3, 0.4])
    mean = randn(3, 1)
    root = randn(3, 3, seed=1)
    a, v = marginal([0.3, 0.4], 2)
    draws = GaussianEps(d, mean, root @ root.T).sample_x_T(20_000, generator=seeded(0))
    assert draws.shape == (20_000, 3, 1)
    expected = a**2 * root @ root.T + v * torch.eye(3, dtype=F64)
    assert_moments(draws[..., 0], a * mean[:, 0], expected)


def test_the_picture_comes_back_with_its_own_eps_at_every_t_and_not_with_the_first():
    picture, eps = randn(2, 1, 4, 4)
    x_T = D200.q_sample(picture[None], 200, eps[None])
    own = D200.p_sample_loop(EmpiricalEps(D200, picture[None]), x_T, variance="posterior")
    first = D200.p_sample_loop(lambda x, t: eps[None], x_T, variance="posterior")
    *_, (_, with_own) = own
    *_, (_, with_first) = first
    assert (with_own - picture).abs().max() < 1e-8
    assert (with_first - picture).abs().max() > 0.1


# What our methods promise of any tensors

D200 = OurDDPM(linear_beta())
D = OurDDPM([0.5, 0.1, 0.2, 0.3])
X = randn(2, 5, dtype=F64)
METHODS = {  # all that makes a tensor like x from x, another tensor y and a time
    "q_step":
        lambda d, x, y, t: d.q_step(x, t, y),
    "q_sample":
        lambda d, x, y, t: d.q_sample(x, t, y),
    "posterior_mean":
        lambda d, x, y, t: d.posterior_mean(x, y, t),
    "predict_x0":
        lambda d, x, y, t: d.predict_x0(x, y, t),
    "mean_from_eps":
        lambda d, x, y, t: d.mean_from_eps(x, y, t),
    "p_sample":
        lambda d, x, y, t: d.p_sample(lambda x, t: y, x, t, generator=seeded(0)),
    "predict_eps":
        lambda d, x, y, t: d.predict_eps(lambda x, t: y, x, t),
    "gaussian":
        lambda d, x, y, t: GaussianEps(d, torch.zeros(5), torch.eye(5))(x, t),
    "points":
        lambda d, x, y, t: EmpiricalEps(d, torch.eye(5))(x, t),
}


@pytest.mark.parametrize(
    "like",
    [torch.float16, torch.bfloat16, torch.float32, F64, "meta"],
    ids=str)
def test_results_are_like_x_whatever_the_defaults_of_torch(like):
    """The meta device stands for a GPU: it computes nothing, but refuses to mix with the CPU."""
    x = X.to(like)
    t = torch.tensor([1, 3])
    with torch.device("cpu" if like == "meta" else "meta"):
        d = OurDDPM(D.beta.tolist())
        results = [METHODS[name](d, x, x, t) for name in list(METHODS)[:6]]
        results += [
            d.p_sample(wave, x, 2, variance="posterior"),
            d.loss(wave, x, generator=seeded(0)),
            next(d.p_sample_loop(wave, x))[1],
            next(d.q_step_loop(x))[1],
        ]
    for result in results:
        assert (result.dtype, result.device) == (x.dtype, x.device)
        assert result.shape == (x.shape if result.dim() else ())


def test_float32_keeps_six_digits_at_every_t_of_the_default_schedule():
    t = torch.arange(1, 201)
    x, y = randn(2, 200, 5).float()
    for name in "q_sample", "posterior_mean", "mean_from_eps", "gaussian":
        method = METHODS[name]
        close(method(D200, x, y, t), method(D200, x.double(), y.double(), t), tol=1e-6)


def test_rounding_in_a_covariance_is_mended_and_numpy_arrays_are_welcome():
    """Else the variance ᾱ λ + 1-ᾱ of x_t could be 0."""
    d = OurDDPM([0.5, 1e-6])
    x = randn(3, 2)
    exact = GaussianEps(d, np.zeros(2), np.diag([1.0, 0]))(x, 1)
    rounded_cov = [[1, 1e-5], [0, -1e-6 / (1 - 1e-6)]]
    close(GaussianEps(d, np.zeros(2), rounded_cov)(x, 1), exact, 1e-2)
    close(EmpiricalEps(d, x.numpy())(x, 1), EmpiricalEps(d, x)(x, 1))


@pytest.mark.parametrize("loop", [
    lambda: D.q_step_loop(X, generator=seeded(0)),
    lambda: D.p_sample_loop(wave, X, generator=seeded(0))])
def test_what_a_process_yields_is_a_copy(loop):
    """Whoever clamps it for a picture does not clamp the process."""
    expected = list(loop())
    assert len(expected) == D.T
    for (_, x), (_, other) in zip(loop(), expected, strict=True):
        exactly(x, other)
        x.zero_()


WRONG = [  # what the error says, and a call that raises it: one row for each kind
    (r"T\+1 ≥ 2 numbers, .*\(1,\)",
     lambda: OurDDPM([0.1])),
    (r"in \(0, 1\), got 0.1 to 1$",
     lambda: OurDDPM([0.01, 1.0, 0.1])),
    (r"in \(0, 1\), got 0 to 0.1$",
     lambda: OurDDPM([0.2, 1e-17, 0.1])),
    ("is 7.89e-31, below 1e-30: take fewer steps",
     lambda: OurDDPM([0.2] + 100 * [0.5])),
    ("not empty",
     lambda: D.loss(wave, X[:0])),
    ("float tensor .*ndarray",
     lambda: D.q_sample(X.numpy(), 1, X)),
    ("both tensors must be .*64.*32",
     lambda: D.posterior_mean(X, X.float(), 1)),
    ("int64 tensor .*float",
     lambda: D.posterior_variance(1.0)),
    (r"int64 tensor .*\(2, 1\)",
     lambda: D.q_sample(X, torch.tensor([[1], [2]]), X)),
    ("one time for each of 2 samples, got 3",
     lambda: D.q_sample(X, torch.tensor([1, 2, 3]), X)),
    ("one int, the time of all",
     lambda: next(D.p_sample_loop(wave, X, torch.tensor([1, 2])))),
    (r"model must return .*\(2, 5\).* got .*\(1, 5\)",
     lambda: D.loss(lambda x, t: x[:1], X)),
    ("\"posterior\", got 'beta_t'",
     lambda: D.p_sample(wave, X, 1, variance="beta_t")),
    ("finite, cov 5 x 5",
     lambda: GaussianEps(D, X[0], torch.eye(4))),
    ("mean and cov must be finite",
     lambda: GaussianEps(D, X[0] / 0, torch.eye(5))),
    ("symmetric",
     lambda: GaussianEps(D, X[0, :2], torch.tensor([[1.0, 0.5], [0, 1]]))),
    ("negative eigenvalue, got -1",
     lambda: GaussianEps(D, X[0, :2], [[1.0, 2], [2, 1]])),
    ("one or more, got ",
     lambda: EmpiricalEps(D, X[:0])),
    ("finite floats, .*uint8",
     lambda: GaussianEps.fit(D, X.byte())),
    ("H and W multiples of 4",
     lambda: UNet()(torch.zeros(2, 1, 6, 8), torch.ones(2))),
    ("steps must be int, 1 to .*'many'",
     lambda: train.Config(steps="many")),
    ("time_conditioning must be bool.*None",
     lambda: train.Config(time_conditioning=None)),
    (r"multiples of 4 .*\(16.9, 32\)",
     lambda: train.Config(channels=(16.9, 32))),
    ("uint8 tensor, .*float32",
     lambda: train.Trainer(TINY).train_step(train.to_pixels(BARS))),
]


@pytest.mark.parametrize("said, call", WRONG, ids=[said for said, _ in WRONG])
def test_an_error_says_in_a_line_what_was_expected(said, call):
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("name", METHODS)
def test_every_method_checks_its_time_and_tensors(name):
    for x, t in (X, 0), (X.long(), 1):
        with pytest.raises(ValueError, match="in 1..3, got 0|float tensor"):
            METHODS[name](D, x, x, t)
    if name in list(METHODS)[:5]:  # those that take another tensor
        with pytest.raises(ValueError, match=r"both tensors .*\(2, 5\) on .*\(1, 5\) on"):
            METHODS[name](D, X, X[:1], 1)


# 4. Network

def small_unet(channels=(4, 8), **options):
    """A UNet with weights everywhere, also where a fresh one has zeros."""
    model = UNet(channels=channels, **options)
    for p in model.parameters():
        p.data = torch.arange(p.numel()).mul(1.7).sin().mul(0.3).view_as(p)
    return model


@given(
    *4 * [st.integers(1, 3)],
    st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3))
def test_unet_returns_the_shape_it_was_given_and_starts_at_zero(n, colours, rows, columns, widths):
    smallest = 2 ** (len(widths) - 1)
    x = torch.randn(n, colours, rows * smallest, columns * smallest)
    t = torch.arange(n)
    assert small_unet(widths, in_channels=colours)(x, t).shape == x.shape
    assert not UNet(colours, widths)(x, t).any()


def test_unet_depends_on_the_time_and_treats_each_sample_alone():
    model = small_unet()
    x = randn(5, 1, 8, 8).float()
    t = torch.tensor([50, 1, 200, 2, 199])
    alone = torch.cat([model(a[None], b[None]) for a, b in zip(x, t)])
    torch.testing.assert_close(model(x, t), alone)
    alike = x[:1].expand(5, -1, -1, -1)
    blind = small_unet(time_conditioning=False)
    assert torch.pdist(model(alike, t).flatten(1)).min() > 1e-3
    assert blind(alike, t).equal(blind(alike, t * 0))


def test_unet_computes_what_it_did():
    """A constant and a checkerboard tell means from maxima; two times tell the scale."""
    board = torch.arange(8)[:, None].add(torch.arange(8)).remainder(2).float()
    x = torch.stack([torch.ones(8, 8), board, board])[:, None]
    h = small_unet()(x, torch.tensor([3, 3, 150]))
    close(h.std((1, 2, 3)), [0.17715, 0.19137, 0.17032], tol=1e-4)


def test_time_embedding_is_of_sinusoids_from_fast_to_slow():
    sines, cosines = TimeEmbedding(64).sinusoids(torch.arange(1001)).chunk(2, dim=1)
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones_like(sines))
    angles = torch.atan2(sines[1], cosines[1]).log()  # at t = 1 the angles are the frequencies
    close(angles, torch.linspace(0, -math.log(1000), 32), 1e-4)


# 5 and 6. Training, also of one's own network, optimiser and process

BARS = torch.eye(8).repeat(3, 1, 1)[:, None].mul(255).byte()
TINY = train.Config(  # numpy's numbers are welcome
    np.int64(40), 2, np.float64(1e-3), 8,
    np.array([4, 8]), np.bool_(True))


class OwnModel(torch.nn.Sequential):
    """A network with modes, and not of our blocks. A Sequential of length 0 counts as false."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, t):
        self.seen = self.norm(self.dropout(self.conv(x)))  # to plot it
        return self.seen

    def __len__(self):
        return 0


class PredictsX0(OurDDPM):
    def predict_eps(self, model, x_t, t):
        return (x_t - model(x_t, t)) / 2


def test_muon_is_that_of_torch_within_the_rounding_of_its_bfloat16():
    kernel = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    unused = torch.nn.Parameter(torch.zeros(4, 4))
    matrix = torch.nn.Parameter(torch.zeros(16, 72))
    mine = train.Muon([{"params": [unused]}, {"params": [kernel], "lr": 1.0}], 0.0)
    theirs = torch.optim.Muon([matrix], 1.0, weight_decay=0, momentum=0.9, ns_steps=3,
                              adjust_lr_fn="match_rms_adamw")
    for gradient in torch.zeros(16, 72), *randn(2, 16, 72).float():
        kernel.grad = gradient.view_as(kernel).clone()
        matrix.grad = gradient.clone()
        mine.step()
        theirs.step()
        torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0.02)
    assert matrix.abs().max() > 0.5


@pytest.mark.parametrize("model, optimizer", [
    (UNet(), "muon"), (UNet(), "adam"), (OwnModel(), "muon")])
def test_every_parameter_is_trained(model, optimizer):
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for each in train.new_optimizers(model, train.Config(lr=0.1, optimizer=optimizer)):
        each.step()
    for p, old in zip(model.parameters(), before):
        assert p.isfinite().all() and not p.equal(old)


def test_a_step_draws_a_batch_of_digits_that_vary():
    batches = []

    class Watched(OurDDPM):
        def loss(self, model, x_0, **options):
            batches.append(x_0)
            return super().loss(model, x_0, **options)

    images = torch.arange(200).byte().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    trainer = train.Trainer(train.Config(), OwnModel(), Watched([0.1, 0.2]))
    for _ in range(3):
        trainer.train_step(images)
    drawn = torch.stack(batches)[:, :, 0, 0, 0]
    assert drawn.shape == (3, 32)
    assert len(drawn.unique()) > 60


def test_the_rate_of_every_group_rises_and_falls_and_a_finished_run_refuses_a_step():
    """From a hundredth at step 1 to all of it at 100, and down to 1/1000 at 1,000."""
    model = OwnModel()
    trainer = train.Trainer(train.Config(steps=1000), model)
    own = torch.optim.SGD([{"params": model.conv.parameters(), "lr": 0.5},
                           {"params": model.norm.parameters()}], lr=0.1)
    trainer.optimizers = [own]
    factors = {1: 0.01, 50: 0.5 * 0.951, 100: 0.901, 1000: 0.001}
    for step, factor in factors.items():
        trainer.losses = (step - 1) * [1.0]
        before = model.conv.weight.detach().clone()
        trainer.train_step(BARS)
        rates = [group["lr"] for group in own.param_groups]
        assert rates == pytest.approx([0.5 * factor, 0.1 * factor])
        moved = before - rates[0] * model.conv.weight.grad
        torch.testing.assert_close(model.conv.weight, moved)
    with pytest.raises(train.InputError, match=r"all 1000 steps .* Config\(steps=\.\.\.\)"):
        trainer.train_step(BARS)


def infinite_loss(model, loss):
    return loss * np.inf


def root_of_0(model, loss):
    return loss + 0 * model.conv_out.bias.sum().mul(0).sqrt()


@pytest.mark.parametrize("bug", [infinite_loss, root_of_0])
def test_a_step_that_is_not_finite_is_not_taken_and_leaves_nothing(bug):
    trainer, other = (train.Trainer(TINY) for _ in range(2))
    trainer.train_step(BARS)
    loss = OurDDPM.loss

    def loss_with_a_bug(ddpm, model, x_0, generator):
        return bug(model, loss(ddpm, model, x_0, generator=generator))

    with (patch.object(OurDDPM, "loss", loss_with_a_bug),
          pytest.raises(train.InputError, match="not finite at step 2, which is not taken")):
        trainer.train_step(BARS)
    for each in trainer, other, other:
        each.train_step(BARS)
    assert trainer.losses == other.losses
    exactly(trainer.model.state_dict(), other.model.state_dict())


class WrongByRootOfT(OurDDPM):
    """Of black pictures; a subclass is asked for its ε, whatever the model."""

    def predict_eps(self, model, x_t, t):
        alpha_bar = per_sample(self.alpha_bar[t], x_t)
        eps = (x_t + alpha_bar.sqrt()) / (1 - alpha_bar).sqrt()
        return eps + per_sample(t.sqrt(), x_t)


def test_the_loss_of_each_picture_is_at_times_spread_evenly_in_any_order():
    """Counts of two t differ by at most 1."""
    ddpm = WrongByRootOfT(linear_beta())
    black = -torch.ones(450, 1, 2, 2)
    losses, times = train.evaluate(None, ddpm, black)
    torch.testing.assert_close(losses, times.float(), rtol=1e-2, atol=0)
    counts = torch.bincount(times, minlength=201)[1:]
    assert counts.max() - counts.min() == 1
    assert abs(np.corrcoef(times, range(450))[0, 1]) < 0.2
    row = figures.measure_loss(None, ddpm, black)
    assert row["loss"] == pytest.approx((100.5, (40_000 / 12 / 450)**0.5), rel=0.02)
    assert row["loss_by_t"] == pytest.approx(row["t"], rel=0.01)
    assert row["t"] == pytest.approx([5.5 + 10 * i for i in range(20)], abs=0.5)


def test_evaluate_is_in_eval_mode_and_leaves_the_modes_as_they_are():
    model = OwnModel()
    x_0 = train.to_pixels(BARS)
    model.eval()
    train.Trainer(TINY, model).train_step(BARS)
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exactly(train.evaluate(model, D200, x_0), train.evaluate(model, D200, x_0))
    exactly(model.state_dict(), before)
    with pytest.raises(ValueError, match="must be a float tensor"):
        train.evaluate(model, D200, x_0[:0])
    assert model.training and model.dropout.training and not model.norm.training


def test_a_checkpoint_knows_its_process_and_its_model(tmp_path):
    """Read as it was, in eval mode; refused with another class, other β or another network."""
    beta = np.linspace(0.1, 0.5, 9)
    path = tmp_path / "own.pt"
    trainer = train.Trainer(TINY, OwnModel(), PredictsX0(beta))
    trainer.train_step(BARS)
    torch.save(trainer.state_dict(), path)
    read_back = train.read_checkpoint(path, model=OwnModel(), ddpm=PredictsX0(beta))
    exactly(read_back.model.state_dict(), trainer.model.state_dict())
    assert read_back.config == TINY and not read_back.model.dropout.training
    for options in (
            {},
            {"ddpm": OurDDPM(beta)},
            {"ddpm": PredictsX0(2 * beta / 3)}):
        with pytest.raises(train.InputError, match="own.pt does not fit: .*ddpm=, a PredictsX0"):
            train.read_checkpoint(path, model=OwnModel(), **options)
    with pytest.raises(train.InputError, match="own.pt does not fit: unet.py or the optimiser"):
        train.read_checkpoint(path, ddpm=PredictsX0(beta))


# The commands, most of them in this process: each of the others imports torch for seconds

SMALL = "--data data --steps 60 --batch-size 4 --channels 4 8 --timesteps 8 --device cpu"
NEW = "train.py --data data --out new"
RESUME = "train.py --data data --resume"
DRAW = "figures.py --data data --digits 16"
DIGITS = Path("data/train-images-idx3-ubyte.gz")
CHECKPOINT = Path("out/model.pt")


def command(line, codes=(0,)):
    """What train.py or figures.py prints here, ending with such a code."""
    printed = StringIO()
    main = train.main if line.startswith("train.py") else figures.main
    with (pytest.raises(SystemExit) as stop,
          patch.multiple(sys, argv=line.split(), stdout=printed, stderr=printed)):
        sys.exit(train.run_command(main))
    code = stop.value.code or 0
    text = printed.getvalue()
    if isinstance(code, str):  # Python prints it, and ends with 1
        text += f"{code}\n"
        code = 1
    assert code in codes, text
    return text


def write_idx(path, array):
    header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    Path(path).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


def write_data(train=60, test=40, side=8, seed=0):
    """Bright bars on black, one for each label: a data set with the names of MNIST."""
    os.makedirs("data", exist_ok=True)
    for split, n in ("train", train), ("t10k", test):
        labels = np.random.default_rng(seed + n).integers(0, 8, n)
        bars = np.eye(side)[labels][:, :, None].repeat(side, 2)
        write_idx(f"data/{split}-images-idx3-ubyte.gz", 255 * bars)
        write_idx(f"data/{split}-labels-idx1-ubyte.gz", labels)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("finished"))
        write_data()
        command(f"train.py {SMALL}")
        return {path: path.read_bytes() for path in (*Path("data").iterdir(), CHECKPOINT)}


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, content in finished.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def saved(path=CHECKPOINT):
    state = torch.load(path, weights_only=True)
    return [state["losses"], state["model"], state["optimizers"]]


def test_a_run_brings_the_loss_down_from_1(folder):
    trainer = train.read_checkpoint("out/model.pt")
    assert abs(trainer.losses[0] - 1) < 0.2
    assert np.mean(trainer.losses[-20:]) < 0.5


def test_one_step_and_one_picture_are_no_special_cases(folder):
    write_data(train=1, test=2, side=32)
    flags = "--steps 1 --timesteps 1 --batch-size 1 --no-time-conditioning --optimizer adam --lr 1"
    printed = command(f"train.py {SMALL} {flags} --out new")
    assert "nan" not in printed and "inf" not in printed


def run_with(happens, step, line, codes=(0,)):
    """A command that saves every two steps, with happens() in a step; after 60, it evaluates."""
    def watched(trainer, images, train_step=train.Trainer.train_step):
        if len(trainer.losses) + 1 == step:
            happens()
        train_step(trainer, images)

    def evaluate(*arguments, evaluate=train.evaluate):
        if step > 60:
            happens()
        return evaluate(*arguments)

    with (patch.object(train.Trainer, "train_step", watched),
          patch.multiple(train, SAVE_EVERY=2, evaluate=evaluate)):
        return command(line, codes)


def test_ctrl_c_costs_the_steps_since_the_last_save_and_before_the_first_nothing(finished, folder):
    ctrl_c = Mock(side_effect=KeyboardInterrupt)
    whole = saved()
    run_with(ctrl_c, 2, f"train.py {SMALL} --overwrite --seed 1", [130])
    assert CHECKPOINT.read_bytes() == finished[CHECKPOINT]
    run_with(ctrl_c, 6, f"train.py {SMALL} --overwrite", [130])
    assert saved()[0] == whole[0][:4]
    command(RESUME)
    exactly(saved(), whole)
    assert os.listdir("out") == ["model.pt"]


@pytest.mark.parametrize("step, flags", [
    (1, "--out new"),
    (5, "--out new"),
    (60, "--overwrite"),
    (61, "--overwrite")])
def test_a_run_does_not_replace_one_that_another_has_saved_meanwhile(step, flags, folder):
    path = CHECKPOINT if flags == "--overwrite" else Path("new/model.pt")

    def another_run_saves():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"other")

    printed = run_with(another_run_saves, step, f"train.py {SMALL} {flags}", [1])
    assert "holds a run: " in printed
    assert path.read_bytes() == b"other"


def test_a_killed_run_goes_on_and_ends_bit_for_bit_where_it_would_have(folder):
    """Killed at any moment, also during a write: with a save after every step, most are writing."""
    program = "import train; train.SAVE_EVERY = 1; train.run_command(train.main)"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    run = [sys.executable, "-c", program, *SMALL.split(), "--out", "killed"]
    process = subprocess.Popen(run, env=environment)
    killed = Path("killed/model.pt")
    deadline = time.monotonic() + 90
    while not killed.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(saved(killed)[0]) < 60
    command("train.py --resume --data data --out killed")
    exactly(saved(killed), saved())


@pytest.mark.parametrize("flags", [f"{SMALL} --out new", "--data data --resume"])
@pytest.mark.parametrize("broken", [UNet, OurDDPM, train.Config])
def test_a_bug_of_a_student_keeps_its_traceback(broken, flags, folder, monkeypatch):
    monkeypatch.setattr(broken, "__init__", lambda *each, **named: misspelt)  # noqa: F821
    with pytest.raises(NameError):
        command(f"train.py {flags}")


@pytest.mark.parametrize("name, tensors", [
    (DIGITS,
     lambda path: [train.read_idx(path, 3)]),
    (CHECKPOINT,
     lambda path: list(train.read_checkpoint(path).model.parameters()))], ids=str)
@settings(max_examples=30)
@given(part=st.floats(0, 0.999), mask=st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read_rightly(
        name, tensors, part, mask, finished, tmp_path_factory):
    """At a part of its length, a byte is changed by a mask, or the file is cut if that is 0."""
    path = tmp_path_factory.getbasetemp() / "file"
    content = bytearray(finished[name])
    path.write_bytes(content)
    expected = tensors(path)
    place = int(part * len(content))
    content[place] ^= mask
    path.write_bytes(content if mask else content[:place])
    try:
        exactly(tensors(path), expected)
    except train.InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def spoil(**state):
    """Put these entries into the checkpoint."""
    return lambda: torch.save(torch.load(CHECKPOINT, weights_only=True) | state, CHECKPOINT)


REFUSED = [  # a command, what it says, and what happened before: one row for each kind
    (f"{NEW} --steps 0",
     "steps must be int, 1 to",
     None),
    (f"{NEW} --optimizer sgd",
     "muon or adam",
     None),
    (f"{NEW} --nonsense",
     "--nonsense",
     None),
    ("train.py --data missing --out new",
     "missing/train-images-idx3-ubyte.gz",
     None),
    (NEW,
     "must be an IDX file",
     lambda: write_idx(DIGITS, np.zeros((9, 8, 8, 3)))),
    (NEW,
     "one label",
     lambda: write_idx(DIGITS, np.zeros((5, 8, 8)))),
    (f"{NEW} --channels 4 8 8 8 8",
     "too many levels for images of (8, 8)",
     None),
    (f"{NEW}/x --steps 1",
     "can't be written",
     lambda: Path("new").write_bytes(b"")),
    ("train.py --data data",
     "--resume or --overwrite it",
     None),
    ("train.py --resume --out fresh",
     "fresh/model.pt can't be read (No such file",
     None),
    (f"{RESUME} --out odd",
     "model.pt can't be read",
     lambda: os.makedirs("odd/model.pt")),
    (f"{RESUME} --steps 9999",
     "--resume keeps the settings",
     None),
    (RESUME,
     "other digits",
     lambda: write_data(seed=3)),
    (RESUME,
     "not saved by this train.py",
     spoil(config={"typo": 1})),
    (RESUME,
     "no checkpoint",
     spoil(model=Mock)),
    (f"{DRAW} --digits 21",
     "--digits",
     None),
    (f"{DRAW} --image data",
     "must be a PNG or JPEG picture",
     None),
]


@pytest.mark.parametrize("line, named, happens", REFUSED, ids=[row[1] for row in REFUSED])
def test_bad_input_ends_with_one_sentence_and_writes_nothing(line, named, happens, folder):
    if happens:
        happens()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    printed = command(line, codes=(1, 2))
    assert named in printed.replace("\\", "/") and "Traceback" not in printed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# 3 and 6. Drawing and measuring

def drawn(axes):
    """The pixels of a picture, as they were in [-1, 1]."""
    return torch.tensor(axes.images[0].get_array()) / 127.5 - 1


def test_the_forward_process_is_drawn_at_the_times_of_the_sheet():
    """Of a grey picture; what is drawn is clamped, so its moments are compared with samples."""
    figure = figures.draw_forward(torch.full((3, 200, 200), 0.5))
    times = (0, 3, 10, 30, 100, 200)
    assert [axes.get_title() for axes in figure.axes] == [f"$x_{{{t}}}$" for t in times]
    for axes, t in zip(figure.axes, times):
        a, v = marginal(linear_beta()[1:].tolist(), t)
        expected = (0.5 * a + v**0.5 * randn(120_000)).clamp(-1, 1)
        close(drawn(axes).mean(), expected.mean(), 0.01)
        close(drawn(axes).std(), expected.std(), 0.01)
    path = [(t, torch.full((1, 3, 2, 2), t / 200)) for t in range(1, 201)]
    with patch.object(OurDDPM, "q_step_loop", Mock(return_value=path)):
        last = figures.draw_forward(torch.zeros(3, 2, 2)).axes[-1]
    assert drawn(last).min() == 1  # x_200, and not x_199


def test_a_picture_of_any_kind_is_read_as_colours_from_black_to_white(tmp_path):
    """Also a JPEG under the name of a PNG; what is transparent is white."""
    path = tmp_path / "condor.png"
    pixels = np.zeros((8, 8, 4), np.uint8)  # black
    pixels[:4, :, 3] = 255
    for kind in "png", "jpg":
        imsave(path, pixels, format=kind)
        x = figures.read_image(path)
        assert x.shape == (3, 8, 8)
        close(x[:, 0], -1, 0.01)
        close(x[:, 7], 1, 0.01)


def test_every_denoiser_is_treated_alike_and_the_noisy_digits_have_their_snr():
    """From t = 1, the reverse process is a step without noise: the estimate x̂_0."""
    d = OurDDPM(linear_beta(3, beta_T=0.5))
    x_0 = train.to_pixels(BARS).repeat(20, 1, 1, 1)
    denoisers = figures.new_denoisers(GaussianEps.fit(d, x_0), d, x_0)
    estimates, paths = figures.denoise(denoisers, d, x_0, seeded(0))
    assert list(estimates) == [1, 2, 3]
    for t, row in estimates.items():
        close(row["network"], row["linear"])
        close(row["memorising"], x_0, 1e-2)
        a, v = marginal(d.beta[1:].tolist(), t)
        error = (row["noisy"] - x_0).square().mean().item()
        assert error == pytest.approx(v / a**2, rel=0.05)
    reversed_at = [t for t, row in estimates.items() if "reverse" in row]
    assert reversed_at == list(paths) == [1, 2, 3]
    close(estimates[1]["reverse"], estimates[1]["network"])
    assert [t for t, _ in paths[3]] == [3, 2, 1, 0]
    exactly(paths[3][-1][1].clamp(-1, 1), estimates[3]["reverse"][:16])


def test_the_measures_are_those_of_simple_cases():
    x_0 = randn(2, 1, 2, 2)

    def says_0_of_brighter_ones(x):
        return torch.stack([x, x_0 + 0.01], 1)[..., 0, 0, 0]

    labels = torch.tensor([0, 1])
    row = figures.psnr_and_accuracy(x_0 + 0.02, x_0, labels, says_0_of_brighter_ones)
    assert row["psnr"] == pytest.approx((40, 0), abs=1e-6)
    assert row["accuracy"] == pytest.approx((0.5, 0.5))
    a = randn(99, 4)
    b = 3 * a + 2  # (m_a - m_b)² + (s_a - s_b)² along each axis
    turn = torch.linalg.qr(randn(4, 4))[0]
    expected = (a.mean(0) - b.mean(0))**2 + (a.std(0) - b.std(0))**2
    assert figures.frechet_distance(a @ turn, b @ turn) == pytest.approx(expected.sum().item())
    assert figures.first_of_each_class([7, 2, 7, 0, 2]) == [3, 1, 0]


class WithDropout(UNet):
    def forward(self, x, t):
        return torch.nn.functional.dropout(super().forward(x, t), 0.5, self.training)


def test_figures_measures_a_network_as_train_does_and_draws_it_beside_others(folder, monkeypatch):
    """Also a network with dropout. Without a network, the other figures."""
    monkeypatch.setattr(train, "UNet", WithDropout)
    printed = command(f"train.py {SMALL} --overwrite")
    command(f"train.py {SMALL} --steps 1 --timesteps 5 --out 5")
    before = CHECKPOINT.read_bytes()
    command(f"{DRAW} --out drawn --checkpoint {CHECKPOINT} {CHECKPOINT} 5/model.pt")
    first = {f"{name}.png" for name in ("forward", "marginal", "bayes", "embedding")}
    names = {f"{name}.png" for name in ("losses", "denoising", "generation", "reverse")}
    assert set(os.listdir("drawn")) == first | names | {"metrics.json", "reverse.gif"}
    metrics = json.loads(Path("drawn/metrics.json").read_text(encoding="utf-8"))
    run, same_run = metrics["runs"]
    assert run == same_run
    assert f"test loss (8): {run['loss'][0]:.4f} +-" in printed
    assert command(RESUME).split("\n", 1)[1] in printed
    assert list(metrics["frechet"])[-1] == "T = 5, from N(0, I)"
    assert CHECKPOINT.read_bytes() == before

    os.remove(CHECKPOINT)
    assert "python train.py" in command(f"{DRAW} --out odd")
    assert set(os.listdir("odd")) == first


# README.md: its numbers, its code, its names of tests

README = read("README.md")
BLOCKS = re.findall("```python\n(.*?)```", README, re.DOTALL)
SHOWN = [block for block in BLOCKS if block.startswith(("def ", "class ", "@"))]


def rounded(value, error):
    digits = max(0, -math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def rows_of_the_measurements():
    metrics = json.loads(read("figures/metrics.json"))
    losses = [rounded(*row["loss"]) for row in metrics["losses"].values()]
    yield ["test loss (8)", *losses]
    for t, row in metrics["denoising"].items():
        cells = [row[name] for name in figures.ROWS if name in row]
        yield [t] + [f"{cell['psnr'][0]:.1f}, {cell['accuracy'][0]:.0%}" for cell in cells]
    runs = {json.dumps(run["config"]): run["loss"] for run in metrics["runs"]}
    for flags in re.findall(r"^\| `python train.py(.*)` \|", README, re.MULTILINE):
        with patch.object(sys, "argv", ["train.py", *flags.split()]):
            config = train.asdict(train.Config(**train.parse_flags()[1]))
        yield [f"`python train.py{flags}`", rounded(*runs.pop(json.dumps(config)))]
    assert not runs
    for name, distance in metrics["frechet"].items():
        yield [name, f"{float(f'{distance:.2g}'):g}"]


def numbers_of_the_equations():
    """Those that stand in sentences, and follow from the schedule and the mean of the digits."""
    yield "is 0, {:.2f}, {:.2f} and {:.3f} at $t$ = 1, 2, 10 and 100".format(
        *D200.posterior_variance(torch.tensor([2, 10, 100])) / D200.beta[[2, 10, 100]])
    factor = D200.beta / (2 * D200.alpha * (1 - D200.alpha_bar))
    yield f"it is {factor[2]:.2f} at $t = 2$ and {factor[200]:.3f} at $t = 200$"
    snr = D200.alpha_bar / (1 - D200.alpha_bar)
    yield f"$x_3$ (SNR {snr[3]:,.0f})"
    yield f"$x_{{200}}$ (SNR {snr[200]:.2f})"
    yield f"$\\bar\\alpha_T = {D200.alpha_bar[-1]:.6f}$"
    yield f"$\\bar\\alpha_T = {1e5 * OurDDPM(linear_beta(1000)).alpha_bar[-1]:.0f}\\cdot10^{{-5}}$"
    yield f"{sum(p.numel() for p in UNet().parameters()):,} parameters"
    gain = 1 / (1 - D200.alpha_bar).sqrt()
    yield f"from {gain[1]:.0f} at $t = 1$ to {gain[200]:.2f} at $t = 200$"
    mean_square = figures.read_image(figures.CONDOR).square().mean()
    yield f"has a mean square of {mean_square:.2f}"
    root = D200.alpha_bar[-1].sqrt()
    m = train.to_pixels(train.load_mnist(train.MNIST)[0]).mean(0)
    yield f"$\\sqrt{{\\bar\\alpha_T}} = {root:.2f}$"
    yield f"$\\sqrt{{\\bar\\alpha_T}}\\lVert m\\rVert = {root * m.norm():.1f}$"
    yield f"({0.999 / 0.001**0.5:.0f} times at $\\beta_t = 0.999$)"


def test_the_readme_shows_the_numbers_of_the_files_and_of_the_equations_and_every_theorem():
    assert list(MISTAKES) == THEOREMS
    rows = ["| " + " | ".join(row) + " |" for row in rows_of_the_measurements()]
    rows += [f"| `{theorem.__name__[5:]}` | " for theorem in MISTAKES]
    places = [README.find(row) for row in rows]
    assert [row for row, place in zip(rows, places) if place < 0] == []
    assert places == sorted(places)
    text = " ".join(README.split())
    assert [number for number in numbers_of_the_equations() if number not in text] == []


def bare(node):
    """A function as a reader of README.md sees it: without docstrings, checks and comments."""
    def is_left_out(statement):
        source = ast.unparse(statement)
        return (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                or re.match(r"(t = )?self\.check|low, high = ", source)
                or isinstance(statement, ast.If) and "raise " in source)

    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            each.body = [part for part in each.body if not is_left_out(part)]
    return ast.unparse(node)


def functions(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def test_every_function_shown_in_the_readme_is_that_of_the_code_and_complete():
    names = "ddpm.py", "unet.py", "train.py", "figures.py"
    code = {bare(node) for name in names for node in functions(read(name))}
    shown = functions("\n".join(SHOWN))
    assert shown and [node.name for node in shown if bare(node) not in code] == []


def test_the_python_of_the_readme_runs_as_it_stands(folder):
    """Its skeleton has our signatures, and its process of fewer steps our ᾱ at their times."""
    os.rename("data", "mnist")
    skeleton, *blocks = [block for block in BLOCKS if block not in SHOWN]
    theirs = {}
    exec(skeleton, theirs)
    for name, method in vars(theirs["DDPM"]).items():
        if callable(method):
            assert signature(method) == signature(getattr(OurDDPM, name))
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["losses"].shape == (40,)
    assert os.path.exists("out/digits.png")
    close(names["fewer"].alpha_bar, names["ddpm"].alpha_bar[[0, 4, 8]])
    *_, (_, x) = names["ddpm"].p_sample_loop(names["clamped"], names["x_T"])
    close(x.abs().max(), 1, 1e-4)


def test_every_name_after_k_in_the_readme_selects_a_test():
    names = re.findall(r"`-k (\w+)`", README)
    for row in re.findall(r"^\|.*\| (`\w+`(?:, `\w+`)*) \|$", README, re.MULTILINE):
        names += re.findall(r"\w+", row)
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    assert names and [name for name in names if name not in tests] == []
