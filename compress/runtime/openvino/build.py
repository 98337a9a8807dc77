"""Make the graphs of a model, keep them beside it, and load them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...anatomy import ModelView
from ...disk import read_json, whole_folder
from ...errors import UsageError
from ...storage import fingerprint
from ..activations import remove
from ..codebook import integer_grids
from ..kv_cache import installed as kv_form
from .constants import Counts
from .convert import EMBEDDING, HEAD, LANGUAGE, Image, Rows, Seen, convert_decoder, convert_part, fix_shapes, observe
from .model import Graph, LanguageState, OpenVINOModel, Pictures, mask_kinds

FORMAT = 4  # of what is kept on disk; another number is made anew
MANIFEST = "manifest.json"


def require_openvino() -> Any:
    """The openvino package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UsageError(
            "the openvino runtime needs the package openvino", found=str(error), change="pip install 'svlm[openvino]'"
        ) from error
    return openvino


def load_openvino(
    view: ModelView, example: Mapping[str, Tensor], folder: Path | None, *, threads: int | None = None
) -> OpenVINOModel:
    """Let `view` run in OpenVINO. Takes its torch weights away: the graphs hold them.

    Args:
        example: one encoded prompt with a picture, as the processor makes it; pictures keep its size.
        folder: where graphs are kept and found again, by the fingerprint of weights, example and openvino; or None.
        threads: of OpenVINO; torch's number where not given.

    Raises:
        Unmet: the family cannot run there; the message names it and says why.
        UsageError: openvino is not installed. WorkFailed: the converter fails.
    """
    ov = require_openvino()
    threads = threads or torch.get_num_threads()
    seen = observe(view, example)
    embeds, mask = seen.decoder["inputs_embeds"].detach(), seen.decoder.get("attention_mask")
    positions = seen.decoder.get("position_ids")
    lead = tuple(positions.shape[:-2]) if positions is not None else ()
    kinds = mask_kinds(view.decoder, embeds, mask)
    key = _key(view, seen, ov)
    core = ov.Core()
    kept = folder / MANIFEST if folder is not None else None
    if kept is not None and kept.is_file() and read_json(kept).get("key") == key:
        counts = {name: Counts(**row) for name, row in read_json(kept)["parts"].items()}
        sources: dict[str, Any] = {name: str(kept.parent / f"{i}.xml") for i, name in enumerate(counts)}
        rebuilt = False
    else:
        made = _convert(view, seen, embeds, (*lead, *embeds.shape[:2]), kinds)
        counts, sources, rebuilt = {n: c for n, (_, c) in made.items()}, {n: g for n, (g, _) in made.items()}, True
        if folder is not None:
            with whole_folder(folder) as temporary:
                for i, graph in enumerate(sources.values()):
                    ov.save_model(graph, str(temporary / f"{i}.xml"), compress_to_fp16=False)
                rows = {name: asdict(count) for name, count in counts.items()}
                (temporary / MANIFEST).write_text(json.dumps({"key": key, "parts": rows}, indent=1) + "\n")
            sources = {name: str(folder / f"{i}.xml") for i, name in enumerate(counts)}
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    exact = integers_exact(core) if any(count.static for count in counts.values()) else None
    settings = {name: _settings(name, count, threads, native, exact) for name, count in counts.items()}
    pictures = {name: Pictures(core, sources.pop(name), settings[name]) for name in seen.calls}
    graphs = {name: Graph(core.compile_model(source, "CPU", settings[name])) for name, source in sources.items()}
    _free(view, list(seen.calls))
    notes = {
        "rebuilt": rebuilt,
        "bytes": sum(p.stat().st_size for p in folder.iterdir()) if folder is not None else None,
        "constants": {name: asdict(count) for name, count in counts.items()},
        "settings": settings,
        "integer_kernels": exact,
        "kv_cache_left_out": kv_form(view.model) is not None,  # the graphs have a cache of their own
    }
    language = LanguageState(graphs[LANGUAGE], view.decoder, kinds, lead)
    return OpenVINOModel(view, graphs, pictures, language, seen.calls, notes)


