"""The exercise sheet as theorems, and after them what a user of the programs notices.

A theorem, test_eq..., reaches one quantity by two independent routes, for random schedules, shapes
and times, or by Monte Carlo (five standard errors). For your own DDPM, put mine.py here and run

    DDPM_MODULE=mine python -m pytest -x -q --tb=short -k test_eq

Each theorem rests on those before it, so the first red one names the cause: README.md has a table.
"""
import ast
import gzip
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import Mock, patch

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal

import figures
import train
from ddpm import DDPM as OurDDPM
from ddpm import EmpiricalEps, GaussianEps, linear_beta, per_sample
from unet import TimeEmbedding, UNet

MODULE = os.environ.get("DDPM_MODULE", "ddpm")
DDPM = importlib.import_module(MODULE).DDPM
settings.register_profile("ddpm", derandomize=True, deadline=None, database=None, max_examples=50,
                          report_multiple_bugs=False, phases=[Phase.generate, Phase.shrink])
settings.load_profile("ddpm")
any_chain = st.deferred(lambda: chain())  # a process, a time t and tensors x, y, ε: see below


def given(*strategies):
    """hypothesis.given; theorem.quick has fewer examples, for the table of mistakes."""
    def decorate(test):
        theorem, quick = hypothesis.given(*strategies)(test), hypothesis.given(*strategies)(test)
        theorem.quick = settings(max_examples=5, phases=[Phase.generate])(quick)
        return theorem
    return decorate


@given(any_chain)
def test_eq_tables_run_from_0_to_T(c):
    """α_t = 1 - β_t, and ᾱ_t = α_1 ... α_t, so that ᾱ_0 = 1."""
    T, logarithms = len(c.beta), [math.log(1 - beta) for beta in c.beta]
    close(c.d.beta[1:], c.beta)
    close(c.d.alpha[1:].log(), logarithms)
    close(c.d.alpha_bar.log(), [sum(logarithms[:t]) for t in range(T + 1)])
    assert c.d.T == T


@given(any_chain)
def test_eq1_keeps_a_variance_of_1(c):
    signal, noise = c.d.q_step(c.one, c.times, c.zero), c.d.q_step(c.zero, c.times, c.one)
    close(noise**2, c.beta[c.t - 1])
    close(signal**2 + noise**2, 1)
    assert (signal > 0).all() and (noise > 0).all()
    close(c.d.q_step(c.x, c.times, c.eps), signal * c.x + noise * c.eps)


@given(any_chain)
def test_eq5_is_the_iterated_eq1(c):
    """Its ε is the normalised sum of the noise of (1); later steps shrink that of earlier ones."""
    x_t, noise, (mean, variance) = c.x, 0, marginal(c.beta, c.t)
    for s, beta in enumerate(c.beta[:c.t], 1):
        eps_s = randn(*c.x.shape, seed=c.seed + s)
        x_t = c.d.q_step(x_t, torch.tensor([s]), eps_s)
        noise = (1 - beta)**0.5 * noise + beta**0.5 * eps_s
    close(c.d.q_sample(c.x, c.times, noise / variance**0.5), x_t)
    close(c.d.q_sample(c.x, c.times, c.eps), mean * c.x + variance**0.5 * c.eps)


@given(any_chain)
def test_eq4_is_eq6_when_x_t_comes_from_eq5(c):
    x_t = c.d.q_sample(c.x, c.times, c.eps)
    close(c.d.mean_from_eps(x_t, c.eps, c.times), c.d.posterior_mean(x_t, c.x, c.times))


# Helpers of the theorems. A DDPM from outside gets pictures in float32, and β where the subtraction
# in 1-ᾱ costs few digits.

torch.set_num_threads(1)  # threads only get in the way of tensors this small
exactly = partial(torch.testing.assert_close, rtol=0, atol=0)
OURS, F64, HERE = MODULE == "ddpm", torch.float64, Path(__file__).parent
TOL, LOW, HIGH, DTYPE = (1e-9, 1e-3, 0.999, F64) if OURS else (1e-4, 0.05, 0.95, torch.float32)


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=DTYPE):
    return torch.randn(shape, dtype=F64, generator=seeded(seed)).to(dtype)


def close(actual, expected, tol=TOL):
    """A number is expected of every element; of a tensor, the shape must be the same as well."""
    expected = torch.as_tensor(expected, dtype=F64)
    expected = expected if expected.dim() else expected.expand(actual.shape)
    assert actual.shape == expected.shape, f"the shape must be {tuple(expected.shape)}"
    torch.testing.assert_close(actual.double(), expected, rtol=tol, atol=tol)


def process(*beta):
    """The DDPM with the steps β_1..β_T. Its β_0 must reach no result."""
    return DDPM(torch.tensor([0.5, *beta], dtype=F64))


class Chain:
    """A process, a time for each sample, and tensors of a shape."""

    def __init__(self, beta, times, shape, seed):
        self.d, self.beta, self.t, self.seed = process(*beta), beta, times[0], seed
        self.times, self.x, self.y, self.eps = torch.tensor(times), *randn(3, *shape, seed=seed)
        self.zero, self.one = torch.zeros_like(self.x), torch.ones_like(self.x)

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


def assert_moments(x, mean, cov):
    """The rows x have this mean and covariance, within five standard errors."""
    x, v = x.double(), cov.diagonal() + TOL
    errors_of_mean = (x.mean(0) - mean) / (v / len(x)).sqrt()
    errors_of_cov = (x.T.cov() - cov) / ((v.outer(v) + cov**2) / len(x)).sqrt()
    assert errors_of_mean.abs().max() < 5
    assert errors_of_cov.abs().max() < 5


def wave(x, t):
    """A model: not linear in x, and another one at every t."""
    return x.sin() * t.cos().to(x).reshape(-1, *[1] * (x.dim() - 1))


BETA, I2, I4 = [0.3, 0.5, 0.2], torch.eye(2, dtype=F64), torch.eye(4, dtype=F64)
both_variances = st.sampled_from(["beta", "posterior"])


# 2. Reverse process

@given(chain(batch=3))
def test_eq_methods_take_a_time_for_each_sample(c):
    d = c.d
    methods = [lambda x, y, t: d.q_step(x, t, y), lambda x, y, t: d.q_sample(x, t, y),
               d.posterior_mean, d.predict_x0, d.mean_from_eps,
               lambda x, y, t: d.posterior_variance(t)]
    for method in methods:
        alone = [method(*each) for each in zip(c.x.split(1), c.y.split(1), c.times.split(1))]
        close(method(c.x, c.y, c.times), torch.cat(alone))


@given(any_chain)
def test_eq5_solved_for_x_0_explains_x_t(c):
    close(c.d.q_sample(c.d.predict_x0(c.x, c.eps, c.times), c.times, c.eps), c.x)


@given(chain(first_t=2))
def test_eq4_is_bayes_rule(c):
    """p(x_t | x_{t-1}) p(x_{t-1} | x_0) / p(x_t | x_0) = p(x_{t-1} | x_t, x_0), everywhere."""
    def log_p(x, mean, variance):
        return Normal(mean, variance**0.5).log_prob(x)

    x_0, x_prev, x_t, beta = c.x.double(), c.y.double(), c.eps.double(), c.beta[c.t - 1]
    (mean, variance), (mean_prev, variance_prev) = marginal(c.beta, c.t), marginal(c.beta, c.t - 1)
    bayes = (log_p(x_t, (1 - beta)**0.5 * x_prev, beta)
             + log_p(x_prev, mean_prev * x_0, variance_prev) - log_p(x_t, mean * x_0, variance))
    posterior_mean = c.d.posterior_mean(c.eps, c.x, c.times).double()
    close(log_p(x_prev, posterior_mean, c.d.posterior_variance(c.times).item()), bayes, 10 * TOL)


