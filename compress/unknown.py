"""What svlm says about a model that no row fits: what it saw, and a row to start from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .blocks import LAYOUTS
from .errors import ModelError
from .families import Family

_ROLES = (
    (r"(c_attn|qkv|qkv_proj|query_key_value)$", "qkv"),
    (r"(q|q_proj|query|query_proj|wq|q_lin)$", "q"),
    (r"(k|k_proj|key|key_proj|wk|k_lin)$", "k"),
    (r"(v|v_proj|value|value_proj|wv|v_lin)$", "v"),
    (r"(gate_proj|w1|wi_0|gate)$", "gate"),
    (r"(up_proj|fc1|linear_fc1|w3|wi_1|wi|c_fc|intermediate\.dense|lin1|up|dense_h_to_4h)$", "up"),
    (r"(down_proj|fc2|linear_fc2|w2|lin2|down|dense_4h_to_h)$", "down"),
)
_OUT = r"(o|o_proj|out_proj|proj|projection|out|wo|out_lin|output\.dense|dense)$"


def unknown_family(model: Any, source: str) -> ModelError:
    """No row serves this `config.model_type`."""
    config = model.config
    return ModelError(
        f"svlm has no anatomy row for the model type '{config.model_type}' ({type(model).__name__})",
        where=source,
        found="\n" + _indent(_tree(model)),
        change=_advice(draft_row(model)),
    )


def unknown_blocks(model: Any, family: Family, strangers: Mapping[str, tuple[str, nn.Module]]) -> ModelError:
    """The row fits, but svlm does not know what is inside some of the blocks."""
    inside = {cls: ", ".join(_linears(module)) or "no linears" for cls, (_, module) in strangers.items()}
    seen = [f"{cls} at {path}: {inside[cls]}" for cls, (path, _) in strangers.items()]
    row = {
        "extends": family.name,
        "blocks": {cls: draft_layout(module) for cls, (_, module) in strangers.items()},
    }
    return ModelError(
        f"svlm does not know the block class {', '.join(strangers)}",
        where=f"{type(model).__name__}, family '{family.name}'",
        found="\n" + _indent("\n".join(seen)),
        change=_advice(row),
    )


def unplaced_linears(unit: str, where: str, paths: Sequence[str]) -> ModelError:
    """Linears that neither a place nor a layout nor `ignored` names."""
    shown = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
    return ModelError(
        f"{len(paths)} linear layers belong to no stage" + (f" of {unit}" if unit else " of any unit"),
        where=where,
        found=shown,
        change="add them to the row's places or blocks, or to 'ignored' with the reason "
        "(extends: the family, in a file given by --anatomy)",
    )


def _advice(row: Mapping[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(dict(row), sort_keys=False, width=110, default_flow_style=None)
    return (
        "check this row, above all the order of the steps, save it as row.yaml and give it with --anatomy row.yaml:\n"
        + _indent(text.rstrip())
    )


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _linears(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def _tree(model: nn.Module) -> str:
    """Modules to depth 2, and every list of modules with its blocks' class."""
    lines = [f"{type(model).__name__}, model_type {model.config.model_type}"]  # type: ignore[union-attr]
    for name, module in model.named_modules():
        if name and name.count(".") < 2:
            lines.append(f"{'  ' * (name.count('.') + 1)}{name}: {type(module).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            classes = ", ".join(dict.fromkeys(type(child).__name__ for child in module))
            lines.append(f"  list {name}: {len(module)} x {classes}")
    return "\n".join(lines)


def draft_row(model: Any) -> dict[str, Any]:
    """A first row for a model of an unknown kind, by names alone: lists of modules, and linears outside of them."""
    names = {id(module): name for name, module in model.named_modules()}
    tower = names.get(id(model.get_encoder(modality="image")), "")
    decoder = names.get(id(model.get_decoder()), "")
    head = model.get_output_embeddings()
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _linears(module) and not isinstance(module[0], nn.Linear)
    }
    stacks = [n for n in lists if not any(n.startswith(other + ".") for other in lists)]
    places, blocks = [], {}
    for name in stacks:
        part = "vision" if _below(name, tower) else "language" if _below(name, decoder) else "connector"
        tokens = "sequence" if part == "language" else "image"
        path, children = f"{name}.*", list(lists[name].children())
        while isinstance(children[0], nn.ModuleList):  # lists of lists: stages of blocks
            path, children = f"{path}.*", [child for inner in children for child in inner.children()]
        places.append({"part": part, "path": path, "stack": True, "tokens": tokens})
        for child in children:
            if type(child).__name__ not in LAYOUTS:
                blocks[type(child).__name__] = draft_layout(child)
    for name in _loose(model, stacks, (tower, decoder)):
        module = model.get_submodule(name)
        between = re.search(r"merger|project|connect|adapter|resampler|qformer", name.rsplit(".", 1)[-1].lower())
        inside = "vision" if _below(name, tower) else "language" if _below(name, decoder) else "connector"
        part = "head" if module is head else "connector" if between else inside
        tokens = "sequence" if part in ("head", "language") else "image"
        places.append({"part": part, "path": name, "tokens": tokens})
        if type(module).__name__ not in LAYOUTS:
            blocks[type(module).__name__] = draft_layout(module)
    order = ["vision", "connector", "language", "head"]
    row: dict[str, Any] = {"name": model.config.model_type, "model_types": [model.config.model_type]}
    row["tower"] = tower or "THE DOTTED PATH OF THE VISION TOWER"
    row["decoder"] = decoder or "THE DOTTED PATH OF THE DECODER"
    row["places"] = sorted(places, key=lambda place: order.index(place["part"]))
    token = [n for n in ("image_token_id", "image_token_index") if n in {**model.config.to_dict()}]
    row["image_tokens"] = token[:1]
    if blocks:
        row["blocks"] = blocks
    return row


