"""From torch modules to OpenVINO graphs, with OpenVINO's own converter.

The anatomy says which modules become graphs: the vision tower, each loose connector, the token embedding, the decoder
with its KV cache as state, and the head. What lies between them (placing visual tokens, position ids, masks) stays the
model's own code, so no family needs code of its own here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...anatomy import ModelView
from ...errors import Unmet, WorkFailed
from ..activations import installed
from ..codebook import integer_grids
from ..rules import blocks_of, rule_of
from .constants import Counts, compress_constants, pack_constants
from .gelu import exact_gelu
from .joined import join_products

MASKED = -1e9  # added to scores of tokens that must not be seen; finite, so that a row that sees nothing is no NaN
KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_position")
EMBEDDING, LANGUAGE, HEAD = ":embedding", ":language", ":head"  # graphs; others go by the path of their module


@dataclass
class Call:
    """How the model's own code calls a module: the places of its tensors, everything else as it was.

    Attributes:
        spec: pytree of (args, kwargs). leaves: what is no tensor; None at the places of tensors. shapes: of one
            picture, by tensor, the batch dimension left out.
        result: pytree of the output. used: which of its leaves the model reads.
    """

    spec: Any
    leaves: list[Any]
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    result: Any = None
    used: tuple[int, ...] = ()
    count: int = 0

    @property
    def places(self) -> list[int]:
        return [i for i, leaf in enumerate(self.leaves) if leaf is None]

    def arguments(self, tensors: tuple[Tensor, ...]) -> tuple[tuple, dict]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)

    def tensors(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
        return [leaf for leaf in tree_flatten((args, dict(kwargs)))[0] if isinstance(leaf, Tensor)]

    def output(self, tensors: list[Tensor]) -> Any:
        leaves: list[Any] = [None] * self.count
        for place, tensor in zip(self.used, tensors):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.result)


class _Reached(Exception):
    """The decoder was reached: nothing after it is of interest."""


@dataclass
class Seen:
    """What one forward of the example showed: calls by module path, and the decoder's arguments."""

    calls: dict[str, Call]
    examples: dict[str, tuple[Tensor, ...]]
    decoder: dict[str, Any]


def image_modules(view: ModelView) -> list[str]:
    """Paths of the modules between pixels and visual tokens that are converted: the tower and the loose connectors.

    Raises:
        Unmet: a connector is a stack of blocks beside the tower, or the language model is an encoder-decoder.
    """
    if view.family.seq2seq:
        raise _refused(view, "its language model is an encoder-decoder: the runtime holds one decoder with one cache")
    if any(not rule_of(block).plain for block in blocks_of(view.model).values()):
        raise _refused(view, "its blocks treat visual tokens differently, which one graph of the decoder does not")
    paths = [view.tower_path]
    for unit in view.parts.get("connector", ()):
        if unit.path.startswith(f"{view.tower_path}."):
            continue
        if unit.tokens != "image":
            raise _refused(view, f"its {unit.path} works on text, too, before the decoder does")
        if unit.index is not None:
            raise _refused(view, f"its connector {unit.path} is a stack of blocks with queries of its own")
        paths.append(unit.path)
    return paths


