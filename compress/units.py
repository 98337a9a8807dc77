"""Finding the units of a model: what its family's row says, made concrete on its modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import nn

from .blocks import LAYOUTS, Layout, Step
from .errors import ModelError
from .families import ADDED, PARTS, Family, Place
from .unknown import unknown_blocks, unplaced_linears


@dataclass(frozen=True)
class AttentionGeometry:
    """One attention: the paths of its linears (q, k, v, or one fused qkv) and its heads.

    `q.out_features == n_heads * head_dim`, `k.out_features == n_kv_heads * head_dim`; query head i reads key-value head
    `i // (n_heads // n_kv_heads)`. `module` is the attention module, where transformers keeps the head counts. What
    queries and keys pass through before their heads are split is at `q_norm` and `k_norm`.
    """

    module: str
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None
    o: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary: bool
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True)
class MlpGeometry:
    """One MLP: the paths of its linears (gate is None for a plain one, gate_up for a fused one) and its inner width."""

    gate: str | None
    up: str
    down: str
    width: int
    fused: bool = False


@dataclass(frozen=True, eq=False)
class LinearRef:
    """One linear of the model.

    Attributes:
        path: dotted name in the model.
        role: ``attn.q|k|v|qkv|o``, ``cross.q|k|v|o``, ``mlp.gate|up|down|gate_up`` or ``other``.
        stage: index into `unit.stages`; linears of a stage receive the same input tensor.
        norm: path of the norm whose output goes to this stage and nowhere else, or None.
    """

    path: str
    module: nn.Linear = field(repr=False)
    unit: Unit = field(repr=False)
    role: str
    stage: int
    norm: str | None


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of blocks that the model calls one after the other."""

    part: str
    path: str
    length: int


@dataclass(frozen=True, eq=False)
class Unit:
    """One block of a stack, or one loose module (a connector, a merger, the head).

    Attributes:
        name: ``vision.blocks[3]``, ``connector``, ``connector.language_projection``, ``head``.
        index: the number in ``part.blocks[index]``; None for a loose module.
        tokens: what the rows of its input are: ``image``, ``prompt``, ``sequence`` or ``all`` (see `families.Place`);
            `cross` is the same for the keys and values of cross-attention.
        entry: path of a norm whose output the first stage alone reads, as it is or with the channels of several
            positions side by side, or None; not one that `LinearRef.norm` names.
        matrix: path of the bare parameter [inputs, outputs] that reads it instead, or None.
        added: whether a pass put it onto the model; no config knows of it.
    """

    name: str
    part: str
    index: int | None
    path: str
    module: nn.Module = field(repr=False)
    stack: Stack | None = field(repr=False)
    tokens: str
    cross: str
    linears: tuple[LinearRef, ...] = field(default=(), repr=False)
    stages: tuple[tuple[LinearRef, ...], ...] = field(default=(), repr=False)
    attention: AttentionGeometry | None = None
    cross_attention: AttentionGeometry | None = None
    mlp: MlpGeometry | None = None
    entry: str | None = None
    matrix: str | None = None
    added: bool = False


def find_anchors(model: Any, family: Family, paths: Mapping[str, nn.Module]) -> dict[str, str]:
    """`@image` and `@decoder` as dotted paths."""
    names = {id(module): name for name, module in paths.items()}
    found = {}
    for anchor, place, way in (
        ("@image", family.tower, lambda: model.get_encoder(modality="image")),
        ("@decoder", family.decoder, lambda: model.get_decoder()),
    ):
        path = names.get(id(way()), "") if place == anchor else place
        if path not in paths or not path:
            raise ModelError(
                f"no {'vision tower' if anchor == '@image' else 'decoder'} found in {type(model).__name__}",
                where=f"family row '{family.name}'",
                found=f"'{place}'",
                change="give its dotted path in the row's 'tower' or 'decoder'",
            )
        found[anchor] = path
    return found


def _places(
    family: Family, place: Place, paths: Mapping[str, nn.Module], anchors: Mapping[str, str]
) -> tuple[str, list[str]]:
    """The path of the stack (or loose module), and the paths of its blocks."""
    path = place.path
    if path in anchors:
        if not place.stack:
            return anchors[path], [anchors[path]]
        path = _first_layers(anchors[path], paths) + ".*"
    path, found = _matching(path, paths, anchors)
    if not found and not place.optional:
        raise ModelError(
            f"the model has no module at '{place.path}'",
            where=f"family row '{family.name}', part {place.part}",
            change="correct the path in the row, or mark the place optional: true",
        )
    return path, found


