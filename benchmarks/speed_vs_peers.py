"""GPTQ to 4 bits in groups of 64 at SmolVLM-256M's dimensions: time, memory and layer error of svlm and of other tools.

    python benchmarks/speed_vs_peers.py --python llmcompressor=VENV/bin/python --python gptqmodel=VENV2/bin/python \\
        --rounds 3 --json benchmarks/results/speed_vs_peers.json

Random weights; language model's linears only (what every peer can do); 64 calibration samples of one picture of
512 x 512 (64 visual tokens a tile) and 32 tokens of text each, ready-made tensors that are the same for all. Every tool
runs in a fresh process with the same number of threads, one after the other, in turns (`--rounds`); the median counts.
Wall and CPU time and the largest resident memory are those of the process from its start until the weights are
quantized, imports and loading included; the quantization alone is given beside them. Peers run with the model in
float32, or in bfloat16 as the checkpoint has it (NAME:bfloat16). The layer error is svlm's, for all alike:
``tr((W - Q) H (W - Q)^T) / tr(W H W^T)``, mean over linears, with the H of what the original model feeds each, all
tokens alike. `BOUND` shows what no tool can go below: the same process that only sends the samples through the vision
tower, once, with the model's own forward, which is stopped where the decoder begins; as svlm's calibration does it, in
bfloat16 where the processor has matrix units. Results are kept in --json as they
come, and not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BITS, GROUP, IMAGE_TOKEN = 4, 64, 49190
PLAIN = {"refine": 0, "token_weights": "uniform", "lazy": True}
OURS: dict[str, dict[str, Any]] = {
    "svlm, lazy": {"lazy": True},
    "svlm, refine 0, uniform tokens, lazy": PLAIN,
    "svlm, the same, all of a block at once": PLAIN | {"true_sequential": False},
}
PEERS = ("llmcompressor", "gptqmodel", "llmcompressor:bfloat16", "gptqmodel:bfloat16")
BOUND = "vision tower alone"


# ------------------------------------------------------------------------------------- in processes of their own: make


def make(folder: Path, o: argparse.Namespace) -> None:
    """The model, its processor, and the calibration batches of one sample each."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForImageTextToText,
        Idefics3ImageProcessor,
        Idefics3Processor,
        LlamaConfig,
        PreTrainedTokenizerFast,
        SmolVLMConfig,
    )
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    vision = SmolVLMVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=round(0.4 * o.blocks), num_attention_heads=12,
        image_size=512, patch_size=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=o.blocks, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE_TOKEN, scale_factor=4,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(folder / "model")

    special = {IMAGE_TOKEN: "<image>", 49189: "<fake_token_around_image>", 49188: "<end_of_utterance>"}
    words = {special.get(i, f"w{i}"): i for i in range(49280)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), pad_token="w0", unk_token="w1"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    Idefics3Processor(Idefics3ImageProcessor(), tokenizer, image_seq_len=64).save_pretrained(folder / "model")

    g = torch.Generator().manual_seed(0)
    tensors = {}
    for number in range(o.samples):
        said = torch.randint(3, 40000, (1, 32), generator=g)
        ids = torch.cat([said[:, :4], torch.full((1, 64 * o.tiles), IMAGE_TOKEN), said[:, 4:]], 1)
        tensors[f"{number}.input_ids"], tensors[f"{number}.attention_mask"] = ids, torch.ones_like(ids)
        tensors[f"{number}.pixel_values"] = torch.randn(1, o.tiles, 3, 512, 512, generator=g)
    save_file(tensors, folder / "batches.safetensors")


def read_batches(path: Path, size: int) -> list[dict[str, Any]]:
    """The samples in batches of `size`, as svlm's runs hold theirs; the last four tokens are the answer."""
    import torch
    from safetensors import safe_open

    from svlm.compress.mapped import put_away

    batches = []
    with safe_open(str(path), "pt") as file:
        names = {key.partition(".")[2] for key in file.keys()}  # noqa: SIM118 (not a mapping)
        samples = len(file.keys()) // len(names)
        for start in range(0, samples, size):
            rows = range(start, min(start + size, samples))
            batch = {name: put_away(torch.cat([file.get_tensor(f"{i}.{name}") for i in rows])) for name in names}
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, :-4] = -100
            batches.append(batch)
    return batches


# ------------------------------------------------------------------------------- in processes of their own: svlm, judge


