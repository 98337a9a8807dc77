"""Several questions about one picture in one sequence: each sees the picture and itself, and nothing of the others.

    picture and what stands before it | question 1, answer 1 | question 2, answer 2 | ...

The shared beginning is computed once, so that eight questions about a picture cost little more than a single one.
Positions of every question go on where the beginning ends, a four-dimensional mask keeps them apart: the logits are
those of separate conversations, which `alike` checks on the model itself before it is relied on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..compress.anatomy import ModelView
from .shown import Batch, Shown

CLOSE = 1e-3  # largest difference of logits, as a share of their spread, between packed and separate
MOST = 2048  # tokens of a row: attention costs their square
TEXTS = ("input_ids", "attention_mask", "labels")  # what a packed batch is laid out from


def packed(view: ModelView, batch: Batch) -> Batch:
    """`batch` with neighbouring samples of the same picture packed; itself where that cannot be done or saves nothing.

    Args:
        batch: `input_ids`, `attention_mask`, `labels` [samples, tokens], padded on the left; every other tensor has a
            row a sample; those like `input_ids` in shape have a value a token.

    Returns:
        `input_ids`, `labels`, `position_ids` [pictures, L], `attention_mask` [pictures, 1, L, L] (bool, True where a
        token sees another; padding sees itself alone), the others with a row a picture.
    """
    if isinstance(batch, Shown):  # both sides as one, or neither
        mine, theirs = packed(view, dict(batch)), packed(view, batch.original)
        alike = len(mine["labels"]) == len(theirs["labels"]) < len(batch["labels"])
        return Shown(mine, theirs) if alike else batch
    if view.family.seq2seq or view.image_token_id is None or not set(TEXTS) <= set(batch) or windowed(view):
        return batch
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    if any(not isinstance(v, Tensor) or len(v) != len(ids) for v in batch.values()):
        return batch
    by_token = [k for k, v in batch.items() if k != "attention_mask" and v.shape == ids.shape]
    by_picture = [k for k in batch if k not in by_token and k != "attention_mask"]
    visual = (ids == view.image_token_id) & real
    if not bool(visual.any(1).all()):
        return batch
    starts = real.int().argmax(1).tolist()
    ends = (ids.shape[1] - visual.flip(1).int().argmax(1)).tolist()  # after the last visual token
    same = [False] + [
        all(torch.equal(batch[k][i], batch[k][i - 1]) for k in by_picture)
        and all(
            torch.equal(batch[k][i, starts[i] : ends[i]], batch[k][i - 1, starts[i - 1] : ends[i - 1]])
            for k in by_token
        )
        for i in range(1, len(ids))
    ]
    groups: list[list[int]] = []
    lengths: list[int] = []
    for i, joins in enumerate(same):
        tail = ids.shape[1] - ends[i]
        if joins and lengths[-1] + tail <= MOST:
            groups[-1].append(i)
            lengths[-1] += tail
        else:
            groups.append([i])
            lengths.append(ids.shape[1] - starts[i])
    if len(groups) == len(ids):
        return batch
    firsts, width = [group[0] for group in groups], max(lengths)
    blank = {"labels": -100, "input_ids": int(ids[0, -1])}  # padding is any text
    out = {k: batch[k].new_full((len(groups), width), blank.get(k, 0)) for k in by_token}
    positions, segments = (ids.new_zeros(len(groups), width) for _ in range(2))
    segments -= 1  # padding
    for row, group in enumerate(groups):
        head = ends[group[0]] - starts[group[0]]
        pieces = [(group[0], slice(starts[group[0]], ends[group[0]]), 0)]
        pieces += [(i, slice(ends[i], ids.shape[1]), head) for i in group]
        at = 0
        for number, (i, piece, first) in enumerate(pieces):
            span = slice(at, at := at + piece.stop - piece.start)
            for k in by_token:
                out[k][row, span] = batch[k][i, piece]
            positions[row, span] = torch.arange(first, first + piece.stop - piece.start)
            segments[row, span] = number
    more = {k: batch[k][firsts] for k in by_picture}
    return out | more | {"position_ids": positions, "attention_mask": sees(segments)}


def windowed(view: ModelView) -> bool:
    """Whether blocks of the decoder see only the last tokens: they would look at a mask of ours instead."""
    config = view.decoder.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def sees(segments: Tensor) -> Tensor:
    """Which tokens see which, bool [rows, 1, L, L]: causal, within the own segment and to the shared beginning.

    Args:
        segments: [rows, L]: 0 the shared beginning, k the k-th question, -1 padding, which sees itself alone.
    """
    length, device = segments.shape[1], segments.device
    same = segments[:, :, None] == segments[:, None, :]
    shared = (segments[:, None, :] == 0) & (segments[:, :, None] > 0)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    alone = torch.eye(length, dtype=torch.bool, device=device)
    real = (segments >= 0)[:, :, None]
    return (torch.where(real, (same | shared) & causal, alone))[:, None]


def alike(separate: Callable[[], Tensor], together: Callable[[], Tensor], close: float = CLOSE) -> bool:
    """Whether a model says of a packed batch what it says of its samples one by one.

    Args:
        separate, together: its logits, or log-probabilities, at the answer tokens [answer tokens, vocabulary].
        close: largest difference between them, as a share of their spread.
    """
    try:
        with torch.no_grad():
            one, other = separate(), together()
    except Exception:  # whatever its code raises at what it does not take; asked one by one, it raises again
        return False
    if one.shape != other.shape or not one.numel():
        return False
    return float((one - other).abs().max()) <= close * float(one.std())