def _below(name: str, root: str) -> bool:
    return bool(root) and (name == root or name.startswith(root + "."))


def _loose(model: nn.Module, stacks: Sequence[str], roots: Sequence[str]) -> list[str]:
    """The outermost modules that hold linears outside of every stack, and neither a stack nor a tower."""
    busy = [*stacks, *(root for root in roots if root)]
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(_below(name, done) for done in [*found, *stacks]):
            continue
        if _linears(module) and not any(_below(other, name) for other in busy):
            found.append(name)
    return found


def draft_layout(module: nn.Module) -> dict[str, Any]:
    """Steps in the order of registration, roles guessed by name; q, k, v and gate, up share a step."""
    steps: list[dict[str, Any]] = []
    for name in _linears(module):
        role = _role(name)
        last = steps[-1]["linears"] if steps else {}
        family = {"q", "k", "v"} if role.split(".")[-1] in "qkv" else {"gate", "up"}
        joins = role != "other" and role.split(".")[-1] in family
        same = last and all(r.split(".")[0] == role.split(".")[0] and r.split(".")[-1] in family for r in last)
        if joins and same and role not in last:
            last[role] = name
        else:
            steps.append({"norm": None, "linears": {role: name}})
    for step in steps:
        step["linears"] = dict(sorted(step["linears"].items(), key=lambda pair: _rank(pair[0])))
    return {"steps": _outputs_last(steps)}


def _rank(role: str) -> int:
    return "qkvgu".find(role.split(".")[1][0]) if "." in role else 0


def _role(name: str) -> str:
    kind = "cross" if re.search(r"cross|encoder_attn|encdec", name.lower()) else "attn"
    for pattern, role in _ROLES:
        if re.search(r"(^|\.)" + pattern, name):
            return f"{'mlp' if role in ('gate', 'up', 'down') else kind}.{role}"
    attention = re.search(r"att", name.lower())
    if attention and re.search(r"(^|\.)" + _OUT, name):
        return f"{kind}.o"
    return "other"


def _outputs_last(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An attention's output projection runs after its inputs, wherever it is registered."""
    for kind in ("attn", "cross"):
        outs = [step for step in steps if f"{kind}.o" in step["linears"]]
        ins = [step for step in steps if step not in outs and any(r.startswith(kind + ".") for r in step["linears"])]
        for out in outs:
            if ins and steps.index(out) < steps.index(ins[-1]):
                steps.remove(out)
                steps.insert(steps.index(ins[-1]) + 1, out)
    return steps
