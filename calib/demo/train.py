"""Train the demo model from nothing; on two plain CPU cores in about an hour and a half, on a GPU in minutes.

    OMP_NUM_THREADS=2 python -m svlm.calib.demo.train --out WORK --export calib/demo/model [--resume]

Two phases. `vision`: the tower and the projector alone, with a dense auxiliary loss: each visual token names what it
shows with the language model's own word embeddings (its neighbours through a throw-away head), so that later the
language model meets visual tokens that already are words. `full`: the whole model on questions, eight to a scene (see
`layout.py`), loss on answers only, while the auxiliary loss fades to zero at three quarters of the phase.

A run that is killed goes on with `--resume` at its last checkpoint and sees the data that it would have seen. Progress
is one JSON object a line in `--log`; exact match there is that of the averaged weights, which are what is exported.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from ..muon import Muon
from . import build, layout, outliers, scenes, stream


class Heads(nn.Module):
    """What the auxiliary loss throws away: from a visual token, what is beside and across its thing, and its place."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.split = (vocabulary, vocabulary, 4)
        self.out = nn.Linear(width, sum(self.split))

    def forward(self, model: LlavaForConditionalGeneration, visual: Tensor, batch: stream.Batch) -> Tensor:
        """The auxiliary loss of visual tokens [B, P, D]."""
        x = F.rms_norm(visual, visual.shape[-1:]).flatten(0, 1)
        named = F.linear(x, model.lm_head.weight)
        beside, across, place = self.out(x).split(self.split, dim=-1)

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), target.flatten(), ignore_index=layout.IGNORED)

        words = 0.5 * (loss(named, batch.words[..., 0]) + loss(named, batch.words[..., 1]))
        size = visual.float().square().mean(-1).clamp(min=1e-6).log()  # keeps them as large as words are, near rms 1
        around = 0.3 * (loss(beside, batch.beside) + loss(across, batch.across)) + 0.1 * loss(place, batch.place)
        return words + around + 0.0125 * size.square().mean()