@given(any_chain)
def test_eq4_is_x_0_at_t_1(c):
    close(c.d.posterior_mean(c.eps, c.x, torch.tensor([1])), c.x)
    close(c.d.posterior_variance(torch.tensor([1])), 0)


def p_sample(c, x, model, variance="beta"):
    """p_sample with noise that depends on the seed alone, also if it ignores the generator."""
    torch.manual_seed(c.seed)
    return c.d.p_sample(model, x, c.times, variance=variance, generator=seeded(c.seed))


@given(any_chain)
def test_eq7_asks_the_model_at_x_t_and_t(c):
    model = Mock(side_effect=wave)
    p_sample(c, c.x, model)
    x_t, t = model.call_args.args
    close(x_t, c.x)
    assert t.dtype == torch.int64 and t.shape == (1,) and t == c.t


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


@given(both_variances)
def test_eq2_adds_noise_of_the_chosen_variance(variance):
    """A small batch first: a wrong shape of a large one can take all memory."""
    d, zero = process(*BETA), lambda x, t: 0 * x
    for n in 3, 30_000:
        x, times = torch.zeros(n, 2, 2, 1, dtype=DTYPE), 1 + torch.arange(n) % 3
        x_prev = d.p_sample(zero, x, times, variance=variance, generator=seeded(0))
        assert x_prev.shape == x.shape
    assert not x_prev[times == 1].any()
    for t in 2, 3:
        shrunk = marginal(BETA, t - 1)[1] / marginal(BETA, t)[1] if variance == "posterior" else 1
        assert_moments(x_prev[times == t].flatten(1), 0, shrunk * BETA[t - 1] * I4)


@given(any_chain, both_variances)
def test_eq2_is_repeated_from_t_down_to_0(c, variance):
    def path(t):
        torch.manual_seed(c.seed)
        return list(c.d.p_sample_loop(wave, c.x, t, variance=variance, generator=seeded(c.seed)))

    steps, x, generator = path(c.t), c.x, seeded(c.seed)
    assert [s for s, _ in steps] == list(range(c.t))[::-1]
    torch.manual_seed(c.seed)
    for s, x_s in steps:
        x = c.d.p_sample(wave, x, torch.tensor([s + 1]), variance=variance, generator=generator)
        close(x_s, x)
    assert [s for s, _ in path(None)] == list(range(c.d.T))[::-1]


# 5. Loss

def inputs_of_the_loss(d, x_0, **options):
    """The x_t and t that the model sees in a call of the loss; a small batch first, as above."""
    for x in x_0[:3], x_0:
        model = Mock(side_effect=lambda x_t, t: 0 * x_t)
        d.loss(model, x, **options)
        x_t, t = model.call_args.args
        assert x_t.shape == x.shape and t.shape == x.shape[:1]
    return x_t, t


def test_eq8_draws_t_uniformly_on_1_to_T():
    """χ² with 6 degrees of freedom is above 32 once in 50,000. The t is read off x_t ≈ √ᾱ_t x_0."""
    n, levels = 19_600, torch.tensor([marginal(7 * [0.5], t)[0] for t in range(8)])
    x_t, _ = inputs_of_the_loss(process(*7 * [0.5]), torch.full((n, 1, 1, 2), 1e4, dtype=DTYPE),
                                generator=seeded(0))
    t = (x_t[:, 0, 0, :1] / 1e4 - levels).abs().argmin(1)
    assert (t.min(), t.max()) == (1, 7)
    counts = torch.bincount(t - 1, minlength=7)
    assert ((counts - n / 7)**2 / (n / 7)).sum() < 32


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
    size, squares = torch.tensor(3.0, dtype=DTYPE, requires_grad=True), c.y.square().mean().item()
    loss = loss_with_errors(c, size)
    close(loss, 9 * squares)
    close(torch.autograd.grad(loss, size)[0], 6 * squares)


def test_eq8_draws_eps_for_every_element():
    x_t, t = inputs_of_the_loss(process(*BETA), torch.zeros(30_000, 2, 2, 1, dtype=DTYPE),
                                generator=seeded(0))
    eps = x_t.flatten(1) / torch.tensor([marginal(BETA, s)[1]**0.5 for s in range(4)])[t, None]
    assert_moments(eps, 0, I4)
    assert (eps**4).mean().item() == pytest.approx(3, abs=5 * (96 / eps.numel())**0.5)


def test_eq8_draws_anew_in_every_call():
    """Where x_0 is 0, the sign of x_t is that of ε."""
    d, x_0 = process(*BETA), torch.zeros(60, 1, 1, 2, dtype=DTYPE)
    for options in {}, {"generator": seeded(0)}:
        (x_t, t), (other_x_t, other_t) = (inputs_of_the_loss(d, x_0, **options) for _ in range(2))
        assert not t.equal(other_t)
        assert not x_t.sign().equal(other_x_t.sign())


def test_eq2_and_eq8_draw_from_the_generator():
    d, x, times = process(*BETA), randn(60, 1, 1, 2), 1 + torch.arange(60) % 3
    for draw in (lambda seed: d.p_sample(wave, x, times, generator=seeded(seed)),
                 lambda seed: next(d.p_sample_loop(wave, x, generator=seeded(seed)))[1],
                 lambda seed: d.loss(wave, x, generator=seeded(seed))):
        assert draw(0).equal(draw(0))
        assert not draw(0).equal(draw(1))


def test_eq_one_step_is_enough():
    d, x = process(0.3), randn(5, 1, 1, 2)
    assert inputs_of_the_loss(d, x)[1].tolist() == 5 * [1]
    [(s, x_0)] = d.p_sample_loop(wave, x)
    times = torch.ones(5, dtype=torch.int64)
    close(x_0, d.mean_from_eps(x, wave(x, times), times))
    assert s == 0


# The exact ε in the place of the network

MEAN, COV = torch.tensor([1.0, -0.5], dtype=F64), torch.tensor([[0.8, 0.3], [0.3, 0.2]], dtype=F64)


@given(both_variances)
def test_eq2_follows_the_linear_recursion(variance):
    """With E[x_{t-1} | x_t] = m_{t-1} + K (x_t - m_t), and σ_1 = 0, from x_T ~ N(0, I) on."""
    d, mean, cov = process(*BETA), 0 * MEAN, I2
    exact = GaussianEps(OurDDPM([0.5, *BETA]), MEAN, COV)
    path = d.p_sample_loop(exact, randn(100_000, 1, 1, 2), variance=variance, generator=seeded(1))
    for t, (_, x) in zip((3, 2, 1), path, strict=True):
        (a_prev, v_prev), (a, v), beta = marginal(BETA, t - 1), marginal(BETA, t), BETA[t - 1]
        cov_prev, cov_t = a_prev**2 * COV + v_prev * I2, a**2 * COV + v * I2
        K = (1 - beta)**0.5 * cov_prev @ cov_t.inverse()
        sigma2 = (t > 1) * (v_prev / v * beta if variance == "posterior" else beta)
        mean = a_prev * MEAN + K @ (mean - a * MEAN)
        cov = K @ cov @ K.T + sigma2 * I2
        assert_moments(x.flatten(1), mean, cov)


