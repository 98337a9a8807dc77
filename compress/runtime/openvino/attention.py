"""Attention over whole pictures: a vision tower's graph for pictures without empty places.

Towers that take pictures of any shape are told which patches are there, and usually all are. Attention has no mask to
read then, and can be spelled out as products around a softmax, which OpenVINO runs as one kernel without laying the
keys out anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def of_whole_pictures(graph: Any) -> Any:
    """A copy of `graph` that gives the same where all of its boolean inputs are true; None where it would be no other.

    Its inputs are the same.
    """
    copy = graph.clone()
    seen = _seen(graph.clone())
    return copy if spell_out(copy, seen) else None


def spell_out(graph: Any, seen: list[bool]) -> int:
    """Replace, in place, attention that is not causal by what it computes; how many.

    Args:
        seen: of each attention in the graph, in its order, whether its mask hides nothing.
    """
    from openvino import opset13 as op

    count = 0
    for node, all_seen in zip(_attention(graph), seen, strict=True):
        inputs = [node.input_value(i) for i in range(node.get_input_size())]
        query, key, value = inputs[:3]
        width = query.get_partial_shape()[-1]
        scale = _constant(inputs[4]) if len(inputs) > 4 else None
        if not all_seen or node.get_attributes()["causal"] or width.is_dynamic or (len(inputs) > 4 and scale is None):
            continue
        factor = np.float32(width.get_length() ** -0.5 if scale is None else scale.item())
        scores = op.matmul(op.multiply(query, op.constant(factor)), key, False, True)
        answer = op.matmul(op.softmax(scores, -1), value, False, False)
        node.output(0).replace(_rounded_before(node, answer).output(0))
        count += 1
    graph.validate_nodes_and_infer_types()
    return count


def _attention(graph: Any) -> list[Any]:
    return [node for node in graph.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]


def _seen(graph: Any) -> list[bool]:
    """Of each attention whether all is seen where all boolean inputs are true; `graph` is of no use afterwards."""
    import openvino as ov

    parameters = graph.get_parameters()
    filled = [np.ones(list(p.get_output_shape(0)), dtype=p.get_element_type().to_dtype()) for p in parameters]
    seen: list[bool] = []
    known: dict[tuple[str, int], bool] = {}  # of a mask that several blocks share
    for node in _attention(graph):
        if node.get_input_size() == 3:
            seen.append(True)
            continue
        port = node.input_value(3)
        key = (port.get_node().get_name(), port.get_index())
        if key not in known:
            known[key] = all(p.get_element_type() == ov.Type.boolean for p in _read(port))
            if known[key]:
                mask = ov.Core().compile_model(ov.Model([port], parameters, "mask"), "CPU")
                values = mask.create_infer_request().infer(filled)[0]
                known[key] = bool(values.all() if values.dtype == bool else not values.any())
        seen.append(known[key])
    return seen


def _read(port: Any) -> list[Any]:
    """The graph's inputs whose values `port` is made of; their shapes, which stand, do not count."""
    found, left, met = [], [port.get_node()], set()
    while left:
        node = left.pop()
        if node.get_name() in met or node.get_type_name() == "ShapeOf":
            continue
        met.add(node.get_name())
        if node.get_type_name() == "Parameter":
            found.append(node)
        left += [node.input_value(i).get_node() for i in range(node.get_input_size())]
    return found


def _rounded_before(node: Any, answer: Any) -> Any:
    """`answer`, rounded as what only lays it out anew is rounded afterwards, which is then not rounded again."""
    from openvino import opset13 as op

    after = node
    while True:
        readers = [target.get_node() for target in after.output(0).get_target_inputs()]
        if len(readers) != 1:
            return answer
        (after,) = readers
        if after.get_type_name() not in ("Transpose", "Reshape"):
            break
    limits = [_constant(after.input_value(i)) for i in range(1, 5)] if after.get_type_name() == "FakeQuantize" else []
    if not limits or any(limit is None or limit.size != 1 for limit in limits):
        return answer
    scalars = [op.constant(np.float32(limit.item())) for limit in limits if limit is not None]
    after.output(0).replace(after.input_value(0))
    return op.fake_quantize(answer, *scalars, after.get_attributes()["levels"])


def _constant(port: Any) -> np.ndarray | None:
    node = port.get_node()
    return node.data if node.get_type_name() == "Constant" else None