def optimizers(model: nn.Module, heads: nn.Module, kind: str, scale: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the towers and the projector (with `kind` "muon"), AdamW for the rest."""
    hidden: list[Tensor] = []
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and "embed" not in name and "lm_head" not in name
        (hidden if matrix else plain).append(p)
    if kind == "adamw":
        hidden, decay = [], hidden
    plain += heads.parameters()
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.02}]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=2e-3 * scale, betas=(0.9, 0.98), fused=True)
    return [adam, Muon(hidden, lr=0.02 * scale)] if hidden else [adam]


def rate(phase: str, step: int, steps: int) -> float:
    """Learning rate as a part of its peak: warm-up, plateau; in the last 35 % of the full phase down to nothing."""
    warm = min(1.0, (step + 1) / 100)
    return warm if phase == "vision" else min(warm, max(0.0, (1 - step / steps) / 0.35))


class Trainer:
    """Everything that a checkpoint holds, and what is done with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build.build_model(options.seed).train()
        self.model.to(self.device)
        self.model.set_attn_implementation("eager")  # faster backward than sdpa on CPUs
        self.heads = Heads(192, len(build.words())).to(self.device)
        self.average = copy.deepcopy(self.model).eval()
        self.optimizers = optimizers(self.model, self.heads, options.optimizer, options.lr)
        self.peaks = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step, self.seconds = 0, 0.0
        self.mix = {k: float(v) for k, v in (item.split("=") for item in options.mix.split(",") if item)}
        self.phases = {"vision": options.vision_steps, "full": options.steps}

    def where(self, step: int) -> tuple[str, int]:
        """The phase that a global step belongs to, and its number there."""
        first = self.phases["vision"]
        return ("vision", step) if step < first else ("full", step - first)

    def batches(self) -> Iterator[stream.Batch]:
        """The batches from the present step on, made ahead by a thread."""
        o = self.options

        def make(step: int) -> stream.Batch:
            phase, number = self.where(step)
            size = o.vision_batch if phase == "vision" else o.batch
            return stream.batch(phase, number, size, o.questions, o.seed, self.mix, o.easy)

        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(make, self.step), pool.submit(make, self.step + 1)]
            for step in range(self.step, sum(self.phases.values())):
                yield ahead.pop(0).result()
                ahead.append(pool.submit(make, step + 2))

    def learn(self, batch: stream.Batch) -> dict[str, float]:
        """One step; returns what it cost."""
        phase, number = self.where(self.step)
        factor = rate(phase, number, self.phases[phase])
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
        fade = 1.0 if phase == "vision" else 0.5 * max(0.0, 1 - number / (0.75 * self.phases["full"]))
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            visual = layout.see(self.model, batch.pixels.to(self.device))
            auxiliary = visual.new_zeros(())
            if fade > 0:
                moved = {f: getattr(batch, f).to(self.device) for f in ("words", "beside", "across", "place")}
                auxiliary = self.heads(self.model, visual, stream.Batch(batch.pixels, None, **moved))
            answers = visual.new_zeros(())
            if batch.layout is not None:
                packed = batch.layout.to(self.device)
                logits = layout.language(self.model, visual, packed).float()
                answers = F.cross_entropy(logits.flatten(0, 1), packed.labels.flatten(), ignore_index=layout.IGNORED)
        (answers + fade * auxiliary).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (number + 1) / (number + 10))
        ours, theirs = list(self.average.parameters()), list(self.model.parameters())
        torch._foreach_lerp_([p.data for p in ours], [p.data for p in theirs], 1 - decay)
        self.step += 1
        answers, auxiliary = answers.detach(), auxiliary.detach()
        return {"loss": float(answers), "auxiliary": float(auxiliary), "norm": float(norm), "lr": factor}

    @torch.no_grad()
    def examine(self, pictures: int) -> dict[str, float]:
        """Exact match by kind on fresh scenes and on easy-VQA's test split; with the averaged weights."""
        right: dict[str, list[bool]] = defaultdict(list)
        made = [scenes.scene("val", i) for i in range(pictures)]
        shapes, pairs, _ = stream.easy_vqa_data("test")
        sets: list[tuple[np.ndarray, list, list]] = []
        for i in range(0, pictures, 32):
            part = made[i : i + 32]
            chosen = [m.questions[:12] for m in part]
            images = np.stack([np.asarray(m.image) for m in part])
            texts = [[(q.question, q.answer) for q in a] for a in chosen]
            sets.append((images, texts, [[q.kind for q in a] for a in chosen]))
        for i in range(0, pictures // 2, 32):
            asked = [p[:8] for p in pairs[i : i + 32]]
            sets.append((shapes[i : i + 32], asked, [["easy_vqa"] * len(a) for a in asked]))
        for images, asked, kinds in sets:
            packed = layout.pack(asked).to(self.device)
            visual = layout.see(self.average, layout.pixels(images).to(self.device))
            said = layout.language(self.average, visual, packed).argmax(-1).cpu()
            fine = ((said == packed.labels.cpu()) | (packed.labels.cpu() == layout.IGNORED)).tolist()
            for line, one, kind in zip(fine, asked, kinds):
                start = 0
                for (_, answer), k in zip(one, kind):
                    end = start + len(layout.encode(answer)) + 1
                    right[k].append(all(line[start:end]))
                    start = end
        out = {k: round(sum(v) / len(v), 4) for k, v in sorted(right.items())}
        out["all"] = round(float(np.mean([out[k] for k in scenes.KINDS])), 4)
        return out

    def save(self, path: Path) -> None:
        """Write a checkpoint so that a kill at any instant leaves the old or the new one."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name in ("model", "average", "heads"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def export(self, folder: Path) -> None:
        """Save the averaged weights in bfloat16, with the processor, as a model folder; the old one goes last."""
        fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model = copy.deepcopy(self.average).to("cpu")
        outliers.spread(model, self.options.outliers)
        model.to(torch.bfloat16).save_pretrained(fresh)
        build.build_processor().save_pretrained(fresh)
        for file in fresh.iterdir():
            file.chmod(0o644)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    made.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    made.add_argument("--export", type=Path, help="model folder to write at the end, and with --export-at")
    made.add_argument("--export-at", type=int, default=0, help="also export after so many steps")
    made.add_argument("--log", type=Path, help="file of JSON lines")
    made.add_argument("--vision-steps", type=int, default=2000)
    made.add_argument("--steps", type=int, default=1800)
    made.add_argument("--vision-batch", type=int, default=48)
    made.add_argument("--batch", type=int, default=40)
    made.add_argument("--questions", type=int, default=8)
    made.add_argument("--easy", type=float, default=0.3, help="share of easy-VQA pictures in a batch")
    made.add_argument("--mix", default="", help="weights of question kinds, as relation=3,exists=2")
    made.add_argument("--outliers", type=float, default=0.4, help="spread of channel scales, see outliers.py")
    made.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    made.add_argument("--lr", type=float, default=1.0, help="factor of all learning rates")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--every", type=int, default=250, help="steps between examinations")
    return made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse, train, log, export; returns the last examination."""
    options = parser().parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint, last = options.out / "checkpoint.pt", {}
    trainer = Trainer(options)
    if options.resume and checkpoint.exists():
        trainer.load(checkpoint)
    began, saved = time.monotonic() - trainer.seconds, time.monotonic()
    sums: dict[str, float] = defaultdict(float)
    for count, batch in enumerate(trainer.batches(), 1):
        for key, value in trainer.learn(batch).items():
            sums[key] += value
        trainer.seconds = time.monotonic() - began
        phase, _ = trainer.where(trainer.step - 1)
        if trainer.step % 50 == 0:
            line: dict[str, Any] = {"step": trainer.step, "phase": phase, "seconds": round(trainer.seconds, 1)}
            line.update({k: round(v / min(count, 50), 4) for k, v in sums.items()})
            sums.clear()
            if phase == "full" and trainer.step % options.every == 0:
                line["exact_match"] = last = trainer.examine(96)
            if options.log:
                with options.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        if time.monotonic() - saved > 150:
            trainer.save(checkpoint)
            saved = time.monotonic()
        if options.export and options.export_at and trainer.step == options.export_at:
            trainer.export(options.export)
    trainer.save(checkpoint)
    last = trainer.examine(384)
    print(json.dumps(last), flush=True)
    if options.export:
        trainer.export(options.export)
    return last


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