def test_eq2_lands_on_the_points():
    """Of data that is a few points, in their proportions, after many small steps."""
    beta, n = linear_beta(400, 1e-4, 0.05), 4000
    points = torch.tensor([[0.0, 0], [2, 1], [2, 1], [-1, 2]], dtype=F64)
    exact = EmpiricalEps(OurDDPM(beta), points)
    *_, (_, x_0) = DDPM(beta).p_sample_loop(exact, randn(n, 1, 1, 2), variance="posterior",
                                            generator=seeded(1))
    share = (torch.cdist(x_0.double().flatten(1), points) < 100 * TOL).double().mean(0)
    expected = torch.tensor([0.25, 0.5, 0.5, 0.25])
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


# Mistakes found in public code: README.md says what each theorem means that they turn red first

MISTAKES = {  # theorem: right code of ddpm.py, and a wrong one
    test_eq_tables_run_from_0_to_T: [
        ("torch.cat([self.alpha.new_ones(1), self.alpha[1:]])", "self.alpha"),
        ("self.alpha.new_ones(1)", "self.alpha.new_ones(2)")],
    test_eq1_keeps_a_variance_of_1: [("beta.sqrt(), eps", "beta, eps")],
    test_eq5_is_the_iterated_eq1: [("(1 - self.alpha_bar[t]).sqrt()", "1 - self.alpha_bar[t]")],
    test_eq4_is_eq6_when_x_t_comes_from_eq5: [
        ("x_t + per_sample(weight_0, x_t) * x_0", "x_0 + per_sample(weight_0, x_t) * x_t")],
    test_eq_methods_take_a_time_for_each_sample: [
        ("coefficient.reshape(-1, *[1] * (x.dim() - 1)).to(x)", "coefficient.to(x)")],
    test_eq5_solved_for_x_0_explains_x_t: [
        ("per_sample(alpha_bar.sqrt(), x_t)", "per_sample(alpha_bar, x_t)")],
    test_eq4_is_bayes_rule: [(" * (1 - self.alpha_bar[t - 1]) / (1 - self.alpha_bar[t])", "")],
    test_eq4_is_x_0_at_t_1: [
        ("return self.beta[t] * (1", "t = t.clamp(min=2)\n        return self.beta[t] * (1")],
    test_eq7_asks_the_model_at_x_t_and_t: [
        ("self.predict_eps(model, x_t, t), t)", "self.predict_eps(model, x_t, t - 1), t)")],
    test_eq7_is_the_mean_of_eq2: [
        ("self.mean_from_eps(x_t, self.predict_eps(model, x_t, t), t)",
         "self.posterior_mean(x_t, self.predict_x0(x_t, self.predict_eps(model, x_t, t), t)"
         ".clamp(-1, 1), t)")],
    test_eq2_adds_no_noise_in_the_last_step: [(" * (t > 1)", "")],
    test_eq2_adds_noise_of_the_chosen_variance: [
        ("sigma2.sqrt() * (t > 1)", "sigma2 * (t > 1)"),
        ("else self.posterior_variance(t)", "else self.beta[t]")],
    test_eq2_is_repeated_from_t_down_to_0: [("range(t, 0, -1)", "range(t, 1, -1)")],
    test_eq8_draws_t_uniformly_on_1_to_T: [
        ("torch.randint(1, self.T + 1", "torch.randint(1, self.T"),
        ("torch.randint(1, self.T + 1", "torch.randint(0, self.T + 1")],
    test_eq8_is_0_for_the_eps_of_x_t: [
        ("(model, x_t, t)).square()", "(model, x_t, t - 1)).square()")],
    test_eq8_is_a_mean_over_every_element: [(".square().mean()", ".square().sum()")],
    test_eq8_draws_eps_for_every_element: [
        ("randn_like(x_0, generator)", "randn_like(x_0[:1], generator).expand_as(x_0)")],
    test_eq8_draws_anew_in_every_call: [
        ("eps = randn_like(x_0, generator)", "eps = randn_like(x_0, torch.manual_seed(0))")],
    test_eq2_and_eq8_draw_from_the_generator: [("randn_like(x_t, generator)", "randn_like(x_t)")],
    test_eq_one_step_is_enough: [("(t > 1)", "((t > 1) | (self.T == 1))")],
    test_eq2_follows_the_linear_recursion: [
        ("predict_eps(model, x_t, t), t)", "predict_eps(model, x_t, t).clamp(-1, 1), t)")],
    test_eq2_lands_on_the_points: [("range(t, 0, -1)", "range(t, 0, -1 - t // 100)")],
}
THEOREMS = [value for name, value in globals().items() if name.startswith("test_eq")]
CHANGES = [(theorem, *change) for theorem, changes in MISTAKES.items() for change in changes]


@pytest.mark.parametrize("theorem, right, wrong", CHANGES, ids=range(len(CHANGES)))
def test_a_mistake_of_others_turns_its_theorem_red_first(theorem, right, wrong, monkeypatch):
    """By an assertion: the range of t is not checked there, as it is not by others."""
    names, source = {}, read("ddpm.py")
    assert source.count(right) == source.count("if outside.any():") == 1
    exec(source.replace(right, wrong).replace("if outside.any():", "if False:"), names)
    monkeypatch.setitem(globals(), "DDPM", names["DDPM"])
    for earlier in THEOREMS[:THEOREMS.index(theorem)]:
        getattr(earlier, "quick", earlier)()
    with pytest.raises(AssertionError):
        getattr(theorem, "quick", theorem)()


# 2 and 3. What README.md says of the variance, and the schedule of the sheet

@given(any_chain, st.floats(0, 9))
def test_variance_before_given_x_t_is_that_of_the_posterior_and_that_of_x_0(c, size):
    """For Gaussian data, along each axis. So β̃_t is right for a point, and β_t for N(0, I)."""
    w = c.d.posterior_mean(c.zero, c.one, c.times)
    (a, v), (a_prev, v_prev) = marginal(c.beta, c.t), marginal(c.beta, c.t - 1)
    for var in size, 0, 1:
        var_t, var_prev = a**2 * var + v, a_prev**2 * var + v_prev
        of_x_0 = var - (a * var)**2 / var_t
        of_x_prev = var_prev - (a / a_prev * var_prev)**2 / var_t
        close(c.d.posterior_variance(c.t) + w**2 * of_x_0, torch.full_like(w, of_x_prev), 1e-8)
    assert c.beta[c.t - 1] == pytest.approx(of_x_prev, rel=1e-8)


def test_linear_beta_is_a_straight_line_and_by_default_that_of_the_sheet():
    close(linear_beta(4, 0.1, 0.9), [0.1, 0.3, 0.5, 0.7, 0.9])
    close(linear_beta()[[0, -1]], [0.0001, 0.02])
    close(OurDDPM(linear_beta()).alpha_bar[200], 0.130865, tol=5e-7)  # the sheet's T


# The exact ε, for the data for which it is known

def tweedie(beta, log_p, x_t, times):
    """E[ε | x_t] = -√(1-ᾱ) ∇ log p(x_t), for each sample; log_p(x, √ᾱ, 1-ᾱ) is for one."""
    expected = []
    for x, t in zip(x_t, times.tolist()):
        mean, variance = marginal(beta, t)
        expected.append(-variance**0.5 * torch.func.grad(log_p)(x, mean, variance))
    return torch.stack(expected)


