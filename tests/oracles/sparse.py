"""Wanda and SparseGPT as one would write them first: a weight, a row, a column at a time, a fresh inverse every time.

Written from arXiv 2306.11695 (equation 1) and arXiv 2301.00774 (equations 3 to 5, Algorithm 1), in float64, with none
of the product's code. ``inv(H[j:, j:])`` is the inverse Hessian of the columns that are still free at column j.
"""

import torch


def lowest(values, count):
    """Places of the `count` lowest of a list; of equal ones the first."""
    return sorted(range(len(values)), key=lambda place: (values[place], place))[:count]


def wanda(w, x, sparsity=None, pattern=None):
    """The weight with zeros. w: [out, in]. x: [tokens, in]."""
    pruned = w.double().clone()
    norms = [sum(float(value) ** 2 for value in x[:, j]) ** 0.5 for j in range(w.shape[1])]
    for i in range(w.shape[0]):
        scores = [abs(float(w[i, j])) * norms[j] for j in range(w.shape[1])]
        if pattern is None:
            gone = lowest(scores, round(sparsity * len(scores)))
        else:
            n, m = pattern
            gone = [start + k for start in range(0, len(scores), m) for k in lowest(scores[start : start + m], m - n)]
        for j in gone:
            pruned[i, j] = 0.0
    return pruned


def sparsegpt(w, h, sparsity=None, pattern=None, damp=0.01, blocksize=128):
    """The weight with zeros and the others adapted, columns from left to right."""
    w, damped = w.double().clone(), h.double().clone()
    rows, columns = w.shape
    dead = torch.diag(damped) == 0
    damped[dead, dead] = 1.0
    damped += damp * torch.diag(damped).mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(columns)]
    zeros = torch.zeros(rows, columns, dtype=torch.bool)

    def score(i, j):
        return 0.0 if dead[j] else float(w[i, j] ** 2 / inverses[j][0, 0])

    for j in range(columns):
        if pattern is None and j % blocksize == 0:
            places = [(k, i) for k in range(j, min(j + blocksize, columns)) for i in range(rows)]
            wanted = round(sparsity * rows * min(j + blocksize, columns)) - int(zeros.sum())
            for place in lowest([score(i, k) for k, i in places], wanted):
                k, i = places[place]
                zeros[i, k] = True
        if pattern is not None and j % pattern[1] == 0:
            n, m = pattern
            for i in range(rows):
                for k in lowest([score(i, k) for k in range(j, j + m)], m - n):
                    zeros[i, j + k] = True
        for i in range(rows):
            if zeros[i, j]:
                w[i, j:] -= w[i, j] / inverses[j][0, 0] * inverses[j][0]
                w[i, j] = 0.0
    return w


def obs(w, h, place):
    """Optimal Brain Surgeon: a row without the weight at `place`, the others at their best for it."""
    inverse = torch.linalg.inv(h.double())
    return w.double() - w[place].double() / inverse[place, place] * inverse[:, place]