def _matching(pattern: str, paths: Mapping[str, nn.Module], anchors: Mapping[str, str]) -> tuple[str, list[str]]:
    """`pattern` with its anchors filled in, and the modules that it matches, as the model registers them."""
    for anchor, name in anchors.items():
        pattern = pattern.replace(anchor, name)
    patterns = [re.compile(re.escape(p).replace(r"\*", "[^.]*")) for p in pattern.split("|")]
    return pattern, [name for name in paths if any(p.fullmatch(name) for p in patterns)]


def _norm_before(place: Place, paths: Mapping[str, nn.Module], anchors: Mapping[str, str]) -> str | None:
    """The norm outside a place that its first linears alone read, where the model has it."""
    found = _matching(place.entry, paths, anchors)[1] if place.entry else []
    return found[-1] if found else None


def _first_layers(root: str, paths: Mapping[str, nn.Module]) -> str:
    """The first list of transformer layers below `root`; transformers marks them as GradientCheckpointingLayer."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for name, module in paths.items():
        inside = name == root or name.startswith(root + ".")
        layers = isinstance(module, nn.ModuleList) and [
            isinstance(child, GradientCheckpointingLayer) for child in module
        ]
        if inside and layers and all(layers):
            return name
    raise ModelError(
        f"no list of transformer layers below '{root}'",
        found=type(paths[root]).__name__,
        change="add a place with the path of its blocks to an anatomy row (extends: the family; stack: true)",
    )


def find_units(
    model: Any,
    family: Family,
    paths: Mapping[str, nn.Module],
    anchors: Mapping[str, str],
    split: Collection[str] = (),
) -> tuple[Unit, ...]:
    """The units in forward order. In the blocks at `split`, keys and values are made of more tokens than queries are:
    they are a stage of their own, and the norm before them feeds two."""
    layouts = {**LAYOUTS, **family.blocks}
    resolved = [(place, *_places(family, place, paths, anchors)) for place in (*family.places, *ADDED)]
    strangers = {
        type(paths[name]).__name__: name
        for _, _, found in reversed(resolved)
        for name in reversed(found)
        if type(paths[name]).__name__ not in layouts
    }
    if strangers:
        raise unknown_blocks(model, family, {cls: (name, paths[name]) for cls, name in strangers.items()})
    own = resolved[: len(family.places)]
    sizes = {part: sum(len(f) for p, _, f in own if p.part == part) for part in PARTS}
    counts = dict.fromkeys(PARTS, 0)
    units = []
    for place, path, found in resolved:
        stack = Stack(place.part, path, len(found)) if place.stack else None
        for name in found:
            if stack is None:
                index = None
                alone = sizes[place.part] == 1 and place not in ADDED
                title = place.part if alone else f"{place.part}.{name.rsplit('.', 1)[-1]}"
            else:
                index = counts[place.part]
                counts[place.part] += 1
                title = f"{place.part}.blocks[{index}]"
            entry = _norm_before(place, paths, anchors)
            where = (place.part, index, name, paths[name], stack, place.tokens, place.cross)
            unit = Unit(title, *where, entry=entry, added=place in ADDED)
            _fill(unit, layouts[type(paths[name]).__name__], name in split)
            units.append(unit)
    _check_partition(family, paths, units)
    order = {part: i for i, part in enumerate(PARTS)}
    return tuple(sorted(units, key=lambda unit: order[unit.part]))


def _fill(unit: Unit, layout: Layout, split: bool = False) -> None:
    """Give the unit its linears, stages and geometry."""
    inside = {name: m for name, m in unit.module.named_modules() if isinstance(m, nn.Linear)}
    named = {path for step in layout.steps for _, path in step.linears}
    stray = sorted(set(inside) - named)
    if stray:
        raise unplaced_linears(unit.name, type(unit.module).__name__, [f"{unit.path}.{name}" for name in stray])
    norms_hold = layout.norms_if is None or bool(attrgetter(layout.norms_if)(unit.module))
    entry = f"{unit.path}.{layout.entry}" if layout.entry and not (layout.norms_if and norms_hold) else unit.entry
    stages: list[tuple[LinearRef, ...]] = []
    steps = [part for whole in layout.steps for part in (_apart(whole) if split else [whole])]
    for step in steps:
        norm = f"{unit.path}.{step.norm}" if step.norm and norms_hold else None
        refs = tuple(
            LinearRef(f"{unit.path}.{path}" if path else unit.path, inside[path], unit, role, len(stages), norm)
            for role, path in step.linears
            if path in inside
        )
        if refs:
            stages.append(refs)
    linears = tuple(ref for stage in stages for ref in stage)
    geometry = {
        "stages": tuple(stages),
        "linears": linears,
        "attention": _attention(unit, layout, linears, "attn"),
        "cross_attention": _attention(unit, layout, linears, "cross"),
        "mlp": _mlp(linears),
        "entry": entry,
        "matrix": f"{unit.path}.{layout.matrix}" if layout.matrix else None,
    }
    for name, value in geometry.items():
        object.__setattr__(unit, name, value)


def _apart(step: Step) -> list[Step]:
    """A step in two where it holds queries beside keys and values."""
    queries = tuple(pair for pair in step.linears if pair[0] == "attn.q")
    rest = tuple(pair for pair in step.linears if pair[0] != "attn.q")
    return [Step(queries), Step(rest)] if queries and rest else [step]


def _attention(unit: Unit, layout: Layout, linears: Sequence[LinearRef], kind: str) -> AttentionGeometry | None:
    by_role = {ref.role: ref for ref in linears if ref.role.startswith(kind + ".")}
    if not by_role or layout.head_dim is None:
        return None
    head_dim = int(attrgetter(layout.head_dim)(unit.module))
    out = by_role[f"{kind}.o"]
    fused = by_role.get(f"{kind}.qkv")
    heads = (fused or by_role[f"{kind}.q"]).module.out_features // head_dim
    if fused:
        # [queries, keys, values]: what is not a query head is half keys, half values
        heads = min(heads, out.module.in_features // head_dim)
        kv_heads = (fused.module.out_features // head_dim - heads) // 2
    else:
        kv_heads = by_role[f"{kind}.k"].module.out_features // head_dim
    paths = {
        part: by_role[f"{kind}.{part}"].path if f"{kind}.{part}" in by_role else None for part in ("q", "k", "v", "qkv")
    }
    names = layout.qk_norms if kind == "attn" else ()
    norms = {key: f"{unit.path}.{name}" for key, name in zip(("q_norm", "k_norm"), names)}
    first = paths["qkv"] or paths["q"]
    assert first is not None
    return AttentionGeometry(
        module=first.rpartition(".")[0],
        o=out.path,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=layout.rotary and kind == "attn",
        **paths,
        **norms,
    )


def _mlp(linears: Sequence[LinearRef]) -> MlpGeometry | None:
    by_role = {ref.role: ref for ref in linears}
    down, up, gate = by_role.get("mlp.down"), by_role.get("mlp.up"), by_role.get("mlp.gate")
    fused = by_role.get("mlp.gate_up")
    if down is None or (up is None and fused is None):
        return None
    width = down.module.in_features
    if fused is not None:
        return MlpGeometry(fused.path, fused.path, down.path, width, fused=True)
    assert up is not None
    return MlpGeometry(gate.path if gate else None, up.path, down.path, width)


def _check_partition(family: Family, paths: Mapping[str, nn.Module], units: Sequence[Unit]) -> None:
    """Every nn.Linear in exactly one unit, or ignored with a reason."""
    seen: dict[str, str] = {}
    for unit in units:
        for ref in unit.linears:
            if ref.path in seen:
                raise ModelError(
                    f"two units hold the same linear: {seen[ref.path]} and {unit.name}",
                    where=f"family row '{family.name}'",
                    found=ref.path,
                )
            seen[ref.path] = unit.name
    stray = [
        name
        for name, module in paths.items()
        if isinstance(module, nn.Linear)
        and name not in seen
        and not any(fnmatchcase(name, pattern) for pattern in family.ignored)
    ]
    if stray:
        raise unplaced_linears("", f"family row '{family.name}'", stray)