@given(chain(batch=2), st.integers(0, 3))
def test_exact_eps_of_gaussian_data_is_tweedies_for_a_covariance_of_any_rank(c, rank):
    mean, root = c.y[0], randn(c.y[0].numel(), rank, seed=c.seed + 1)

    def log_p(x, a, v):
        cov = a**2 * root @ root.T + v * torch.eye(len(root), dtype=F64)
        return MultivariateNormal(a * mean.flatten(), cov).log_prob(x.flatten())

    exact = GaussianEps(OurDDPM(c.d.beta), mean, root @ root.T)
    close(exact(c.x, c.times), tweedie(c.beta, log_p, c.x, c.times), tol=1e-8)


@given(chain(batch=2), st.integers(1, 5))
def test_exact_eps_of_a_few_points_is_tweedies(c, n):
    points = randn(n, *c.x[0].shape, seed=c.seed + 1)

    def log_p(x, a, v):
        return Normal(a * points, v**0.5).log_prob(x).reshape(n, -1).sum(1).logsumexp(0)

    exact = EmpiricalEps(OurDDPM(c.d.beta), points)
    close(exact(c.x, c.times), tweedie(c.beta, log_p, c.x, c.times), tol=1e-8)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32))
def test_best_linear_eps_of_data_is_that_of_a_gaussian_with_its_moments(n, D, seed):
    """Also of one picture, whose covariance is 0, and of pictures of 2 x D."""
    x, d = randn(n, 2, D, seed=seed), OurDDPM([0.5, 0.1, 0.9])
    away = (x - x.mean(0)).flatten(1)
    same = GaussianEps(d, x.mean(0), away.T @ away / n)
    x_t, t = randn(n, 2, D, seed=seed + 1), 1 + torch.arange(n) % 2
    close(GaussianEps.fit(d, x)(x_t, t), same(x_t, t), tol=1e-5)


def test_the_picture_comes_back_with_its_own_eps_at_every_t_and_not_with_the_first():
    picture, eps = randn(2, 1, 4, 4)
    x_T = D200.q_sample(picture[None], 200, eps[None])
    own = D200.p_sample_loop(EmpiricalEps(D200, picture[None]), x_T, variance="posterior")
    first = D200.p_sample_loop(lambda x, t: eps[None], x_T, variance="posterior")
    (*_, (_, with_own)), (*_, (_, with_first)) = own, first
    assert (with_own - picture).abs().max() < 1e-8
    assert (with_first - picture).abs().max() > 0.1


# What our methods promise of any tensors

D200, D, X = OurDDPM(linear_beta()), OurDDPM([0.5, 0.1, 0.2, 0.3]), randn(2, 5, dtype=F64)
METHODS = {  # all that makes a tensor like x from x, another tensor y and a time
    "q_step": lambda d, x, y, t: d.q_step(x, t, y),
    "q_sample": lambda d, x, y, t: d.q_sample(x, t, y),
    "posterior_mean": lambda d, x, y, t: d.posterior_mean(x, y, t),
    "predict_x0": lambda d, x, y, t: d.predict_x0(x, y, t),
    "mean_from_eps": lambda d, x, y, t: d.mean_from_eps(x, y, t),
    "p_sample": lambda d, x, y, t: d.p_sample(lambda x, t: y, x, t, generator=seeded(0)),
    "p_sample_loop": lambda d, x, y, t: next(d.p_sample_loop(lambda x, t: y, x, t))[1],
    "predict_eps": lambda d, x, y, t: d.predict_eps(lambda x, t: y, x, t),
    "gaussian": lambda d, x, y, t: GaussianEps(d, torch.zeros(5), torch.eye(5))(x, t),
    "points": lambda d, x, y, t: EmpiricalEps(d, torch.eye(5))(x, t),
}


@pytest.mark.parametrize("like", [torch.float16, torch.bfloat16, torch.float32, F64, "meta"],
                         ids=str)
def test_results_are_like_x_whatever_the_defaults_of_torch(like):
    """The meta device stands for a GPU: it computes nothing, but refuses to mix with the CPU."""
    x, t = X.to(like), torch.tensor([1, 3])
    with torch.device("cpu" if like == "meta" else "meta"):
        d = OurDDPM(D.beta.tolist())
        results = [METHODS[name](d, x, x, t) for name in list(METHODS)[:6]]
        results += [d.p_sample(wave, x, t, variance="posterior"), next(d.p_sample_loop(wave, x))[1]]
        results += [d.p_sample(wave, x, 2), d.loss(wave, x, generator=seeded(0)), d.loss(wave, x)]
    for result in results:
        assert (result.dtype, result.device) == (x.dtype, x.device)
        assert result.shape == (x.shape if result.dim() else ())


def test_float32_keeps_six_digits_at_every_t_of_the_default_schedule():
    t, (x, y) = torch.arange(1, 201), randn(2, 200, 5).float()
    for name in "q_sample", "posterior_mean", "mean_from_eps", "gaussian":
        method = METHODS[name]
        close(method(D200, x, y, t), method(D200, x.double(), y.double(), t), tol=1e-6)


def test_rounding_in_a_covariance_is_mended_and_numpy_arrays_are_welcome():
    """Else the variance ᾱ λ + 1-ᾱ of x_t could be 0."""
    d, x = OurDDPM([0.5, 1e-6]), randn(3, 2)
    exact = GaussianEps(d, np.zeros(2), np.diag([1.0, 0]))(x, 1)
    close(GaussianEps(d, np.zeros(2), [[1, 0], [0, -1e-6 / (1 - 1e-6)]])(x, 1), exact)
    cov = torch.tensor([[1e3, 0.08], [0, 1e3]])
    close(GaussianEps(d, torch.zeros(2), cov)(x, 1), GaussianEps(d, torch.zeros(2), cov.T)(x, 1))
    close(EmpiricalEps(d, x.numpy())(x, 1), EmpiricalEps(d, x)(x, 1))


def unet(channels, *shapes):
    return lambda: UNet(channels=channels)(*map(torch.zeros, shapes))


WRONG = [  # what the ValueError says, and a call that raises it: one row for each kind
    (r"T\+1 ≥ 2 numbers, .*\(1,\)", lambda: OurDDPM([0.1])),
    (r"in \(0, 1\), got 0.1 to 1$", lambda: OurDDPM([0.01, 1.0, 0.1])),
    (r"in \(0, 1\), got 1e-17 to 0.1$", lambda: OurDDPM([0.2, 1e-17, 0.1])),
    ("is 7.89e-31, below 1e-30: take fewer steps", lambda: OurDDPM([0.2] + 100 * [0.5])),
    ("not empty", lambda: D.loss(wave, X[:0])),
    ("float tensor .*ndarray", lambda: D.q_sample(X.numpy(), 1, X)),
    (r"both tensors must be .*\(2, 5\) on .*\(2, 4\) on", lambda: D.posterior_mean(X, X[:, 1:], 1)),
    ("int64 tensor .*float", lambda: D.posterior_variance(1.0)),
    (r"int64 tensor .*\(2, 1\)", lambda: D.q_sample(X, torch.tensor([[1], [2]]), X)),
    ("one time for each of 2 samples, got 3", lambda: D.q_sample(X, torch.tensor([1, 2, 3]), X)),
    (r"model must return .*\(2, 5\).* got .*\(1, 5\)", lambda: D.loss(lambda x, t: x[:1], X)),
    ("takes 3 positional arguments", lambda: D.loss(wave, X, X)),
    ("\"posterior\", got 'beta_t'", lambda: D.p_sample(wave, X, 1, variance="beta_t")),
    ("finite, cov 5 x 5", lambda: GaussianEps(D, X[0], torch.eye(4))),
    ("mean and cov must be finite", lambda: GaussianEps(D, X[0] / 0, torch.eye(5))),
    ("symmetric", lambda: GaussianEps(D, X[0, :2], torch.tensor([[1.0, 0.5], [0, 1]]))),
    ("negative eigenvalue, got -1", lambda: GaussianEps(D, X[0, :2], [[1.0, 2], [2, 1]])),
    ("one or more, finite, got ", lambda: EmpiricalEps(D, X[:0])),
    ("multiples of 4, one", unet((4, 6))),
    ("H and W multiples of 2", unet((4, 8), (2, 1, 6, 7), (2,))),
]