def ours(folder: Path, settings: dict[str, Any], o: argparse.Namespace) -> None:
    """svlm's GPTQ, and what it made of the weights."""
    from contextlib import nullcontext

    from peers import FACTS, clocked
    from safetensors.torch import save_file

    import svlm
    from svlm.calib.walk import Walk
    from svlm.compress.base import Context

    batches = read_batches(folder / "batches.safetensors", o.batch_size)
    settings = dict(settings)
    view = svlm.load_view(folder / "model", lazy=settings.pop("lazy", False))
    step = svlm.find("quantize.gptq").from_settings({"bits": BITS, "group": GROUP, "where": ["language"]} | settings)
    seconds: dict[str, float] = {}

    def walk(where: Any = None, **options: Any) -> Walk:
        return Walk(view, batches, where, seconds=seconds, **options)

    with clocked():
        ctx = Context(batches, walk, nullcontext, seconds=seconds)
        notes = svlm.apply_pass(step, view, ctx)
    weights = {ref.path: ref.module.weight.data.bfloat16() for ref in view.linears(["language"])}
    save_file(weights, o.out, metadata={"facts": json.dumps(FACTS | {"notes": notes.numbers})})


def bound(folder: Path, o: argparse.Namespace) -> None:
    """What comes before the decoder, and nothing else."""
    import torch
    from peers import FACTS, clocked
    from safetensors.torch import save_file

    import svlm
    from svlm.calib.narrow import narrow_dtype, narrow_weights, narrowing
    from svlm.calib.replay import Arrived
    from svlm.compress.base import evaluating

    def stop(*_: Any) -> None:
        raise Arrived

    batches = read_batches(folder / "batches.safetensors", o.batch_size)
    view = svlm.load_view(folder / "model", lazy=True)
    view.decoder.register_forward_pre_hook(stop)
    dtype, before = narrow_dtype(view), [unit for unit in view.units if unit.part in ("vision", "connector")]
    with (
        clocked(), evaluating(view.model), narrowing(view.units, dtype), narrow_weights(before, dtype, away=True),
    ):  # fmt: skip
        for batch in batches:
            try:
                view.model(**batch)
            except Arrived:
                continue
            raise RuntimeError("the decoder was not reached")
    save_file({"none": torch.zeros(1)}, o.out, metadata={"facts": json.dumps(FACTS)})


def judge(folder: Path, o: argparse.Namespace) -> None:
    """Mean layer error of every file of weights in `folder`/weights, with one H for all.

    Where svlm brought the input channels to one size first, H is that of the model with such channels, whose outputs
    are the original's: the error means the same.
    """
    from safetensors import safe_open

    import svlm
    from svlm.calib.stats import Hessian
    from svlm.calib.walk import Walk
    from svlm.passes.quantize._equalize import equalize
    from svlm.passes.quantize._gptq import layer_error

    files = {path.stem: safe_open(str(path), "pt") for path in sorted((folder / "weights").glob("*.safetensors"))}
    facts = {name: json.loads(file.metadata()["facts"]) for name, file in files.items()}
    errors: dict[str, list[float]] = {name: [] for name in files}
    for equal in (False, True):
        mine = {n: f for n, f in files.items() if bool(facts[n].get("notes", {}).get("linears_equalized")) == equal}
        view = svlm.load_view(folder / "model")
        if equal:
            equalize(view, view.linears(["language"]))
        for unit in Walk(view, read_batches(folder / "batches.safetensors", 8), "language") if mine else ():
            for ref, stat in unit.observe(Hessian, token_weights="uniform").items():
                for name, file in mine.items():
                    rounded = file.get_tensor(ref.path).float()
                    errors[name].append(layer_error(ref.module.weight.data, rounded, stat.matrix)[1])
    Path(o.out).write_text(json.dumps({name: statistics.mean(found) for name, found in errors.items()}))


# ------------------------------------------------------------------------------------------------------------- the race


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:300])


