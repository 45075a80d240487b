"""Vector codes in float64 loops, written to be read next to the papers."""

import itertools

import numpy as np


def upper_inverse_factor(hessian, damp):
    """U with (H + damp * mean(diag H) I)^-1 = U^T U, upper triangular."""
    damped = hessian + damp * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def decode(codes, books, scale):
    """Weight of codes [vectors, out, M], books [C, R, M, K, d] and scale [out]."""
    vectors, out, count = codes.shape
    across, down, _, _, d = books.shape
    weight = np.zeros((out, vectors * d))
    for j, i, m in np.ndindex(vectors, out, count):
        entry = books[j * across // vectors, i * down // out, m, codes[j, i, m]]
        weight[i, j * d : (j + 1) * d] += scale[i] * entry
    return weight


def feedback(weight, hessian, damp, book):
    """GPTVQ's sweep with exact feedback and one codebook [K, d]: (values, sum of squared errors)."""
    w, d, total = weight.copy(), book.shape[1], 0.0
    u, values = upper_inverse_factor(hessian, damp), np.zeros_like(weight)
    for p in range(0, w.shape[1], d):
        inverse = np.linalg.inv(u[p : p + d, p : p + d])
        for i in range(len(w)):
            errors = (w[i, p : p + d] - book) @ inverse
            k = np.argmin(np.sum(errors**2, axis=1))
            values[i, p : p + d] = book[k]
            total += np.sum(errors[k] ** 2)
            w[i, p + d :] -= errors[k] @ u[p : p + d, p + d :]
    return values, total


def em(points, factors, importance, entries, iterations):
    """K-means in the metrics of the vectors: (entries, objective after every step)."""
    entries, history = entries.copy(), []
    metric = factors @ factors.swapaxes(1, 2)

    def cost(j, i, entry):
        e = points[j, i] - entry
        return importance[i] * e @ metric[j] @ e

    places = list(np.ndindex(points.shape[:2]))
    for _ in range(iterations):
        codes = {(j, i): int(np.argmin([cost(j, i, c) for c in entries])) for j, i in places}
        history.append(sum(cost(j, i, entries[codes[j, i]]) for j, i in places))
        for k in range(len(entries)):
            members = [(j, i) for j, i in places if codes[j, i] == k]
            if members:
                curvature = sum(importance[i] * metric[j] for j, i in members)
                moment = sum(importance[i] * metric[j] @ points[j, i] for j, i in members)
                entries[k] = np.linalg.solve(curvature, moment)
        history.append(sum(cost(j, i, entries[codes[j, i]]) for j, i in places))
    return entries, history


def best_codes(weight, hessian, books, scale):
    """Exhaustive optimum over all codes of a weight [out, in] with books [M, K, d]: the objective of each row."""
    count, size, d = books.shape
    vectors = weight.shape[1] // d
    sums = [sum(books[m][c] for m, c in enumerate(choice)) for choice in itertools.product(range(size), repeat=count)]
    best = np.full(len(weight), np.inf)
    for choice in itertools.product(range(len(sums)), repeat=vectors):
        e = weight - scale[:, None] * np.concatenate([sums[k] for k in choice])[None, :]
        best = np.minimum(best, np.sum((e @ hessian) * e, axis=1))
    return best


def solve_books(weight, codes, shape, scale, hessian):
    """Dense least squares for all entries: the least objective with these codes and scales."""
    size = int(np.prod(shape))
    columns = []
    for k in range(size):
        unit = np.zeros(size)
        unit[k] = 1
        columns.append(decode(codes, unit.reshape(shape), scale))
    root = np.linalg.cholesky(hessian)
    a = np.stack([(c @ root).reshape(-1) for c in columns], axis=1)
    b = (weight @ root).reshape(-1)
    solution = np.linalg.lstsq(a, b, rcond=None)[0]
    return np.sum((a @ solution - b) ** 2)
