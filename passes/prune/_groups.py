"""Which rows and columns go together: dependency groups of MLP channels and attention heads (arXiv 2301.12900).

The groups come from the anatomy, because tracing never ends on queries and keys under a rotary embedding and errs on
grouped-query attention. MLP groups, where tracing is right, are held against torch-pruning's DependencyGraph
(`traced`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ...compress.anatomy import AttentionGeometry, MlpGeometry, ModelView, Unit

Axis = Literal["out", "in"]  # rows (and bias) of a linear, or its columns
Keep = dict[tuple[str, Axis], Tensor]  # (path of a linear, axis) -> indices that stay, ascending
Cuts = dict[tuple[str, int], Tensor]  # (name of a parameter or buffer, dimension) -> indices that stay


@dataclass(frozen=True)
class Target:
    """What is to become narrower in one unit.

    Attributes:
        kind: ``mlp`` (`size` channels stay) or ``heads`` (`size` query heads stay).
        groups: for heads, how many key-value heads stay; 0 for an MLP.
        cross: the heads are those of the cross-attention.
    """

    unit: Unit
    kind: Literal["mlp", "heads"]
    size: int
    groups: int = 0
    cross: bool = False

    @property
    def key(self) -> str:
        """The target's name among those of its unit."""
        return "cross" if self.cross else self.kind

    @property
    def attention(self) -> AttentionGeometry:
        """The attention whose heads go."""
        geometry = self.unit.cross_attention if self.cross else self.unit.attention
        assert geometry is not None
        return geometry

    @property
    def units(self) -> int:
        """Channels or query heads before."""
        return mlp_of(self.unit).width if self.kind == "mlp" else self.attention.n_heads

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears that change."""
        return tuple(dict.fromkeys(path for path, _ in self.keep(self.first())))

    @property
    def reader(self) -> str:
        """The linear that reads what is removed: its input is what importance is measured on."""
        return mlp_of(self.unit).down if self.kind == "mlp" else self.attention.o

    def first(self) -> list[int]:
        """Some legal choice: the first channels, or the first query heads of the first groups."""
        if self.kind == "mlp":
            return list(range(self.size))
        geometry = self.attention
        before, after = geometry.n_heads // geometry.n_kv_heads, self.size // self.groups
        return [group * before + head for group in range(self.groups) for head in range(after)]

    def keep(self, chosen: Sequence[int]) -> Keep:
        """Indices that stay in every linear of the group.

        Args:
            chosen: channels, or query heads, that stay; ascending. Query heads come in whole key-value groups or in
                equal number from each group.
        """
        if self.kind == "mlp":
            return mlp_group(mlp_of(self.unit), chosen)
        return head_group(self.attention, chosen)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Path of each linear of the group -> (out_features, in_features) afterwards."""
        keep = self.keep(self.first())
        found = {}
        for ref in self.unit.linears:
            if ref.path in self.paths:
                out, into = keep.get((ref.path, "out")), keep.get((ref.path, "in"))
                rows = ref.module.out_features if out is None else len(out)
                found[ref.path] = (rows, ref.module.in_features if into is None else len(into))
        return found


def mlp_of(unit: Unit) -> MlpGeometry:
    """The unit's MLP geometry, which `Target`'s maker has checked to be there."""
    assert unit.mlp is not None
    return unit.mlp


def attention_of(unit: Unit) -> AttentionGeometry:
    """The unit's attention geometry, which `Target`'s maker has checked to be there."""
    assert unit.attention is not None
    return unit.attention


def mlp_group(mlp: MlpGeometry, chosen: Sequence[int]) -> Keep:
    """Channel j of an MLP: row j of gate and up (of both halves where they are fused), column j of down."""
    index = torch.tensor(list(chosen), dtype=torch.long)
    group: Keep = {(mlp.down, "in"): index}
    if mlp.fused:
        group[mlp.up, "out"] = torch.cat([index, index + mlp.width])
        return group
    for path in (mlp.gate, mlp.up):
        if path is not None:
            group[path, "out"] = index
    return group


