"""Which weights become zero: Wanda (Sun et al., arXiv 2306.11695) and SparseGPT (Frantar and Alistarh, 2301.00774).

Pure: tensors in, tensors out. Wanda scores a weight by ``|w_ij| ||X_j||`` and compares within a row. SparseGPT goes
over the columns with ``U``, the upper Cholesky factor of ``H^-1``, as GPTQ does: ``w_i^2 / U_ii^2`` is what a zero in
column i costs once the columns after it have done what they can. The least of a block of columns go, and what went,
times row i of U over U_ii, is taken from the columns after it.

A pattern (n, m) lets at most n of every m consecutive inputs stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..quantize._gptq import Factor, factor_of, row_errors

Pattern = tuple[int, int] | None


@dataclass
class Pruned:
    """A weight with zeros.

    Attributes:
        weight: [out, in] float32. zeros: [out, in] bool, what was chosen.
        error: ``tr((W - P) H (W - P)^T)`` as a share of ``tr(W H W^T)``, with the undamped H.
        retries: how often the damping was raised. fallback: H was zero or never became positive definite; the smallest
            weights went and the others stayed as they were.
    """

    weight: torch.Tensor
    zeros: torch.Tensor
    error: float
    retries: int = 0
    fallback: bool = False


def follows(weight: torch.Tensor, pattern: tuple[int, int]) -> bool:
    """Whether at most n of every m consecutive inputs of `weight` [out, in] are not zero."""
    n, m = pattern
    if weight.shape[1] % m:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, m).sum(-1) <= n).all())


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool like `scores` [..., places]: the `count` lowest along the last dimension; of equal ones the first."""
    order = scores.argsort(dim=-1, stable=True)[..., : max(count, 0)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def least(scores: torch.Tensor, sparsity: float, pattern: Pattern) -> torch.Tensor:
    """Bool [out, in]: in every row the share `sparsity` with the lowest scores, or m - n of every m inputs."""
    if pattern is None:
        return lowest(scores, round(sparsity * scores.shape[1]))
    n, m = pattern
    return lowest(scores.reshape(len(scores), -1, m), m - n).reshape(scores.shape)


def wanda(w: torch.Tensor, norm: torch.Tensor, sparsity: float, pattern: Pattern) -> torch.Tensor:
    """What goes, bool [out, in].

    Args:
        w: [out, in]. norm: [in], root mean square of each input; where all are 0 the smallest weights go.
        sparsity: share of a row; a pattern says it instead.
    """
    known = norm if bool(norm.any()) else torch.ones_like(norm)
    return least(w.detach().abs() * known.to(w), sparsity, pattern)


def sparsegpt(
    w: torch.Tensor,
    h: torch.Tensor,
    *,
    sparsity: float,
    pattern: Pattern = None,
    damp: float = 0.01,
    blocksize: int = 128,
    factor: Factor | None = None,
    gone: torch.Tensor | None = None,
) -> Pruned:
    """Zeros in `w`, and the other weights changed so that the outputs on the inputs behind `h` change least.

    Without a pattern the share `sparsity` of a block of columns goes, over all rows together. Columns without input go
    first, and what is left of them stays as it is.

    Args:
        w: [out, in]. h: [in, in], ``2 E[x x^T]``, undamped; a float64 `h` has everything computed in float64.
        blocksize: columns whose zeros are chosen together; a multiple of m.
        factor: ``factor_of(h, damp, "none")``, where it is known already.
        gone: [out, in] bool, what is zero and has to stay so; it counts as chosen.
    """
    precision = torch.float64 if h.dtype == torch.float64 else torch.float32
    original = w.detach().to(precision)
    kept = torch.zeros_like(original, dtype=torch.bool) if gone is None else gone
    found = factor_of(h, damp, "none") if factor is None else factor
    if found.upper is None:
        zeros = least(original.abs().masked_fill(kept, -1.0), sparsity, pattern) | kept
        return _pruned(original, original, zeros, h, found.retries, True)
    rows, columns = w.shape
    rest, kept = original.T.contiguous(), kept.T  # [in, out]: a column of the weight lies in one piece
    zeros = torch.empty_like(rest, dtype=torch.bool)
    factored, price = found.upper.to(precision), found.importance.to(precision)[:, None]
    diagonal, done = found.upper.diagonal().tolist(), 0
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block, local = rest[start:stop], factored[start:stop, start:stop]
        errors = torch.empty_like(block)
        if pattern is None:
            scores = (block.square() * price[start:stop]).masked_fill(kept[start:stop], -1.0)
            wanted = round(sparsity * rows * stop) - done
            zeros[start:stop] = lowest(scores.flatten(), wanted).reshape(scores.shape) | kept[start:stop]
            done += int(zeros[start:stop].sum())
        for i in range(stop - start):
            column = start + i
            if pattern is not None and column % pattern[1] == 0:
                few = slice(column, column + pattern[1])
                scores = (rest[few].square() * price[few]).masked_fill(kept[few], -1.0)
                zeros[few] = lowest(scores.T, pattern[1] - pattern[0]).T | kept[few]
            went = block[i].masked_fill(~zeros[column], 0.0)
            torch.div(went, diagonal[column], out=errors[i])
            block[i] -= went
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        rest[stop:].addmm_(factored[start:stop, stop:].T, errors, alpha=-1)
    return _pruned(original, rest.T, zeros.T, h, found.retries, False)


def _pruned(
    w: torch.Tensor, now: torch.Tensor, zeros: torch.Tensor, h: torch.Tensor, retries: int, fallback: bool
) -> Pruned:
    after = now.masked_fill(zeros, 0.0)
    error, whole = (float(part.sum()) for part in row_errors(w, after, h))
    return Pruned(after.float().contiguous(), zeros, error / whole if whole > 0 else 0.0, retries, fallback)
