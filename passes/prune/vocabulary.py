"""prune.vocabulary: fewer tokens in embedding, head and tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ._tokens import Trim


@dataclass(frozen=True)
class Vocabulary(Pass):
    """Keep the tokens that a corpus, a script or a list needs; take all others out of embedding, head and tokenizer.

    Logits of the tokens that stay are exactly those from before, and a text whose tokens all stay is split exactly as
    before. Any other text is spelled by smaller tokens: bytes or characters, which always stay, as do special and added
    tokens, the ids that configs name, and the parts that BPE merges tokens from. Both tokenizers read all texts of the
    corpus and of all tokens before a weight is touched; a token without which one would be misread stays. Tokenizers
    without smaller parts (WordLevel) and models without a tokenizer.json are refused. Stock `from_pretrained` loads
    the result.

    Everything after this pass is measured and trained in the new ids: the original is lent without the same rows, and
    its softmax runs over the tokens that are left. What it gave to the others on the fit split is in the notes
    (`lost_mass`). Its answers, which decide what is right, stay those of the whole original.

    Settings:
        corpus: where needed tokens are counted: ``fit`` (questions and answers of the fit split), and text files (a
            text a line) or .jsonl/.json files of samples. What all fit questions have in common (the chat template)
            stays in any case.
        least: occurrences from which a token of the corpus counts as needed.
        scripts: Unicode scripts whose tokens all stay: latin, cyrillic, greek, han, hiragana, hangul, arabic, ...;
            ``common``: tokens without letters.
        keep: further words or tokens that stay, a list or a file with one a line.
    """

    name: ClassVar[str] = "prune.vocabulary"
    summary: ClassVar[str] = (
        "fewer tokens: embedding, head and tokenizer cut to what a corpus, a script or a list needs"
    )
    paper: ClassVar[str] = "after Abdaoui et al., Load What You Need, arXiv 2010.05609"

    corpus: tuple[str, ...] = ("fit",)
    least: int = 1
    scripts: tuple[str, ...] = ()
    keep: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ValueError(f"least is at least 1, not {self.least}")
        if not (self.corpus or self.scripts or self.keep):
            raise ValueError("corpus, scripts or keep has to say which tokens stay")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...compress.vocabulary import find_cut, named_ids, table_rows
        from ._tokens import backend

        self._wanted(model, ctx, backend(model.processor))
        rows = table_rows(model.model)
        find_cut(model, sorted(i for i in named_ids(model.model) if i < rows))

    def brief(self) -> Self:
        """What occurs once is needed: on the few samples of a rehearsal little occurs more often."""
        return replace(self, least=1)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.vocabulary import find_cut, narrow, ranges, table_rows

        trim, numbers = self._plan(model, ctx)  # may still refuse; no weight is touched yet
        cut = find_cut(model, trim.kept)
        rows = table_rows(model.model)
        before = sum(p.numel() for p in model.model.parameters())
        numbers |= self._lost_mass(model, ctx, trim.kept)
        narrow(model, cut)
        model.processor = trim.processor
        numbers |= {
            "tokens_before": rows,
            "tokens": len(trim.kept),
            "parameters_before": before,
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "tensors": sorted(cut.axes),
            "texts_read_by_both": trim.texts,
            "kept_or_misread": list(trim.spared),
        }
        return Notes(numbers, {"kept": ranges(trim.kept), "rows": len(trim.kept)})

    def ensures(self, model: ModelView) -> None:
        most = model.ledger.record_of(self)["rows"]
        tables = {"token embedding": model.model.get_input_embeddings(), "head": model.model.get_output_embeddings()}
        for what, table in tables.items():
            if table.weight.shape[0] > most:
                raise PromiseBroken(
                    f"{self.name} promised at most {most} tokens", where=what, found=f"{table.weight.shape[0]} rows"
                )

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        """Shapes and ids are in the config, tokens in the processor's files; which they were is told here."""
        from ...compress.vocabulary import composed, from_ranges

        model.vocabulary = composed(model.vocabulary, from_ranges(record["kept"]))

    def weaker(self) -> Self | None:
        """Half as many occurrences suffice, down to 1."""
        return replace(self, least=self.least // 2) if self.least > 1 else None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _wanted(self, model: ModelView, ctx: Context, core: object) -> tuple[dict[str, set[int]], list[str]]:
        """Ids that have to stay, by who asks for them, and the texts of the corpus.

        Raises:
            Unmet: no token of a script.
            DataError: a corpus file that cannot be read.
        """
        from ...compress.vocabulary import named_ids
        from ._tokens import FIT, corpus_texts, counted, fit_rows, of_scripts, of_words, texts_of

        rows = fit_rows(model, ctx.fit)
        texts = list(dict.fromkeys(texts_of(core, rows)))
        everywhere = set(rows[0]).intersection(*rows[1:]) if rows else set()
        wanted = {"configs": named_ids(model.model), "every_question": everywhere}
        for source in self.corpus:
            if source == FIT:
                counts = Counter(i for row in rows for i in row)
            else:
                lines = corpus_texts(Path(source))
                texts += lines
                counts = counted(core, lines)
            wanted[source] = {i for i, count in counts.items() if count >= self.least}
        if self.scripts:
            wanted["scripts"] = of_scripts(core, self.scripts)
        if self.keep:
            wanted["keep"] = of_words(core, self.keep)
        return wanted, texts

    def _plan(self, model: ModelView, ctx: Context) -> tuple[Trim, dict[str, Json]]:
        """The tokens that stay, why so many, and how many tokens the corpus takes before and after.

        Raises:
            Unmet: nothing to take out, or texts that a smaller tokenizer would misread.
        """
        from ...compress.vocabulary import table_rows
        from ._tokens import backend, length, trim

        core = backend(model.processor)
        wanted, texts = self._wanted(model, ctx, core)
        size = table_rows(model.model)
        made = trim(model, set().union(*wanted.values()), size, texts)
        if len(made.kept) == size:
            raise Unmet(
                f"{self.name} would take out nothing", found=f"all {size} tokens stay", change="a larger 'least'"
            )
        return made, {
            "asked_by": {source: len(ids) for source, ids in wanted.items()},
            "corpus_tokens_before": length(core, texts),
            "corpus_tokens": length(backend(made.processor), texts),
        }

    def _lost_mass(self, model: ModelView, ctx: Context, kept: tuple[int, ...]) -> dict[str, Json]:
        """The probability that the original gives to the other tokens, on the answers of the fit split."""
        import torch

        from ...calib.shown import as_original
        from ..distill._observe import answer_logits, has_answer

        found = []
        with ctx.teacher() as original, torch.no_grad():
            for batch in ctx.fit:
                if has_answer(original, batch):
                    gone = answer_logits(original, as_original(batch)).double().softmax(-1)
                    gone[:, list(kept)] = 0
                    found.append(gone.sum(-1))
        if not found:
            return {"lost_mass": None}
        mass = torch.cat(found)
        return {"lost_mass": float(mass.mean()), "lost_mass_max": float(mass.max())}
