"""The method's formulas in float64 NumPy, written from algorithm.md and not from dmd2/.

Shapes: images ``(B, C, H, W)``, per-sample values ``(B,)``. Section numbers are those of algorithm.md.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rng = np.random.Generator


def column(values: Array) -> Array:
    """Per-sample values so that they broadcast over images."""
    return np.asarray(values, np.float64).reshape(-1, 1, 1, 1)


# 1.2 and 1.3: Karras grid and EDM preconditioning.
def karras_grid(count: int = 1000) -> Array:
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    return np.array([(low + i / (count - 1) * (high - low)) ** 7 for i in range(count)])


def edm_coefficients(sigma: float) -> dict[str, float]:
    total = sigma**2 + 0.25
    c_out = sigma * 0.5 / total**0.5
    return {"skip": 0.25 / total, "out": c_out, "in": total**-0.5, "noise": np.log(sigma) / 4}


# 1.4: VP schedule.
def vp_abar() -> Array:
    abar, product = np.empty(1000), 1.0
    for k in range(1000):
        product *= 1 - (0.00085**0.5 + k / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        abar[k] = product
    return abar


ABAR = vp_abar()


def vp_noised(x: Array, noise: Array, t: Array) -> Array:
    a = column(ABAR[np.asarray(t, int)])
    return np.sqrt(a) * x + np.sqrt(1 - a) * noise


def vp_x0(x_t: Array, eps: Array, t: Array) -> Array:
    a = column(ABAR[np.asarray(t, int)])
    return (x_t - np.sqrt(1 - a) * eps) / np.sqrt(a)


# 2.1: distribution matching.
def dm_weight(x: Array, real: Array) -> Array:
    return np.abs(x - real).mean(axis=(1, 2, 3))


def dm_gradient(x: Array, real: Array, fake: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num((fake - real) / column(dm_weight(x, real)))


def dm_loss(x: Array, real: Array, fake: Array) -> float:
    return float(0.5 * (dm_gradient(x, real, fake) ** 2).mean())


def guided_eps(conditional: Array, unconditional: Array, scale: float) -> Array:
    return unconditional + scale * (conditional - unconditional) if scale > 1 else conditional


# 2.2: critic.
def critic_loss_edm(denoised: Array, x: Array, sigma: Array) -> float:
    weight = 1 / np.asarray(sigma) ** 2 + 1 / 0.5**2
    return float((column(weight) * (denoised - x) ** 2).mean())


def critic_loss_eps(eps: Array, noise: Array) -> float:
    return float(((eps - noise) ** 2).mean())


# 2.3.4: GAN.
def softplus(v: Array) -> Array:
    return np.logaddexp(0, v)


def discriminator_loss(fake: Array, real: Array) -> float:
    return float((softplus(fake) + softplus(-real)).mean())


def generator_gan_loss(fake: Array) -> float:
    return float(softplus(-fake).mean())


# 2.5.2
def step_list(n: int) -> list[int]:
    values, t = [], 999
    while t > 0:
        values.append(t)
        t -= 1000 // n
    return values[:n]


# Analytic teacher: every pixel independently is one of two Gaussians N(+-1, 0.3^2) with weights 0.3 and 0.7.
MODES, PORTIONS, SPREAD = np.array([-1.0, 1.0]), np.array([0.3, 0.7]), 0.3


def mixture_mean(x_t: Array, alpha: Array, sigma: Array) -> Array:
    """Exact E[x | x_t] for x_t = alpha x + sigma n."""
    variance = alpha**2 * SPREAD**2 + sigma**2
    logs = [np.log(p) - (x_t - alpha * m) ** 2 / (2 * variance) for m, p in zip(MODES, PORTIONS, strict=True)]
    top = np.maximum(*logs)
    odds = [np.exp(log - top) for log in logs]
    means = [m + alpha * SPREAD**2 / variance * (x_t - alpha * m) for m in MODES]
    return sum(o * m for o, m in zip(odds, means, strict=True)) / sum(odds)


def mixture_eps(x_t: Array, t: int) -> Array:
    alpha, sigma = np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])
    return (x_t - alpha * mixture_mean(x_t, alpha, sigma)) / sigma


# Karras et al. 2022, Algorithm 2 (Algorithm 1 when churn is 0).
def heun(
    denoise: Callable[[Array, float], Array], z: Array, steps: int, noise: Sequence[Array] = (), churn: float = 0.0,
    s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0,
) -> Array:  # fmt: skip
    t = [*karras_grid(steps)[::-1], 0.0]
    x = t[0] * z
    for i in range(steps):
        gamma = min(churn / steps, 2**0.5 - 1) if s_min <= t[i] <= s_max else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * s_noise * noise[i] if gamma > 0 else x
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
    return x


def leading_times(steps: int) -> list[int]:
    """Stable Diffusion's "leading" spacing with offset 1, noisiest first."""
    return [k * (1000 // steps) + 1 for k in range(steps)][::-1]


def abar_before(t: int, steps: int) -> float:
    earlier = t - 1000 // steps
    return float(ABAR[earlier] if earlier >= 0 else ABAR[0])


# Song et al. 2021, Eq. 12 and 16.
def ddim(
    eps: Callable[[Array, int], Array], z: Array, steps: int, eta: float = 0.0, noise: Sequence[Array] = ()
) -> Array:
    x = z
    for i, t in enumerate(leading_times(steps)):
        a, b, e = ABAR[t], abar_before(t, steps), eps(x, t)
        s = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(1 - b - s**2) * e
        x = x + s * noise[i] if eta > 0 else x
    return x


# Liu et al. 2022, Eq. 11 to 13 ("PLMS": linear multistep, its second step repeated from the start as improved Euler).
def pndm(eps: Callable[[Array, int], Array], z: Array, steps: int) -> Array:
    def transfer(x: Array, a: float, b: float, e: Array) -> Array:
        return np.sqrt(b / a) * x - (b - a) * e / (np.sqrt(a) * (np.sqrt((1 - b) * a) + np.sqrt((1 - a) * b)))

    x, past = z, []
    for i, t in enumerate(leading_times(steps)):
        a, b, e = ABAR[t], abar_before(t, steps), eps(x, t)
        past = [e, *past[:3]]
        if i == 0:
            e = (e + eps(transfer(x, a, b, e), t - 1000 // steps)) / 2
        elif i == 1:
            e = (3 * past[0] - past[1]) / 2
        elif i == 2:
            e = (23 * past[0] - 16 * past[1] + 5 * past[2]) / 12
        else:
            e = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
        x = transfer(x, a, b, e)
    return x


# Karras et al. 2022, Table 1, VE view of a VP network: x / alpha moves along d x / d sigma = eps. Trailing times (2.4).
def euler(eps: Callable[[Array, int], Array], z: Array, steps: int) -> Array:
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    sigmas = [*(np.sqrt((1 - ABAR[t]) / ABAR[t]) for t in times), 0.0]
    x = z * sigmas[0]
    for i, t in enumerate(times):
        x = x + (sigmas[i + 1] - sigmas[i]) * eps(x / np.sqrt(sigmas[i] ** 2 + 1), t)
    return x


# 6.2: the few-step sampler.
def few_step(eps: Callable[[Array, int], Array], z: Array, times: Sequence[int], noise: Sequence[Array]) -> Array:
    v = z
    for i, t in enumerate(times):
        here = np.full(len(z), t)
        a = vp_x0(v, eps(v, t), here)
        if i + 1 < len(times):
            v = vp_noised(a, noise[i], np.full(len(z), times[i + 1]))
    return a