def head_group(attention: AttentionGeometry, chosen: Sequence[int]) -> Keep:
    """Query heads with the key-value heads that they read: rows of q, k and v, columns of o, `head_dim` each."""
    share = attention.n_heads // attention.n_kv_heads
    queries = _spread(chosen, attention.head_dim)
    pairs = _spread(sorted({head // share for head in chosen}), attention.head_dim)
    group: Keep = {(attention.o, "in"): queries}
    if attention.qkv is not None:
        first = attention.n_heads * attention.head_dim
        second = first + attention.n_kv_heads * attention.head_dim
        group[attention.qkv, "out"] = torch.cat([queries, pairs + first, pairs + second])
        return group
    assert attention.q is not None and attention.k is not None and attention.v is not None
    return group | {(attention.q, "out"): queries, (attention.k, "out"): pairs, (attention.v, "out"): pairs}


def _spread(heads: Sequence[int], width: int) -> Tensor:
    """The channels of heads that are `width` channels wide."""
    starts = torch.tensor(list(heads), dtype=torch.long) * width
    return (starts[:, None] + torch.arange(width)).flatten()


def tensors_of(keep: Keep, names: Container[str]) -> Cuts:
    """The same choice for the tensors of the linears: rows cut the bias, too, where `names` holds one."""
    cuts: Cuts = {}
    for (path, axis), index in keep.items():
        cuts[f"{path}.weight", 0 if axis == "out" else 1] = index
        if axis == "out" and f"{path}.bias" in names:
            cuts[f"{path}.bias", 0] = index
    return cuts


@torch.no_grad()
def cut(model: nn.Module, cuts: Cuts) -> None:
    """Take everything out of the named parameters and buffers that does not stay; ties hold, new ones are contiguous.

    Linears learn their new widths; other modules learn theirs from `_shapes.take_on`.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    by_tensor: dict[str, dict[int, Tensor]] = {}
    for (name, dim), index in cuts.items():
        by_tensor.setdefault(name, {})[dim] = index
    for shared in names.values():
        wanted: dict[int, Tensor] = {}
        for name in shared:
            wanted |= by_tensor.get(name, {})
        if not wanted:
            continue
        old = new = _tensor(model, shared[0])
        for dim, index in wanted.items():
            new = new.index_select(dim, index.to(new.device))
        new = new.detach().contiguous()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for name in shared:
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, key, new)
            if isinstance(module, nn.Linear) and key == "weight":
                module.out_features, module.in_features = new.shape


def empty_linear(linear: nn.Linear, shape: Sequence[int], bias: bool = False) -> None:
    """New weights of this shape that hold zeros; `bias`: with one, even where there was none."""
    like = linear.weight
    linear.weight = nn.Parameter(torch.zeros(*shape, dtype=like.dtype, device=like.device), like.requires_grad)
    if bias or linear.bias is not None:
        linear.bias = nn.Parameter(torch.zeros(shape[0], dtype=like.dtype, device=like.device), like.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    found = getattr(model.get_submodule(path), key)
    assert isinstance(found, Tensor)
    return found


# ------------------------------------------------------------------------------------------------------------- tracing


def traced(view: ModelView, batch: Mapping[str, Any], path: str, channel: int = 0) -> set[tuple[str, Axis, int]]:
    """The group that torch-pruning finds around output `channel` of the linear at `path`: (path, axis, index).

    Only for MLP linears. Traces a forward pass of one sample with its graph; no weight and no flag is changed.

    Raises:
        Exception: whatever stops the trace, of many kinds.
    """
    failure: Exception | None = None
    for inputs in _samples(view, batch):
        try:
            return _trace(view.model, inputs, path, channel)
        except Exception as error:  # the tracer and the models raise whatever they like; the next sample may do
            failure = error
    assert failure is not None
    raise failure


def _samples(view: ModelView, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One sample to trace with: text alone where a language model takes that, one row, the whole batch."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    rows = len(tensors["labels"]) if "labels" in tensors else 1
    found: list[dict[str, Any]] = [{k: v[:1] if len(v) == rows else v for k, v in tensors.items()}, tensors]
    if "input_ids" in tensors and not view.family.seq2seq:
        ids = tensors["input_ids"][0][view.token_masks(batch).text[0]]
        found.insert(0, {"input_ids": ids[None]})
    return found


def _trace(model: nn.Module, inputs: dict[str, Any], path: str, channel: int) -> set[tuple[str, Axis, int]]:
    import torch_pruning as tp

    names = {id(module): name for name, module in model.named_modules()}
    forward: Callable[..., Any] = lambda m, x: m(**x, use_cache=False)  # noqa: E731
    with torch.no_grad():
        forward(model, inputs)  # raises before anything is traced; and transformers hangs up hooks of its own at first
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    hooks = [(h, set(h)) for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks)]
    try:
        for parameter in flags:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                model, example_inputs=inputs, forward_fn=forward, output_transform=lambda out: out.logits, verbose=False
            )
        linear = model.get_submodule(path)
        group = graph.get_pruning_group(linear, tp.prune_linear_out_channels, idxs=[channel])
        members: set[tuple[str, Axis, int]] = set()
        for dependency, indices in group:
            name = names.get(id(dependency.target.module))
            if name is not None:  # the rest are element-wise operations between the layers
                axis: Axis = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
                members |= {(name, axis, int(i)) for i in indices}
        return members
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for registered, before in hooks:  # a trace that fails leaves its hooks behind
            for key in set(registered) - before:
                del registered[key]
