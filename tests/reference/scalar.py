"""Grids, RTN, GPTQ and QuantEase by the formulas of the papers."""

import numpy as np


def minmax_grid(row, bits, symmetric=False, dtype=np.float16):
    low, high = min(row.min(), 0), max(row.max(), 0)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = float(dtype((high - low) / (2**bits - 1))) if high > low else float(dtype(2 / (2**bits - 1)))
    zero = 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / scale), 0, 2**bits - 1)
    return scale, zero


def quantize(value, scale, zero, bits):
    return scale * (np.clip(np.round(value / scale) + zero, 0, 2**bits - 1) - zero)


def grids(weight, bits, group, symmetric=False):
    """[out, in] arrays of scale and zero."""
    scale, zero = np.zeros_like(weight), np.zeros_like(weight)
    for i, row in enumerate(weight):
        for j in range(0, len(row), group):
            scale[i, j : j + group], zero[i, j : j + group] = minmax_grid(row[j : j + group], bits, symmetric)
    return scale, zero


def rtn(weight, bits, group, symmetric=False):
    scale, zero = grids(weight, bits, group, symmetric)
    return quantize(weight, scale, zero, bits)


def gptq(weight, hessian, bits, group, *, damp, order, running=False):
    """Columns in `order`; the inverse of the remaining Hessian is formed afresh for every column."""
    n = len(hessian)
    hessian = hessian + damp * np.mean(np.diag(hessian)) * np.eye(n)
    live, result = weight.copy(), np.zeros_like(weight)
    scale, zero = grids(weight, bits, group)
    for k, j in enumerate(order):
        rest = order[k:]
        if running and j % group == 0:
            for i in range(len(weight)):
                scale[i, j : j + group], zero[i, j : j + group] = minmax_grid(live[i, j : j + group], bits)
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        result[:, j] = quantize(live[:, j], scale[:, j], zero[:, j], bits)
        error = (live[:, j] - result[:, j]) / inverse[0, 0]
        live[:, rest[1:]] -= np.outer(error, inverse[0, 1:])
    return result


def quantease(weight, hessian, bits, iterations, relax=True):
    """From the weights, natural order, one grid per row; returns the last iterate."""
    scale, zero = grids(weight, bits, weight.shape[1])
    value = weight.copy()
    for t in range(iterations):
        relaxed = relax and t % 3 == 1 and t < iterations - 1 and t <= 25
        for j in range(weight.shape[1]):
            beta = value[:, j] + ((weight - value) @ hessian[:, j]) / hessian[j, j]
            value[:, j] = beta if relaxed else quantize(beta, scale[:, j], zero[:, j], bits)
    return value


def objective(error, hessian):
    return float(np.sum((error @ hessian) * error))
