"""Products of one input as one product: queries, keys and values; gate and up.

For one token a product is short, and every call costs; a joined one gives the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .constants import Packed, key_of


def join_products(graph: Any, packed: Mapping[str, Packed]) -> dict[str, Packed]:
    """Join, in a traced graph whose weights are still floats, the products that share an input and a kind of grid.

    Returns:
        `packed` with the joined weights in the place of those that they consist of.
    """
    from openvino import opset13 as op

    left = dict(packed)
    for rows in _by_input(graph, left).values():
        parts = [left[key] for _, key in rows]
        alike = len({(p.kind, p.shape[1:], p.scale.dtype, p.zero is None) for p in parts}) == 1
        if len(parts) < 2 or not alike:
            continue
        for _, key in rows:
            del left[key]
        nodes = [node for node, _ in rows]
        weight = op.constant(np.concatenate([node.input_value(1).get_node().data for node in nodes]))
        name = "+".join(key for _, key in rows)
        weight.set_friendly_name(name)
        left[name] = join_packed(parts)
        whole = op.matmul(nodes[0].input_value(0), weight, False, True)
        sizes = np.array([p.shape[0] for p in parts], dtype=np.int64)
        split = op.variadic_split(whole, op.constant(np.array(-1, dtype=np.int64)), op.constant(sizes))
        for number, node in enumerate(nodes):
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(split.output(number))
    return left


def join_packed(parts: list[Packed]) -> Packed:
    """The rows of several weights, whose groups and kinds are alike, as one weight."""
    zeros = [p.zero for p in parts if p.zero is not None]
    return replace(
        parts[0],
        data=np.concatenate([p.data for p in parts]),
        shape=(sum(p.shape[0] for p in parts), *parts[0].shape[1:]),
        scale=np.concatenate([p.scale for p in parts]),
        zero=np.concatenate(zeros) if zeros else None,
        weights=sum(p.weights for p in parts),
    )


def _by_input(graph: Any, packed: Mapping[str, Packed]) -> dict[Any, list[tuple[Any, str]]]:
    """{input: [(product, key in `packed`)]}: x W^T with a weight that is used once and fills whole bytes."""
    found: dict[Any, list[tuple[Any, str]]] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
            continue
        source, weight = node.input_value(0), node.input_value(1)
        key = key_of(weight.get_node(), packed)
        if key is None or not node.get_attributes()["transpose_b"] or len(weight.get_target_inputs()) > 1:
            continue
        rows, groups, width = packed[key].shape
        if packed[key].kind != "i8" and (rows * groups * width % 2 or rows * groups % 2):
            continue  # half a byte would be left between two weights
        place = (source.get_node().get_friendly_name(), source.get_index())
        found.setdefault(place, []).append((node, key))
    return found