def race(name: str, folder: Path, o: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """One tool once: what its process took, and what it says of the quantization alone."""
    weights = folder / ("bound.safetensors" if name == BOUND else f"weights/{name}.safetensors")
    if name == BOUND:
        command = [
            sys.executable,
            __file__,
            "--step",
            "bound",
            "--folder",
            str(folder),
            "--batch-size",
            str(o.batch_size),
        ]
    elif name in OURS:
        command = [sys.executable, __file__, "--step", "svlm", "--settings", json.dumps(OURS[name])]
        command += ["--folder", str(folder), "--batch-size", str(o.batch_size)]
    else:
        tool, _, dtype = name.partition(":")
        command = [pythons[tool], str(Path(__file__).with_name("peers.py")), tool, "--dtype", dtype or "float32"]
        command += ["--model", str(folder / "model"), "--batches", str(folder / "batches.safetensors")]
        command += ["--bits", str(BITS), "--group", str(GROUP)]
    run([*command, "--out", str(weights)])
    with open(weights, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    facts = json.loads(head["__metadata__"]["facts"])
    print(name, facts, file=sys.stderr, flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="interpreter of a peer")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=1, help="of a picture, 64 visual tokens each")
    parser.add_argument("--blocks", type=int, default=30, help="of the language model; the tower has 0.4 times as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2, help="of svlm; peers take samples one by one")
    parser.add_argument("--only", nargs="+", help="tools, of: " + ", ".join([BOUND, *OURS, *PEERS]))
    parser.add_argument("--folder", type=Path, help="where model, batches and weights lie; else a temporary one")
    parser.add_argument("--json", type=Path)
    for hidden in ("--step", "--settings", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.step:
        if o.step == "svlm":
            ours(o.folder, json.loads(o.settings), o)
        else:
            {"make": make, "judge": judge, "bound": bound}[o.step](o.folder, o)
        return
    pythons = dict(item.partition("=")[::2] for item in o.python)
    os.environ |= {"OMP_NUM_THREADS": str(o.threads), "MKL_NUM_THREADS": str(o.threads)}
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for all: CPU time is then work, and not threads that wait for others
    with tempfile.TemporaryDirectory() as temporary:
        folder = (o.folder or Path(temporary)).resolve()
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        sizes = ["--samples", str(o.samples), "--tiles", str(o.tiles), "--blocks", str(o.blocks)]
        if not (folder / "batches.safetensors").is_file():
            run([sys.executable, __file__, "--step", "make", "--folder", str(folder), *sizes])
        names = o.only or [BOUND, *OURS, *(p for p in PEERS if p.partition(":")[0] in pythons)]
        setting = {k: getattr(o, k) for k in ("samples", "tiles", "blocks", "threads", "batch_size")}
        setting |= {"bits": BITS, "group": GROUP}
        made = json.loads(o.json.read_text()) if o.json and o.json.is_file() else {"setting": setting, "runs": {}}
        if made["setting"] != setting:
            raise SystemExit(f"{o.json} holds results for {made['setting']}, not for {setting}; give another --json")
        runs: dict[str, list[dict[str, Any]] | str] = made["runs"]
        for _, name in itertools.product(range(o.rounds), names):
            found = runs.setdefault(name, [])
            if isinstance(found, str) or len(found) >= o.rounds:
                continue
            try:
                found.append(race(name, folder, o, pythons))
            except RuntimeError as error:
                runs[name] = str(error)
                print(name, error, file=sys.stderr, flush=True)
            if o.json:  # as they come: a run that is killed goes on with the next
                o.json.write_text(json.dumps(made, indent=1) + "\n")
        judged = folder / "judged.json"
        run([sys.executable, __file__, "--step", "judge", "--folder", str(folder), "--out", str(judged)])
        made["layer_error"] = made.get("layer_error", {}) | json.loads(judged.read_text())
    if o.json:
        o.json.write_text(json.dumps(made, indent=1) + "\n")
    print(table(made))


def table(result: dict[str, Any]) -> str:
    """Markdown: medians of the process and of the quantization alone, and the layer error."""
    lines = ["| tool | wall, s | CPU, s | quantization alone: wall, CPU, s | peak memory, MB | mean layer error |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, runs in result["runs"].items():
        if isinstance(runs, str):
            lines.append(f"| {name} | does not run: {runs} | | | | |")
            continue

        facts = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "notes"}
        alone = f"{facts['wall']:.1f}, {facts['cpu']:.1f}"
        process = f"{facts['process_wall']:.1f} | {facts['process_cpu']:.1f}"
        error = f"{result['layer_error'][name]:.5f}" if name in result.get("layer_error", {}) else ""
        lines.append(f"| {name} | {process} | {alone} | {facts['peak_bytes'] / 1e6:.0f} | {error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