def _key(view: ModelView, seen: Seen, ov: Any) -> str:
    """Changes with the weights, the grids, the size of the pictures, openvino, and svlm's own layout."""
    digest = hashlib.sha256(fingerprint(view).encode())
    grids = {path: (g.bits, g.group, g.symmetric) for path, g in sorted(integer_grids(view.grids).items())}
    facts = (
        FORMAT,
        ov.__version__,
        grids,
        sorted(view.activations.items()),
        {path: call.shapes for path, call in seen.calls.items()},
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()


def _convert(
    view: ModelView, seen: Seen, embeds: Tensor, shape: tuple[int, ...], kinds: tuple[str, ...]
) -> dict[str, tuple[Any, Counts]]:
    made: dict[str, tuple[Any, Counts]] = {}
    for path, call in seen.calls.items():
        module = Image(view.model.get_submodule(path), call)
        made[path] = convert_part(view, module, path, tuple(t[:1].contiguous() for t in seen.examples[path]))
        fix_shapes(made[path][0], [[1, *sizes] for sizes in call.shapes])
    names = {id(module): path for path, module in view.model.named_modules()}
    embedding, head = view.model.get_input_embeddings(), view.model.get_output_embeddings()
    made[EMBEDDING] = convert_part(view, Rows(embedding), names[id(embedding)], (torch.zeros(1, 2, dtype=torch.long),))
    fix_shapes(made[EMBEDDING][0], [[-1, -1]])
    positions = torch.arange(embeds.shape[1]).expand(shape)
    made[LANGUAGE] = convert_decoder(view, embeds, positions, kinds)
    made[HEAD] = convert_part(view, Rows(head), names[id(head)], (torch.zeros(1, 2, head.weight.shape[1]),))
    fix_shapes(made[HEAD][0], [[-1, -1, head.weight.shape[1]]])
    return made


def integers_exact(core: Any) -> bool:
    """Whether this processor's 8-bit kernels add up products right, found out on a product of largest integers.

    Without VNNI (before AVX512-VNNI and AVX-VNNI) openvino adds two products in 16 bits, which 255 * 127 twice exceeds:
    the sum is cut, and a model's answers with it.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    width = 256
    x = op.parameter([1, 16, width], ov.Type.f32)
    ends = [op.constant(np.float32(v)) for v in (0, 255, 0, 255)]
    weight = op.multiply(op.convert(op.constant(np.full((32, width), 127, np.int8)), np.float32), np.float32(1))
    product = op.matmul(op.fake_quantize(x, *ends, 256), weight, False, True)
    compiled = core.compile_model(ov.Model([product], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(np.full((1, 16, width), 255, np.float32))[0]
    return bool(np.all(found == 255 * 127 * width))


def _settings(name: str, counts: Counts, threads: int, native: bool, exact: bool | None) -> dict[str, Any]:
    """How a graph is compiled: bfloat16 where the processor has it.

    Activations are rounded where the model rounds them and nowhere else; with integer kernels where these are `exact`,
    else in floats. A language model of floats alone ends openvino 2026.4 with SIGFPE in bfloat16 on one thread: float32
    there.
    """
    unsafe = name in (LANGUAGE, HEAD) and not counts.integers and threads == 1
    precision = "bf16" if native and not unsafe else "f32"
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "LP_TRANSFORMS_MODE": exact is not False,
    }


def _free(view: ModelView, paths: list[str]) -> None:
    """Drop the torch weights of all that runs in graphs."""
    modules = [view.model.get_submodule(path) for path in paths]
    modules += [view.decoder, view.model.get_input_embeddings(), view.model.get_output_embeddings()]
    for module in modules:
        remove(module)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.new_empty(0)
