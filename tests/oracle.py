"""What the library computes, written again in float64 NumPy, dense and without its formulas."""

import numpy as np

from learnware_jax.specification import kernels

# One of each kernel, with parameters that make distances of order one matter.
ALL_KERNELS = [
    kernels.Gaussian(0.5),
    kernels.MultiGaussian(np.array([0.1, 0.5, 2.0])),
    kernels.Laplace(0.7),
    kernels.InverseMultiquadric(0.6),
    kernels.Linear(),
]


def kernel_name(kernel):
    return kernel.name


def gram(kernel, x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    t = ((x[:, None] - y[None]) ** 2).sum(-1)
    match kernel.name:
        case "gaussian":
            return np.exp(-np.float64(kernel.gamma) * t)
        case "multi_gaussian":
            return np.mean([np.exp(-g * t) for g in np.asarray(kernel.gammas, np.float64)], 0)
        case "laplace":
            return np.exp(-np.float64(kernel.gamma) * np.sqrt(t))
        case "inverse_multiquadric":
            return (1 + np.float64(kernel.gamma) * t) ** -0.5
        case "linear":
            return x @ y.T
    raise ValueError(kernel.name)


def deficit(kernel, t):
    """k(x, y) at |x - y|^2 = t less k(x, x), digits kept; -t / 2 for the linear kernel."""
    match kernel.name:
        case "gaussian":
            return np.expm1(-kernel.gamma * t)
        case "multi_gaussian":
            return np.mean([np.expm1(-gamma * t) for gamma in kernel.gammas], 0)
        case "laplace":
            return np.expm1(-kernel.gamma * np.sqrt(t))
        case "inverse_multiquadric":
            return np.expm1(-np.log1p(kernel.gamma * t) / 2)
        case "linear":
            return -t / 2
    raise ValueError(kernel.name)


def inner(kernel, p, q):
    return np.asarray(p.beta, np.float64) @ gram(kernel, p.z, q.z) @ np.asarray(q.beta, np.float64)


def squared_mmd(kernel, p, q):
    return inner(kernel, p, p) + inner(kernel, q, q) - 2 * inner(kernel, p, q)


def squared_mmd_unbiased(kernel, x, y):
    """The U-statistic of two samples: pairs i = j left out."""

    def distinct(x):
        k = gram(kernel, x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return distinct(x) + distinct(y) - 2 * gram(kernel, x, y).mean()


def unit_rows(rng, n, d, spread=1.0):
    """n rows of unit norm around one direction; a larger spread covers more of the sphere."""
    x = rng.standard_normal(d) + spread * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
