"""Each export of the demo model, loaded by the other project's own loader: are its greedy answers those of svlm?

    python benchmarks/formats.py --questions 200 --json benchmarks/results/formats.json

The demo model is quantized (4 bits, vision tower, connector and language model; gptq in groups of 64, for `bnb` NF4),
saved, exported, loaded through stock transformers with the other project's kernels on CPU, and asked check questions
in bfloat16, as that loader runs. Its answers are compared with those of `svlm.load` of the same result in bfloat16
and in float32; an answer whose two best tokens are nearly tied can differ between those two as well, so that their
difference is given beside. `logits`: distance of the first answer token's logits from svlm's in bfloat16, as a share
of their norm. `openvino` is svlm's own runtime. Formats whose loader is not installed are left out and named; what
the file knows of others stays, so that loaders which need different environments can be asked one after the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch

import svlm
from svlm import passes
from svlm.calib.encode import Encoder
from svlm.compress import storage
from svlm.compress.disk import write_json
from svlm.compress.export.run import export_model

NEEDS = {
    "compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "gptq_v2": "gptqmodel", "awq": "gptqmodel",
    "bnb": "bitsandbytes", "openvino": "openvino",
}  # fmt: skip
TOKENS = 16


def answers(model: Any, view: Any, samples: Any, dtype: torch.dtype) -> tuple[list[str], torch.Tensor]:
    """Greedy answers, and the logits of their first token [questions, vocabulary]."""
    encoder, said, first = Encoder(view.processor), [], []
    for start in range(0, len(samples), 20):
        batch = encoder.prompts(samples[start : start + 20])
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad():
            tokens = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
            first.append(model(**batch).logits[:, -1].float())
        said += encoder.decode(tokens[:, batch["input_ids"].shape[1] :])
    return said, torch.cat(first)


def quantized(name: str, settings: dict[str, Any], folder: Path) -> None:
    view = svlm.load_view("demo")
    bench = svlm.Workbench(svlm.load_view("demo"), svlm.CalibrationSet.load("demo", fit=128, check=1), latency=False)
    svlm.apply_pass(svlm.find(name).from_settings(settings), view, bench.context(view))
    storage.save(view, folder)


def loaded(name: str, source: Path, folder: Path) -> Any:
    if name == "openvino":
        return svlm.load(source, runtime="openvino")
    from transformers import AutoModelForImageTextToText

    export_model(source, name, folder, find=passes.find, dense=True)
    where = {"device_map": "cpu"} if name == "bnb" else {}
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, **where).eval()


def same(a: list[str], b: list[str]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--formats", nargs="+", choices=list(NEEDS), default=list(NEEDS))
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    samples = svlm.CalibrationSet.load("demo", fit=128, check=o.questions).check
    facts: dict[str, Any] = json.loads(o.json.read_text()) if o.json.is_file() else {}
    if facts.get("questions") != len(samples):
        facts = {"questions": len(samples)}
    with tempfile.TemporaryDirectory() as scratch:
        gptq, nf4 = Path(scratch) / "made by gptq", Path(scratch) / "made by bnb"  # beside the exports
        quantized("quantize.gptq", {"bits": 4, "group": 64}, gptq)
        quantized("quantize.bnb", {"bits": 4}, nf4)
        for name in o.formats:
            source = nf4 if name == "bnb" else gptq
            if importlib.util.find_spec(NEEDS[name]) is None:
                facts[name] = f"not run: {NEEDS[name]} is not installed"
                continue
            view = svlm.load_view(source)
            exact, _ = answers(view.model, view, samples, torch.float32)
            rough, near = answers(view.model.to(torch.bfloat16), view, samples, torch.bfloat16)
            dtype = torch.float32 if name == "openvino" else torch.bfloat16
            said, first = answers(loaded(name, source, Path(scratch) / name), view, samples, dtype)
            facts[name] = {
                "same_as_bfloat16": same(said, rough),
                "same_as_float32": same(said, exact),
                "same_as_either": sum(x in pair for x, pair in zip(said, zip(rough, exact))),
                "bfloat16_same_as_float32": same(rough, exact),
                "logits": float((first - near).norm() / near.norm()),
            }
            print(name, facts[name], file=sys.stderr, flush=True)
            write_json(o.json, facts)
    print(f"of {len(samples)} answers     as svlm in bf16, as svlm in f32, as either, svlm bf16 = f32, logits apart")
    for name in o.formats:
        f = facts[name]
        if isinstance(f, str):
            print(f"{name:20} {f}")
        else:
            counts = (f["same_as_bfloat16"], f["same_as_float32"], f["same_as_either"], f["bfloat16_same_as_float32"])
            print(f"{name:20}" + "".join(f"{count:>16}" for count in counts) + f"{f['logits']:>16.4f}")


if __name__ == "__main__":
    main()