def observe(view: ModelView, batch: Mapping[str, Tensor]) -> Seen:
    """Run `batch` up to the decoder and note how the tower, the connectors and the decoder are called.

    Raises:
        Unmet: the family cannot be converted; the message names it and says why.
    """
    paths = image_modules(view)
    seen = Seen({}, {}, {})
    leaves: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    handles: list[Any] = []

    def note(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            flat, spec = tree_flatten((args, kwargs))
            call = Call(spec, [None if isinstance(leaf, Tensor) else leaf for leaf in flat])
            tensors = tuple(leaf.detach() for leaf in flat if isinstance(leaf, Tensor))
            if path in seen.calls:
                raise _refused(view, f"it calls {path} more than once for a batch")
            if not tensors or len({len(t) for t in tensors}) != 1 or (path == paths[0] and tensors[0].ndim != 4):
                raise _refused(
                    view, f"{path} takes pictures of any size in one row, which a traced graph cannot follow"
                )
            call.shapes = [tuple(t.shape[1:]) for t in tensors]
            out, call.result = tree_flatten(output)
            call.count = len(out)
            fresh = [leaf.detach().clone().requires_grad_() if _floating(leaf) else leaf for leaf in out]
            leaves[path], inputs[path] = fresh, [leaf for leaf in flat if isinstance(leaf, Tensor)]
            seen.calls[path], seen.examples[path] = call, tensors
            return tree_unflatten(fresh, call.result)

        return hook

    def reached(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.decoder = dict(kwargs)
        raise _Reached

    handles += [view.model.get_submodule(p).register_forward_hook(note(p), with_kwargs=True) for p in paths]
    handles.append(view.decoder.register_forward_pre_hook(reached, with_kwargs=True, prepend=True))
    try:
        with torch.enable_grad():
            view.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=True)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    _check_decoder(view, seen.decoder)
    for number, (path, tensors) in enumerate(leaves.items()):
        readers = [t for later in list(inputs.values())[number + 1 :] for t in later if t.requires_grad]
        total = sum((t.sum() for t in [*readers, seen.decoder["inputs_embeds"]]), torch.zeros(()))
        asked = [i for i, leaf in enumerate(tensors) if _floating(leaf)]
        grads = torch.autograd.grad(total, [tensors[i] for i in asked], allow_unused=True, retain_graph=True)
        seen.calls[path].used = tuple(i for i, grad in zip(asked, grads) if grad is not None)
        if not seen.calls[path].used:
            raise _refused(view, f"nothing that {path} returns reaches the decoder")
    missing = [path for path in paths if path not in seen.calls]
    if missing:
        raise _refused(view, f"its forward does not call {', '.join(missing)} as a module")
    return seen


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _check_decoder(view: ModelView, given: Mapping[str, Any]) -> None:
    if given.get("inputs_embeds") is None:
        raise _refused(view, "its decoder is not given inputs_embeds by name")
    more = [k for k, v in given.items() if k not in KNOWN and isinstance(v, (Tensor, list, tuple)) and len(v)]
    if more:
        raise _refused(view, f"its decoder is also given {', '.join(more)}")
    kinds = set(getattr(view.decoder.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _refused(view, f"its decoder has layers of {', '.join(sorted(kinds))}, whose state is no KV cache")


def _refused(view: ModelView, reason: str) -> Unmet:
    return Unmet(
        f"the openvino runtime cannot run {view.family.name}",
        where=type(view.model).__name__,
        found=reason,
        change='svlm.load(OUT) runs it in torch; runtime="openvino" is for decoders that take inputs_embeds',
    )


# -------------------------------------------------------------------------------------------------------- the wrappers


def _forward(inner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, without what hangs on the module, but with its input rounded where it is."""
    rounding = installed(inner)
    if rounding is not None:
        args = (rounding.round(args[0]), *args[1:])
    return type(inner).forward(inner, *args, **kwargs)


class Image(nn.Module):
    """A tower or connector as a function of tensors alone; returns those outputs that the model reads."""

    def __init__(self, inner: nn.Module, call: Call) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.call.arguments(tensors)
        out = tree_flatten(_forward(self.inner, *args, **kwargs))[0]
        return tuple(out[i] for i in self.call.used)


class Rows(nn.Module):
    """An embedding or a head: one tensor in, one out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: Tensor) -> Tensor:
        return _forward(self.inner, rows)


class Decoder(nn.Module):
    """The decoder with its cache as tensors.

    Takes embeddings [B, q, D], position ids, additive masks [B, 1, q, past + q] (one for each kind of layer), then keys
    and values of every layer; returns hidden states and the grown keys and values.
    """

    def __init__(self, inner: nn.Module, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.kinds = inner, kinds

    def forward(self, embeds: Tensor, positions: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        masks, past = rest[: max(1, len(self.kinds))], rest[max(1, len(self.kinds)) :]
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2]):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        mask: Any = dict(zip(self.kinds, masks)) if self.kinds else masks[0]
        hidden = (
            type(self.inner)
            .forward(
                self.inner,
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            .last_hidden_state
        )
        grown = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (hidden, *grown)


# ------------------------------------------------------------------------------------------------------ the conversion


def convert_part(
    view: ModelView, module: nn.Module, path: str, example: tuple[Tensor, ...], *, join: bool = False
) -> tuple[Any, Counts]:
    """Convert a wrapper whose `inner` is the module at `path`, with svlm's integers put in.

    Args:
        join: make products of the same input one, which pays where there is one token at a time.

    Raises:
        WorkFailed: OpenVINO's converter fails, or a weight that lies on a grid ended up as floats.
    """
    import openvino as ov

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", torch.jit.TracerWarning
            )  # shapes are fixed; ranges round by another formula
            graph = ov.convert_model(module, example_input=example)
    except Exception as error:
        raise WorkFailed(
            "OpenVINO cannot convert a part of the model",
            where=path,
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            change="svlm.load(OUT) runs it in torch",
        ) from error
    prefix = f"{path}." if path else ""
    grids = integer_grids(view.grids)  # codes run dequantized
    mine = {p: p.removeprefix(prefix) if p != path else "" for p in grids if p == path or p.startswith(prefix)}
    names = {p: f"inner.{rest}.weight".replace("..", ".") for p, rest in mine.items()}
    packed = {name: pack_constants(view.weight(p).detach(), grids[p]) for p, name in names.items()}
    if join:
        packed = join_products(graph, packed)
    counts = compress_constants(graph, packed, view.storage_dtype)
    exact_gelu(graph)
    counts.static = sum(node.get_type_name() == "FakeQuantize" for node in graph.get_ops())
    kinds = {p: activation.kind for p, activation in view.activations.items() if p in names}
    counts.token = sum(kind == "token" and names[p] not in counts.missed for p, kind in kinds.items())
    shapes = {tuple(n.get_output_shape(0)) for n in graph.get_ops() if n.get_type_name() == "Constant"}
    for p, name in names.items():
        if name in counts.missed and tuple(view.weight(p).shape) in shapes and _held(graph, view, p):
            raise WorkFailed("a weight on a grid became floats in the graph", where=p, found=name)
    return graph, counts


def _held(graph: Any, view: ModelView, path: str) -> bool:
    weight = view.weight(path).detach().float()
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and tuple(node.get_output_shape(0)) == tuple(weight.shape):
            raw = node.get_element_type().get_type_name()
            if raw == "f32" and torch.equal(torch.from_numpy(node.data.copy()), weight):
                return True
    return False


def fix_shapes(graph: Any, shapes: list[list[int]]) -> None:
    """Set the shapes of the inputs; -1 is any."""
    import openvino as ov

    graph.reshape({port: ov.PartialShape(shape) for port, shape in zip(graph.inputs, shapes)})


def make_stateful(graph: Any, first: int) -> None:
    """Turn inputs from `first` on, and the outputs after the first, into state that a beam index reorders."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = op.parameter([-1], ov.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().add_names({"beam_idx"})
    graph.add_parameters([beam])
    pairs = {}
    zero = op.constant(np.array(0, dtype=np.int64))
    ports = [port for port in graph.inputs[first:] if "beam_idx" not in port.get_names()]
    for number, (port, result) in enumerate(zip(ports, graph.outputs[1:])):
        port.get_tensor().set_names({f"past.{number}"})
        result.get_tensor().set_names({f"present.{number}"})
        readers = list(port.get_target_inputs())
        gathered = op.gather(port, beam, zero)
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
        pairs[f"past.{number}"] = f"present.{number}"
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, pairs)
    rows = op.gather(op.shape_of(graph.inputs[0], "i64"), op.constant(np.array([0], dtype=np.int64)), zero)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            dims = node.get_output_partial_shape(0)
            tail = op.constant(np.array([dims[1].get_length(), 0, dims[3].get_length()], dtype=np.int64))
            empty = op.broadcast(op.constant(np.float32(0)), op.concat([rows, tail], 0))
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()


def convert_decoder(view: ModelView, embeds: Tensor, positions: Tensor, kinds: tuple[str, ...]) -> tuple[Any, Counts]:
    """The decoder as a stateful graph.

    Args:
        embeds: [B, q, D] and positions [..., B, q] of an example, q at least 4. kinds: of its layers' masks.

    Returns:
        The graph, and what became of its constants.
    """
    wrapper = Decoder(view.decoder, kinds)
    masks = max(1, len(kinds))
    rows, past, new = embeds.shape[0], 2, 2
    with torch.no_grad():
        first = [torch.full((rows, 1, past, past), MASKED).triu(1)] * masks
        cached = wrapper(embeds[:, :past], positions[..., :past], *first)[1:]
        then = [torch.full((rows, 1, new, past + new), MASKED).triu(past + 1)] * masks
        example = (embeds[:, past : past + new], positions[..., past : past + new], *then, *cached)
    graph, counts = convert_part(view, wrapper, view.decoder_path, tuple(t.contiguous() for t in example), join=True)
    lead = list(positions.shape[:-2])
    shapes = [[-1, -1, embeds.shape[2]], [*lead, -1, -1]] + [[-1, 1, -1, -1]] * masks
    shapes += [[-1, t.shape[1], -1, t.shape[3]] for t in cached]
    fix_shapes(graph, shapes)
    make_stateful(graph, 2 + masks)
    return graph, counts
