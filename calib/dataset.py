"""Questions to fit on and questions to check with: disjoint by picture, drawn by seed, fingerprinted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..compress.errors import DataError
from . import sources
from .metrics import scores
from .sample import ImageSource, Sample

PER_IMAGE = 4  # questions taken of one image before every other image has had its turn


@dataclass(frozen=True)
class CalibrationSet:
    """What passes may look at (`fit`) and what judges them (`check`). No picture is in both.

    Attributes:
        fingerprint: sha256 over ids, pictures, questions, answers and tags of both splits.
        name: as given to `load`.
        description: where it comes from and how it was drawn, one sentence or two.
        recovery: starts an endless stream of fresh samples from neither split; None where the source has none.
        dropped: questions left out: asked twice of one picture, or about pictures of both splits at once.
        score: how answers are rated (`calib.metrics.scores`).
    """

    fit: list[Sample]
    check: list[Sample]
    fingerprint: str
    name: str
    description: str
    recovery: Callable[[], Iterator[Sample]] | None = None
    dropped: int = 0
    score: str = scores.EXACT

    def __post_init__(self) -> None:
        scores.chosen(self.score, ())

    @classmethod
    def load(
        cls, spec: str | Path, *, fit: int = 256, check: int = 512, seed: int = 0, score: str | None = None
    ) -> CalibrationSet:
        """Read `fit` and `check` questions, and decode every picture that they need.

        Of one picture at most `PER_IMAGE` questions are taken, more only where there are too few pictures. A source
        that has fewer questions than asked for gives what it has, in the proportion asked for; the description says so.

        Args:
            spec: ``demo``, ``demo:shifted``, ``easy-vqa``, a file (.jsonl, .json), a folder, or a hub id.
            fit, check: questions, at least one each.
            seed: of the draw. The same spec, counts and seed give the same samples on every machine.
            score: how answers are rated; None: VQA accuracy where every question has ten answers, else exact match.

        Raises:
            DataError: nothing of that name; a broken file, row or image; no picture left for one of the splits; no such
                score. UsageError: the score needs a package that is not installed.
        """
        scores.chosen(score, ())  # before anything is read
        for split, count in (("fit", fit), ("check", check)):
            if count < 1:
                raise DataError(
                    f"zero {split} samples", where=str(spec), found=str(count), change=f"ask for {split} > 0"
                )
        source = sources.read(spec, fit=fit, check=check, seed=seed)
        if source.check is None:
            draw = _Draw(source.fit, seed)
            chosen_fit, chosen_check = draw.split(fit, check)
            dropped = draw.dropped
        else:
            first, second = (_Draw(pool, seed, source.in_order) for pool in (source.fit, source.check))
            (chosen_fit,) = first.take((fit,))
            second.barred = {image.content for sample in chosen_fit for image in sample.images}
            (chosen_check,) = second.take((check,))
            dropped = first.dropped + second.dropped
        for split, chosen in (("fit", chosen_fit), ("check", chosen_check)):
            if not chosen:
                raise DataError(
                    f"zero {split} samples",
                    where=str(spec),
                    found=f"{len(chosen_fit)} questions to fit on and {len(chosen_check)} to check, by picture",
                    change="give questions about at least two different pictures: no picture is in both splits",
                )
        chosen_fit, chosen_check = _named_apart(chosen_fit, chosen_check)
        notes = [source.description]
        if (len(chosen_fit), len(chosen_check)) != (fit, check):
            notes.append(f"Asked for {fit} + {check} questions, found {len(chosen_fit)} + {len(chosen_check)}.")
        if dropped:
            notes.append(f"{dropped} questions dropped: doubles, or about pictures of both splits.")
        return cls(
            chosen_fit,
            chosen_check,
            fingerprint(chosen_fit, chosen_check),
            str(spec),
            " ".join(notes),
            source.recovery,
            dropped,
            scores.chosen(score, [sample.answers for sample in chosen_check]),
        )

    def other(self, spec: str, seed: int) -> Callable[[], Iterator[Sample]]:
        """Starts a stream of samples from another source, to train on: none shows a picture of the check split.

        A source that makes fresh samples streams those without end. All others end; their order follows from the seed.

        Raises:
            DataError: nothing of that name, or what is there cannot be read. A broken picture when it is its turn.
        """
        if not str(spec).strip():
            raise DataError(
                "data: names nothing", found=repr(spec), change="a file, a folder, a hub id, fit or recovery"
            )
        source = sources.read(spec, fit=1, check=1, seed=seed)
        if source.recovery is not None:
            return source.recovery
        rank = _Draw((), seed)._rank
        pool = sorted(source.fit, key=lambda sample: rank(f"{sample.image_id} {_asked(sample)}"))
        barred = {image.content for sample in self.check for image in sample.images}
        return lambda: (s for s in pool if not any(image.content in barred for image in s.images))


def fingerprint(fit: Iterable[Sample], check: Iterable[Sample]) -> str:
    """sha256 over ids, pictures, questions, answers, tags and conversations of both splits."""
    digest = hashlib.sha256()
    for split, samples in (("fit", fit), ("check", check)):
        for s in samples:
            pictures = [image.content for image in s.images]
            row = [split, s.id, s.image_id, pictures, s.question, s.answers, sorted(s.tags.items()), s.messages]
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


class _Draw:
    """Takes the questions of one pool picture by picture, in an order that follows from the seed alone.

    Pictures are decoded when it is their turn, so a pool may be far larger than what is taken from it. `barred` holds
    the content of pictures that must not be taken. A pool that is random already is taken `in_order`.
    """

    def __init__(self, pool: Iterable[Sample], seed: int, in_order: bool = False) -> None:
        self.seed, self.dropped = seed, 0
        self.barred: set[str] = set()
        groups: dict[str, list[Sample]] = {}
        for sample in pool:
            groups.setdefault(sample.image_id, []).append(sample)
        self.groups = list(groups.values())
        if not in_order:
            self.groups = [self._shuffled(groups[name]) for name in sorted(groups, key=self._rank)]

    def _rank(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.seed}:{text}".encode()).digest()

    def _shuffled(self, samples: list[Sample]) -> list[Sample]:
        return sorted(samples, key=lambda s: self._rank(_asked(s)))

    def split(self, fit: int, check: int) -> tuple[list[Sample], list[Sample]]:
        """Both splits of one pool."""
        first, second = self.take((fit, check))
        return first, second

    def take(self, counts: tuple[int, ...]) -> list[list[Sample]]:
        """Up to `counts` questions for each split, no picture in two; the emptier split gets the next picture."""
        taken: list[list[Sample]] = [[] for _ in counts]
        spare: list[list[Sample]] = [[] for _ in counts]
        homes: dict[str, tuple[int, str]] = {}  # picture: its split, and the id under which it is known
        joined: dict[str, str] = {}  # ids of pictures that a later question showed together
        given: Counter[str] = Counter()
        asked: set[str] = set()

        def last(image_id: str) -> str:
            while image_id in joined:
                image_id = joined[image_id]
            return image_id

        for group in self.groups:
            open_splits = [i for i, count in enumerate(counts) if len(taken[i]) < count]
            if not open_splits:
                break
            wanting = min(open_splits, key=lambda i: len(taken[i]) / counts[i])
            for sample in group:
                pictures = [image.content for image in sample.images]
                known = {(homes[p][0], last(homes[p][1])) for p in pictures if p in homes}
                double = " ".join([*pictures, _asked(sample)])
                if double in asked or self.barred.intersection(pictures) or len({split for split, _ in known}) > 1:
                    self.dropped += 1
                    continue
                asked.add(double)
                split, image_id = min(known) if known else (wanting, sample.image_id)
                joined.update({other: image_id for _, other in known if other != image_id})
                homes.update(dict.fromkeys(pictures, (split, image_id)))
                sample = dataclasses.replace(sample, image_id=image_id)
                if given[image_id] < PER_IMAGE and len(taken[split]) < counts[split]:
                    taken[split].append(sample)
                    given[image_id] += 1
                else:
                    spare[split].append(sample)
        chosen = [(have + more)[:count] for have, more, count in zip(taken, spare, counts)]
        return [[dataclasses.replace(s, image_id=last(s.image_id)) for s in split] for split in chosen]


def _asked(sample: Sample) -> str:
    """What makes two questions the same: the words, and what was said before."""
    return json.dumps([sample.question, sample.messages], sort_keys=True)


def _named_apart(*splits: list[Sample]) -> list[list[Sample]]:
    """The same with unique ids: the second 'a' becomes 'a~2'."""
    taken = {s.id for split in splits for s in split}
    seen: Counter[str] = Counter()

    def named(sample: Sample) -> Sample:
        seen[sample.id] += 1
        if seen[sample.id] == 1:
            return sample
        name = f"{sample.id}~{seen[sample.id]}"
        while name in taken:
            name += "~"
        taken.add(name)
        return dataclasses.replace(sample, id=name)

    return [[named(sample) for sample in split] for split in splits]


__all__ = ["CalibrationSet", "ImageSource", "Sample", "fingerprint"]
