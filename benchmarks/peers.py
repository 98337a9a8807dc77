"""Other tools' weight quantization, each in an interpreter of its own: a model folder in, the weights it would use out.

    PYTHON_OF_THE_PEER benchmarks/peers.py NAME --model DIR --batches FILE --bits 4 --group 64 --out FILE

Knows nothing of svlm. The calibration batches are ready tensors (made once by the model's own processor), so every tool
sees the same samples. What a quantized linear does is read off by sending the identity through it, however stored.
Only the decoder's linears are quantized (what every peer can do); vision tower, connector and head stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

Batch = dict[str, torch.Tensor]
Peer = Callable[[Any, list[Batch], argparse.Namespace], nn.Module]


FACTS: dict[str, Any] = {}


@contextmanager
def clocked() -> Iterator[None]:
    """Around a tool's own work: fills FACTS with the seconds inside, those since the process began, and its memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    FACTS["wall"], FACTS["cpu"] = time.perf_counter() - wall, time.process_time() - cpu
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    FACTS["process_wall"] = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    FACTS["process_cpu"] = sum(os.times()[:4])
    (peak,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    FACTS["peak_bytes"] = int(peak.split()[1]) * 1024


def read_batches(path: Path) -> list[Batch]:
    """Tensors named `17.input_ids` as a list of batches of one sample."""
    batches: dict[int, Batch] = {}
    for key, tensor in load_file(path).items():
        number, _, name = key.partition(".")
        batches.setdefault(int(number), {})[name] = tensor
    return [batches[i] for i in sorted(batches)]


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's linears by path."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix + ".")}


def effective(model: nn.Module, paths: list[str], widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """[out, in] float32 of each linear, whatever stands in its place now: what it makes of the identity."""
    out = {}
    for path in paths:
        module = model.get_submodule(path)
        eye = torch.eye(widths[path])
        with torch.no_grad():
            for kind in (torch.float32, torch.bfloat16):
                try:
                    value = module(eye.to(kind))
                    break
                except RuntimeError:  # a kernel that takes 16 bits only
                    continue
        bias = getattr(module, "bias", None)
        out[path] = (value.float() - (0 if bias is None else bias.float())).T.contiguous()
    return out


# ---------------------------------------------------------------------------------------------------------- the peers


def llmcompressor(model: nn.Module, batches: list[Batch], o: argparse.Namespace) -> nn.Module:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    weights = {"num_bits": o.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": o.group}
    names = [f"re:.*{n.split('.', 1)[1].replace('.', chr(92) + '.')}$" for n in targets(model)]
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in targets(model)]
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": names, "weights": weights | {"actorder": "static"}}}, ignore=others
    )
    tokenizer = AutoTokenizer.from_pretrained(o.model)  # not used, but asked for
    data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    with clocked():
        oneshot(
            model=model, dataset=data, recipe=recipe, processor=tokenizer, num_calibration_samples=len(batches),
            max_seq_length=4096,
        )  # fmt: skip
    return model


def gptqmodel(_: None, batches: list[Batch], o: argparse.Namespace) -> nn.Module:
    import os
    import tempfile

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=o.bits, group_size=o.group, desc_act=False, sym=True, device="cpu")
    wrapped = GPTQModel.load(str(o.model), config, torch_dtype=getattr(torch, o.dtype))
    type(wrapped).prepare_dataset = lambda self, calibration_dataset, **_: calibration_dataset
    with clocked():
        wrapped.quantize(batches, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:  # in memory its modules are on "meta" now
        wrapped.save(folder)
        return GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu").model


def auto_round(model: nn.Module, batches: list[Batch], o: argparse.Namespace) -> nn.Module:
    from auto_round import AutoRound

    others = {n: {"bits": 16} for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in targets(model)}
    processor = AutoProcessor.from_pretrained(o.model)
    tool = AutoRound(
        model, processor.tokenizer, processor=processor, bits=o.bits, group_size=o.group, sym=True, iters=o.steps,
        dataset=batches, nsamples=len(batches), batch_size=1, device_map="cpu", layer_config=others,
        seqlen=min(batch["input_ids"].shape[1] for batch in batches),
    )  # fmt: skip
    quantized, _ = tool.quantize()
    return quantized


def hqq(model: nn.Module, batches: list[Batch], o: argparse.Namespace) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=o.bits, group_size=o.group)
    for path, linear in targets(model).items():
        parent, _, name = path.rpartition(".")
        made = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        setattr(model.get_submodule(parent), name, made)
    return model


def bitsandbytes(_: None, batches: list[Batch], o: argparse.Namespace) -> nn.Module:
    from transformers import BitsAndBytesConfig

    if o.bits != 4:
        raise SystemExit("bitsandbytes: 4 bits only")
    model = load(o)
    keep = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in targets(model)]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=keep, bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForImageTextToText.from_pretrained(o.model, quantization_config=config, device_map="cpu")


def quanto(model: nn.Module, batches: list[Batch], o: argparse.Namespace) -> nn.Module:
    from optimum.quanto import freeze, qint2, qint4, quantize

    kinds = {2: qint2, 4: qint4}
    if o.bits not in kinds:
        raise SystemExit("optimum-quanto: 2 and 4 bits only")
    quantize(model.get_decoder(), weights=kinds[o.bits])
    freeze(model.get_decoder())
    return model


def torchao(model: nn.Module, batches: list[Batch], o: argparse.Namespace) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    kinds = {2: torch.int2, 3: torch.int3, 4: torch.int4}
    wanted = set(targets(model).values())
    config = IntxWeightOnlyConfig(weight_dtype=kinds[o.bits], granularity=PerGroup(o.group))
    quantize_(model, config, filter_fn=lambda module, name: module in wanted)
    return model


PEERS: dict[str, Peer] = {
    "llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "auto-round": auto_round, "hqq": hqq,
    "bitsandbytes": bitsandbytes, "optimum-quanto": quanto, "torchao": torchao,
}  # fmt: skip
LOAD_THEMSELVES = ("gptqmodel", "bitsandbytes")
CLOCK_THEMSELVES = (llmcompressor, gptqmodel)


def load(o: argparse.Namespace) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(o.model, dtype=getattr(torch, o.dtype)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--dtype", default="float32", help="of the model in memory")
    parser.add_argument("--steps", type=int, default=200, help="of auto-round")
    parser.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    o.model, o.batches, o.out = (path.resolve() for path in (o.model, o.batches, o.out))
    with tempfile.TemporaryDirectory() as folder:  # gptqmodel writes its logs where it is started
        os.chdir(folder)
        work(o)


def work(o: argparse.Namespace) -> None:
    torch.manual_seed(0)
    batches = read_batches(o.batches)
    quantize = PEERS[o.peer]
    given = None if o.peer in LOAD_THEMSELVES else load(o)
    if quantize in CLOCK_THEMSELVES:
        quantized = quantize(given, batches, o)
    else:
        with clocked():
            quantized = quantize(given, batches, o)
    original = targets(load(o))
    weights = effective(quantized, list(original), {path: module.in_features for path, module in original.items()})
    same = [path for path in weights if torch.equal(weights[path], original[path].weight.float())]
    if same:
        raise SystemExit(f"{o.peer} left {len(same)} linears as they were, {same[0]} for one")
    save_file(weights, o.out, metadata={"facts": json.dumps(FACTS)})


if __name__ == "__main__":
    main()