@pytest.mark.parametrize("said, call", WRONG, ids=[said for said, _ in WRONG])
def test_an_error_says_in_a_line_what_was_expected(said, call):
    with pytest.raises((ValueError, TypeError), match=said) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("name", METHODS)
def test_every_method_checks_its_time_and_tensors(name):
    for x, t in (X, 0), (X.long(), 1):
        with pytest.raises(ValueError, match="in 1..3, got 0|float tensor"):
            METHODS[name](D, x, x, t)


# 4. Network

def small_unet(channels=(4, 8), **options):
    """A UNet with random weights everywhere, also where a fresh one has zeros."""
    torch.manual_seed(0)
    model = UNet(channels=channels, **options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@given(*4 * [st.integers(1, 3)], st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3))
def test_unet_returns_the_shape_it_was_given_and_starts_at_zero(n, colours, rows, columns, widths):
    smallest, t = 2 ** (len(widths) - 1), torch.arange(n)
    x = torch.randn(n, colours, rows * smallest, columns * smallest)
    assert small_unet(widths, in_channels=colours)(x, t).shape == x.shape
    assert not UNet(colours, widths)(x, t).any()


def test_unet_depends_on_the_time_and_treats_each_sample_alone():
    model, x, t = small_unet(), torch.randn(5, 1, 8, 8), torch.tensor([50, 1, 200, 2, 199])
    alone = torch.cat([model(a[None], b[None]) for a, b in zip(x, t)])
    torch.testing.assert_close(model(x, t), alone)
    alike, blind = x[:1].expand(5, -1, -1, -1), small_unet(time_conditioning=False)
    assert torch.pdist(model(alike, t).flatten(1)).min() > 1e-3
    assert blind(alike, t).equal(blind(alike, t * 0))


def test_the_drawing_of_the_unet_has_the_widths_and_the_sides_of_its_levels():
    sides, model = [], UNet()
    for level in *model.down_blocks, model.middle:
        level[-1].register_forward_hook(
            lambda _, inputs, h: sides.append("{}x{}x{}".format(*h.shape[1:])))
    model(torch.zeros(1, 1, 28, 28), torch.ones(1))
    drawn = [line.strip() for line in UNet.__doc__.splitlines() if line.endswith(tuple(sides))]
    readme = read("README.md").splitlines()
    assert len(drawn) == 3 and all(line in map(str.strip, readme) for line in drawn)


def test_time_embedding_tells_1_to_1000_apart_from_fast_to_slow():
    torch.manual_seed(0)
    embedding, t = TimeEmbedding(64), torch.arange(1001)
    assert torch.pdist(embedding(t[1:]).double()).min() > 1e-4
    assert embedding(t).equal(embedding(t.double()))
    sines, cosines = embedding.sinusoids(t).chunk(2, dim=1)
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones_like(sines))
    angles = torch.atan2(sines[1], cosines[1]).log()  # at t = 1 the angles are the frequencies
    torch.testing.assert_close(angles, torch.linspace(0, -math.log(1000), 32), rtol=1e-4, atol=1e-4)


# 5 and 6. Training, also of one's own network and process

BARS = torch.eye(8).repeat(3, 1, 1)[:, None].mul(255).byte()
TINY = train.Config(np.int64(40), 2, np.float64(1e-3), timesteps=8, channels=np.array([4, 8]))


class OwnModel(torch.nn.Sequential):
    """A network without our blocks, with modes. A Sequential of length 0 counts as false."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.BatchNorm2d(1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, t):
        return self.norm(self.dropout(self.conv(x)))

    def __len__(self):
        return 0


def test_muon_is_that_of_torch_within_the_rounding_of_its_bfloat16():
    kernel = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    matrix = torch.nn.Parameter(torch.zeros(16, 72))
    mine = train.Muon([kernel], {"lr": 1.0})
    theirs = torch.optim.Muon([matrix], 1.0, weight_decay=0, momentum=0.9, ns_steps=3,
                              adjust_lr_fn="match_rms_adamw")
    for gradient in randn(3, 16, 72).float():
        kernel.grad, matrix.grad = gradient.view_as(kernel).clone(), gradient.clone()
        mine.step()
        theirs.step()
        torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0.02)
    assert matrix.abs().max() > 1


@pytest.mark.parametrize("model, optimizer, muon", [
    (UNet(), "muon", 20), (UNet(), "adam", 0), (OwnModel(), "muon", 0)])
def test_every_parameter_is_trained_by_one_optimiser(model, optimizer, muon):
    """Muon has the two kernels of each of ten blocks; a gradient of 0 changes nothing."""
    optimizers = train.new_optimizers(model, train.Config(lr=0.1, optimizer=optimizer))
    *kernels, rest = [each.param_groups[0]["params"] for each in optimizers]
    assert sorted(map(id, sum(kernels, rest))) == sorted(map(id, model.parameters()))
    assert [p.shape[2:] for p in sum(kernels, [])] == muon * [(3, 3)]
    before = [p.detach().clone() for p in model.parameters()]
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i % 2)
    for each in optimizers:
        each.step()
    for i, (p, old) in enumerate(zip(model.parameters(), before)):
        assert p.equal(old) == (i % 2 == 0) and p.isfinite().all()


def test_a_loss_that_is_not_finite_stops_the_run_before_its_step_and_leaves_nothing():
    trainer, other, loss = train.Trainer(TINY), train.Trainer(TINY), OurDDPM.loss
    trainer.train_step(BARS)
    with (patch.object(OurDDPM, "loss", lambda *each, **named: loss(*each, **named) * np.inf),
          pytest.raises(train.InputError, match="at step 2: try a smaller --lr")):
        trainer.train_step(BARS)
    for each in trainer, other, other:
        each.train_step(BARS)
    assert trainer.losses == other.losses
    exactly(trainer.model.state_dict(), other.model.state_dict())


def test_the_trainer_trains_the_model_and_the_process_that_it_is_given():
    model, ddpm = OwnModel(), OurDDPM(np.linspace(0.1, 0.5, 9))
    before, trainer = model.conv.weight.detach().clone(), train.Trainer(TINY, model, ddpm)
    trainer.train_step(BARS)
    assert trainer.model is model and not model.conv.weight.equal(before)
    other = train.Trainer(TINY, OwnModel())
    other.load_state_dict(trainer.state_dict())
    exactly(other.model.state_dict(), model.state_dict())
    assert other.losses == trainer.losses and other.ddpm.beta.equal(ddpm.beta)
    a, b, c = (train.Trainer(train.Config(seed=seed)).model.conv_in.weight for seed in (0, 0, 1))
    assert a.equal(b) and not a.equal(c)


def test_evaluate_is_the_loss_of_each_picture_at_times_spread_evenly_in_any_order():
    """Of black pictures and a model that is wrong by √t; counts of two t differ by at most 1."""
    def model(x_t, t):
        true = (x_t + per_sample(D200.alpha_bar[t].sqrt(), x_t))
        return true / per_sample((1 - D200.alpha_bar[t]).sqrt(), x_t) + per_sample(t.sqrt(), x_t)

    losses, times = train.evaluate(model, D200, -torch.ones(450, 1, 2, 2))
    torch.testing.assert_close(losses, times.float(), rtol=1e-3, atol=0)
    counts = torch.bincount(times, minlength=201)[1:]
    assert counts.max() - counts.min() == 1 and abs(times.float().mean() - 100.5) < 1
    assert abs(np.corrcoef(times, range(450))[0, 1]) < 0.2


def test_evaluate_leaves_a_model_alone_refuses_a_wrong_shape_and_asks_a_subclass():
    model, x_0 = OwnModel(), train.to_pixels(BARS)
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exactly(train.evaluate(model, D200, x_0), train.evaluate(model, D200, x_0))
    exactly(model.state_dict(), before)
    assert model.training and model.dropout.training and not model.norm.training
    with pytest.raises(ValueError, match="model must return"):
        train.evaluate(lambda x, t: x[:, 0], D200, x_0)
    subclass = OurDDPM(linear_beta())
    subclass.predict_eps = lambda model, x_t, t: x_t
    exactly(train.evaluate(model, subclass, x_0), train.evaluate(lambda x, t: x, D200, x_0))


def test_a_checkpoint_gives_back_the_process_and_says_if_it_is_of_another_network(tmp_path):
    for model, name in (None, "cosine.pt"), (OwnModel(), "own.pt"):
        trainer = train.Trainer(TINY, model, OurDDPM(np.linspace(0.1, 0.5, 9)))
        torch.save(trainer.state_dict(), tmp_path / name)
    assert train.read_checkpoint(tmp_path / "cosine.pt").ddpm.beta.equal(trainer.ddpm.beta)
    with pytest.raises(train.InputError, match="own.pt is not of the UNet .*torch.load"):
        train.read_checkpoint(tmp_path / "own.pt")


# The commands, most of them in this process: each of the others imports torch for seconds

SMALL = "--data data --steps 60 --batch-size 4 --channels 4 8 --timesteps 8 --device cpu"
DIGITS, CHECKPOINT = Path("data/train-images-idx3-ubyte.gz"), Path("out/model.pt")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def command(line, codes=(0,)):
    """What train.py or figures.py prints here, ending with such a code; ASCII and narrow, if 0."""
    printed, main = StringIO(), train.main if line.startswith("train.py") else figures.main
    with (patch.dict(os.environ, COLUMNS="80"), pytest.raises(SystemExit) as stop,
          patch.multiple(sys, argv=line.split(), stdout=printed, stderr=printed)):
        sys.exit(train.run_command(main))
    code, printed = stop.value.code or 0, printed.getvalue()
    if isinstance(code, str):  # Python prints it, and ends with 1
        code, printed = 1, f"{printed}{code}\n"
    assert code in codes, printed
    assert code or printed.isascii() and max(map(len, printed.splitlines())) < 80
    return printed


def write_idx(path, array):
    header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    Path(path).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0))


def write_data(train=60, test=40, side=8, seed=0):
    """Bright bars on black, one for each label: a data set with the names of MNIST."""
    os.makedirs("data", exist_ok=True)
    for split, n in ("train", train), ("t10k", test):
        labels = np.random.default_rng(seed + n).integers(0, 8, n)
        write_idx(f"data/{split}-images-idx3-ubyte.gz",
                  255 * np.eye(side)[labels][:, :, None].repeat(side, 2))
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
    return [state["losses"], state["model"], [each["state"] for each in state["optimizers"]]]


def test_a_run_brings_the_loss_down_from_1_and_its_network_is_measured(finished, folder):
    trainer = train.read_checkpoint("out/model.pt")
    assert trainer.config == train.Config(60, 4, timesteps=8, channels=(4, 8))
    assert abs(trainer.losses[0] - 1) < 0.2 and np.mean(trainer.losses[-20:]) < 0.5
    x_0 = train.to_pixels(train.load_mnist("data")[2])
    loss = train.evaluate(trainer.model, trainer.ddpm, x_0)[0].mean()
    assert f"test loss (8): {loss:.4f} +-" in command("train.py --resume --data data")
    assert CHECKPOINT.read_bytes() == finished[CHECKPOINT]


@pytest.mark.parametrize("flags, data", [
    ("--timesteps 1 --batch-size 1", {"side": 32}), ("--no-time-conditioning", {"train": 1}),
    ("--optimizer adam --lr 1", {"test": 2})])
def test_one_step_one_picture_and_other_kinds_of_run_are_no_special_cases(flags, data, folder):
    write_data(**data)
    printed = command(f"train.py {SMALL} --steps 2 {flags} --out new")
    assert "nan" not in printed and "inf" not in printed
    assert printed.endswith(command("train.py --resume --data data --out new").split("\n", 1)[1])


def run_with(happens, step, line, codes=(0,)):
    """A command that saves every two steps, with happens() during the given step."""
    def watched(trainer, images, train_step=train.Trainer.train_step):
        if len(trainer.losses) + 1 == step:
            happens()
        train_step(trainer, images)

    with patch.object(train.Trainer, "train_step", watched), patch.object(train, "SAVE_EVERY", 2):
        return command(line, codes)


def test_ctrl_c_costs_the_steps_since_the_last_save_and_before_the_first_nothing(finished, folder):
    ctrl_c, whole = Mock(side_effect=KeyboardInterrupt), saved()
    run_with(ctrl_c, 2, f"train.py {SMALL} --overwrite --seed 1", [130])
    assert CHECKPOINT.read_bytes() == finished[CHECKPOINT]
    run_with(ctrl_c, 6, f"train.py {SMALL} --overwrite", [130])
    assert saved()[0] == whole[0][:4]
    command("train.py --data data --resume")
    exactly(saved(), whole)
    assert os.listdir("out") == ["model.pt"]


def test_the_first_save_does_not_replace_a_run_that_began_in_the_same_folder(folder):
    CHECKPOINT.unlink()
    printed = run_with(lambda: CHECKPOINT.write_bytes(b"other"), 1, f"train.py {SMALL}", [1])
    assert "holds a run" in printed and CHECKPOINT.read_bytes() == b"other"


def test_a_killed_run_goes_on_and_ends_bit_for_bit_where_it_would_have(folder):
    """Killed at any moment, also during a write: with a save after every step, most are writing."""
    program = "import train; train.SAVE_EVERY = 1; train.run_command(train.main)"
    run = [sys.executable, "-c", program, *SMALL.split(), "--out", "killed"]
    process, killed = subprocess.Popen(run, env=ENVIRONMENT), Path("killed/model.pt")
    deadline = time.monotonic() + 90
    while not killed.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(saved(killed)[0]) < 60
    command("train.py --resume --data data --out killed")
    exactly(saved(killed), saved())
    assert len(os.listdir("killed")) <= 2  # and the file that was being written


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_train_as_one_on_whole_batches(folder):
    flags = f"{SMALL} --overwrite --steps 3 --batch-size 2 --lr 0.001".split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    printed = subprocess.check_output([sys.executable, *torchrun, str(HERE / "train.py"), *flags],
                                      env=ENVIRONMENT, timeout=90, encoding="utf-8")
    assert printed.count("test loss (8)") == 1
    images, two = train.load_mnist("data")[0], train.read_checkpoint(CHECKPOINT)
    one, loss = train.Trainer(two.config), OurDDPM.loss

    def loss_of_the_two(ddpm, model, x_0, generator):
        halves = []
        for rank in 0, 1:
            rng = train.make_rng("train", 0, len(one.losses) + 1, rank)
            x_0 = images[torch.randint(len(images), (1,), generator=rng)]
            halves.append(loss(ddpm, model, train.to_pixels(x_0), generator=rng))
        return sum(halves) / 2

    with patch.object(OurDDPM, "loss", loss_of_the_two):
        for _ in range(3):
            one.train_step(images)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    torch.testing.assert_close(two.model.state_dict(), one.model.state_dict())


def test_torchrun_alone_says_how_many_processes_share_a_batch(folder):
    with patch.dict(os.environ, RANK="1", WORLD_SIZE="x", LOCAL_RANK="3"):  # left by a cluster
        assert "test loss" in command(f"train.py {SMALL} --steps 1 --out new")
    three = {"is_torchelastic_launched": lambda: True, "init_process_group": Mock(),
             "get_rank": lambda: 0, "get_world_size": lambda: 3}
    with patch.multiple(torch.distributed, **three), patch("atexit.register"):
        assert "3 processes can't share a batch of 4" in command(f"train.py {SMALL} --out 3", [1])


@pytest.mark.parametrize("flags", [f"{SMALL} --out new", "--data data --resume"])
def test_a_bug_of_a_student_keeps_its_traceback(flags, folder, monkeypatch):
    monkeypatch.setattr(UNet, "__init__", lambda *each, **named: Path("nowhere").read_text())
    with pytest.raises(FileNotFoundError):
        command(f"train.py {flags}")


@pytest.mark.parametrize("name, tensors", [
    (DIGITS, lambda path: [train.read_idx(path, 3)]),
    (CHECKPOINT, lambda path: list(train.read_checkpoint(path).model.parameters()))], ids=str)
@settings(max_examples=20)
@hypothesis.given(data=st.data())
def test_a_damaged_file_is_refused_or_read_rightly(name, tensors, data, finished, tmp_path_factory):
    """Cut short, with up to three bytes changed, or random; refused in one line."""
    whole, path = finished[name], tmp_path_factory.getbasetemp() / "file"
    path.write_bytes(whole)
    expected = tensors(path)
    place = st.floats(0, 0.999).map(lambda part: int(part * len(whole)))
    masks = data.draw(st.dictionaries(place, st.integers(1, 255), min_size=1, max_size=3))
    changed = bytes(byte ^ masks.get(i, 0) for i, byte in enumerate(whole))
    cut = place.map(lambda end: whole[:end])
    path.write_bytes(data.draw(st.one_of(st.just(changed), cut, st.binary(max_size=200))))
    try:
        exactly(tensors(path), expected)
    except train.InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("change", [
    {"model": Mock}, {"config": 1}, {"beta": torch.ones(3)}], ids=str)
def test_a_checkpoint_with_code_or_a_wrong_value_is_refused(change, folder):
    torch.save(torch.load(CHECKPOINT, weights_only=True) | change, CHECKPOINT)
    with pytest.raises(train.InputError, match="model.pt is damaged or not of this"):
        train.read_checkpoint(CHECKPOINT)


NEW, RESUME = "train.py --data data --out new", "train.py --data data --resume"
DRAW = "figures.py --data data --digits 16"
REFUSED = [
    (f"{NEW} --steps 0", "steps must be int, 1 to", None),
    (f"{NEW} --channels 6", "multiples of 4", None),
    (f"{NEW} --optimizer sgd", "muon or adam", None),
    (f"{NEW} --nonsense", "--nonsense", None),
    ("train.py --data missing --out new", "missing/train-images-idx3-ubyte.gz", None),
    (NEW, str(DIGITS), lambda: DIGITS.write_bytes(2 * DIGITS.read_bytes())),
    (NEW, "not an IDX file of grey pictures", lambda: write_idx(DIGITS, np.zeros((9, 8, 8, 3)))),
    (NEW, "one label", lambda: write_idx(DIGITS, np.zeros((5, 8, 8)))),
    (f"{NEW} --channels 4 8 8 8 8", "too many levels for images of (8, 8)", None),
    (f"{NEW}/x --steps 1", "can't be written", lambda: Path("new").write_bytes(b"")),
    ("train.py --data data", "--resume or --overwrite it", None),
    ("train.py --resume --out fresh", "fresh/model.pt is not there", None),
    (f"{RESUME} --steps 9999", "--resume keeps the settings", None),
    (RESUME, "other digits", lambda: write_data(seed=3)),
    (f"{DRAW} --digits 21", "--digits", None),
    (f"{DRAW} --checkpoint missing.pt", "missing.pt is not there", None),
]


@pytest.mark.parametrize("line, named, spoil", REFUSED, ids=[line for line, *_ in REFUSED])
def test_bad_input_ends_with_one_sentence_and_writes_nothing(line, named, spoil, folder):
    if spoil:
        spoil()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    printed = command(line, codes=(1, 2))
    assert named in printed.replace("\\", "/") and "Traceback" not in printed
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
        (mean, sem), snr = row["noisy"]["psnr"], d.alpha_bar[t].item() / (1 - d.alpha_bar[t].item())
        assert mean == pytest.approx(10 * np.log10(4 * snr), abs=5 * sem + 0.4)


def test_results_of_the_reverse_process_are_compared_with_their_original_digits(folder):
    """From t = 1 it is a step without noise, the estimate x̂_0; and shown is the path from T."""
    write_data(train=4000, test=60)
    data = train.load_mnist("data")
    d, x = OurDDPM(linear_beta(4, beta_T=0.5)), train.to_pixels(data[0])
    metrics, shown = figures.measure(GaussianEps.fit(d, x), d, data, 20)
    measured, x_0, path = metrics["denoising"], shown["x_0"], shown["path"]
    assert list(measured) == [1, 2, 3, 4] and list(shown["denoised"]) == [1, 2, 4]
    assert measured[1]["reverse"] == measured[1]["network"]
    assert metrics["clean"][0] > 0.9 and measured[1]["reverse"]["accuracy"][0] > 0.9
    assert [t for t, *_ in path] == [4, 3, 2, 1, 0]
    assert shown["samples"]["real digits"][:16].equal(x_0)
    exactly(shown["samples"]["noised digits"][:16], path[-1][1].clamp(-1, 1))
    labels = [digit.sum((0, 2)).argmax().item() for digit in x_0]  # the row of the bright bar
    assert shown["first"] == [labels.index(label) for label in sorted(set(labels))]


def test_the_matched_gaussian_has_the_mean_and_covariance_of_x_T():
    d, mean, root = OurDDPM([0.5, 0.3, 0.4]), randn(3), randn(3, 3, seed=1)
    cov, (signal, noise) = root @ root.T, marginal([0.3, 0.4], 2)
    draws = figures.matched_gaussian(GaussianEps(d, mean, cov), 20_000, seeded(0))
    assert_moments(draws, signal * mean, signal**2 * cov + noise * torch.eye(3, dtype=F64))


def test_the_measures_are_those_of_simple_cases():
    x_0, says_0 = randn(2, 1, 2, 2), Mock(return_value=torch.tensor([[1.0, 0], [1, 0]]))
    row = figures.psnr_and_accuracy(x_0 + 0.02, x_0, torch.tensor([0, 1]), says_0)
    assert row["psnr"] == pytest.approx((40, 0), abs=1e-6)
    assert row["accuracy"] == pytest.approx((0.5, 0.5))
    t = 1 + torch.arange(600) % 40
    with patch.object(train, "evaluate", Mock(return_value=(t.double(), t))):
        row = figures.measure_loss(None, OurDDPM(linear_beta(40)), None)
    assert row["t"] == row["loss_by_t"] == [1.5 + 2 * i for i in range(20)]
    assert row["loss"] == pytest.approx((20.5, (1599 / 12 / 600)**0.5), rel=1e-2)
    a, turn = randn(99, 4), torch.linalg.qr(randn(4, 4))[0]
    b = 3 * a + 2  # (m_a - m_b)² + (s_a - s_b)² along each axis
    expected = (a.mean(0) - b.mean(0))**2 + (a.std(0) - b.std(0))**2
    assert figures.frechet_distance(a @ turn, b @ turn) == pytest.approx(expected.sum().item())


def test_figures_draws_a_network_beside_others_and_leaves_the_runs_alone(folder, monkeypatch):
    """Without a network, the other figures, the same whatever the user's matplotlibrc says."""
    before, line = CHECKPOINT.read_bytes(), "figures.py --data data --digits 16 --out"
    command(f"train.py {SMALL} --steps 10 --out 10")
    command(f"{line} drawn --checkpoint {CHECKPOINT} 10/model.pt")
    first = {f"{name}.png" for name in ("forward", "marginal", "bayes", "embedding")}
    names = {f"{name}.png" for name in ("losses", "denoising", "generation", "reverse")}
    assert set(os.listdir("drawn")) == first | names | {"metrics.json", "reverse.gif"}
    metrics = json.loads(Path("drawn/metrics.json").read_text(encoding="utf-8"))
    assert [run["config"]["steps"] for run in metrics["runs"]] == [60, 10]
    assert os.listdir("out") == ["model.pt"] and CHECKPOINT.read_bytes() == before

    os.remove(CHECKPOINT)
    monkeypatch.setitem(figures.matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(figures.matplotlib.rcParams, "figure.dpi", 10)
    assert "python train.py" in command(f"{line} odd")
    assert set(os.listdir("odd")) == first
    assert all(Path("drawn", name).read_bytes() == Path("odd", name).read_bytes() for name in first)


# The text

def rounded(value, error):
    digits = max(0, -math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def rows_of_the_measurements():
    metrics, *seeds = (json.loads(read(f"figures/{name}.json"))
                       for name in ("metrics", "seed-1", "seed-2"))
    runs = {json.dumps(run["config"]): run["loss"] for run in metrics["runs"]}
    yield ["test loss (8)", *(rounded(*row["loss"]) for row in metrics["losses"].values())]
    for t, row in metrics["denoising"].items():
        cells = [row[name] for name in figures.STYLES if name in row]
        yield [t] + [f"{cell['psnr'][0]:.1f}, {cell['accuracy'][0]:.0%}" for cell in cells]
    for flags in re.findall(r"^\| `python train.py(.*)` \|", read("README.md"), re.MULTILINE):
        with patch.object(sys, "argv", ["train.py", *flags.split()]):
            config = train.asdict(train.Config(**train.parse_flags()[1]))
        yield [f"`python train.py{flags}`", rounded(*runs.pop(json.dumps(config)))]
    assert not runs
    for name, distance in metrics["frechet"].items():
        low, high = sorted(seed["frechet"][name] for seed in seeds)
        yield [name, f"{distance:.1f}", f"{low:.1f} to {high:.1f}"]


def numbers_of_the_equations():
    """Those that stand in sentences, and follow from the schedule and the mean of the digits."""
    d, long = D200, OurDDPM(linear_beta(1000))
    yield "is 0, {:.2f}, {:.2f} and {:.3f} at $t$ = 1, 2, 10 and 100".format(
        *d.posterior_variance(torch.tensor([2, 10, 100])) / d.beta[[2, 10, 100]])
    factor, snr = d.beta / (2 * d.alpha * (1 - d.alpha_bar)), d.alpha_bar / (1 - d.alpha_bar)
    yield f"it is {factor[2]:.2f} at $t = 2$ and {factor[200]:.3f} at $t = 200$"
    yield f"$x_3$ (SNR {snr[3]:,.0f})"
    yield f"$x_{{200}}$ (SNR {snr[200]:.2f})"
    yield f"$\\bar\\alpha_T = {d.alpha_bar[-1]:.6f}$"
    yield f"${(1 - torch.linspace(1e-4, 0.02, 200, dtype=F64)).prod():.6f}$"
    yield f"$\\bar\\alpha_T = {1e5 * long.alpha_bar[-1]:.0f}\\cdot10^{{-5}}$"
    yield f"{sum(p.numel() for p in UNet().parameters()):,} parameters"
    m = train.to_pixels(train.load_mnist(HERE / "mnist")[0]).mean(0)
    yield f"$\\sqrt{{\\bar\\alpha_T}} = {d.alpha_bar[-1].sqrt():.2f}$"
    yield f"$\\sqrt{{\\bar\\alpha_T}}\\lVert m\\rVert = {d.alpha_bar[-1].sqrt() * m.norm():.1f}$"
    yield f"{0.999 / 0.001**0.5:.0f} times"


def test_the_readme_shows_the_numbers_of_the_files_and_of_the_equations_and_every_theorem():
    readme = read("README.md")
    assert list(MISTAKES) == THEOREMS
    rows = ["| " + " | ".join(row) + " |" for row in rows_of_the_measurements()]
    rows += [f"| `{theorem.__name__[5:]}` | " for theorem in MISTAKES]
    places = [readme.find(row) for row in rows]
    assert [row for row, place in zip(rows, places) if place < 0] == []
    assert places == sorted(places)
    text = " ".join(readme.split())
    assert [number for number in numbers_of_the_equations() if number not in text] == []


def bare(node):
    """A function as a reader of README.md sees it: without docstrings, checks and comments."""
    def is_left_out(statement):
        source = ast.unparse(statement)
        return (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                or re.match(r"(t = )?self\._?check", source)
                or isinstance(statement, ast.If) and "raise " in source)

    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            each.body = [part for part in each.body if not is_left_out(part)]
    return ast.unparse(node)


def functions(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def test_every_function_shown_in_the_readme_is_that_of_the_code_and_complete():
    blocks = re.findall("```python\n((?:def |class |@).*?)```", read("README.md"), re.DOTALL)
    shown = functions("\n".join(blocks))
    names = "ddpm.py", "unet.py", "train.py", "figures.py"
    code = {bare(node) for name in names for node in functions(read(name))}
    assert [node.name for node in shown if bare(node) not in code] == []
    assert len(shown) == 22


def test_the_python_of_the_readme_runs_as_it_stands(folder):
    os.rename("data", "mnist")
    [source] = re.findall("```python\n((?!def |class |@).*?)```", read("README.md"), re.DOTALL)
    assert len(source.splitlines()) <= 25
    names = {}
    exec(source, names)
    assert names["t"] == 0 and names["losses"].shape == (40,) and os.path.exists("out/digits.png")


def test_every_name_after_k_in_the_readme_selects_a_test():
    names = re.findall(r"`-k (\w+)`", read("README.md"))
    for row in re.findall(r"^\|.*\| (`\w+`(?:, `\w+`)*) \|$", read("README.md"), re.MULTILINE):
        names += re.findall(r"\w+", row)
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    assert len(names) > 20 and [name for name in names if name not in tests] == []
