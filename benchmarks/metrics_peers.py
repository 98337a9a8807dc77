"""What public implementations make of made-up answers: writes tests/calib/metrics_peers.json, which tests compare with.

Needs lmms-eval 0.7.3 and pycocoevalcap 1.2 (``pip install --no-deps lmms-eval pycocoevalcap loguru``; nothing else of
what they depend on is used):

    python benchmarks/metrics_peers.py
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "tests" / "calib" / "metrics_peers.json"
ANSWERS = [
    "yes", "No.", "two", "2", "a dog", "The dog", "dont know", "don't know", "red, white and blue", "1,000", "1000",
    "red white and blue", "3.5", "35", "T-shirt", "t shirt", "none", "0", "5:30", "5.30 pm", "girl's", "girls",
    "wheres waldo", "yall'd've", "o'clock", "black/white", "black / white", "u.s.a.", "U.S.A", "ten", "an apple",
    "apple?", "(left)", "left_hand", '"quoted"', "50%", "$5", "it's", "its", "no one", "A", "somebodyd've",
    "new\nyork", "new  york",
]  # fmt: skip
LETTERS = "abcdefghij 0123"
NUMBERS = [
    "12",
    "12.5",
    "0",
    "0.0",
    "-3",
    "12%",
    "0.12",
    "1,250",
    "1250",
    "1e3",
    "abc",
    "12 %",
    "nan",
    "",
    "Yes",
    "yes",
]
SAID = ["yes", "Yes", "no", "NO", " yes ", "maybe", "", "the dog", "no"]
WORDS = ["a", "the", "dog", "cat", "man", "woman", "sits", "runs", "on", "in", "under", "red", "big", "bench", "grass"]
WORDS += ["with", "ball", "hat", "it's", "two"]


def package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


LMMS = package("lmms_eval")


def lmms(module: str) -> ModuleType:
    """A module of lmms-eval; the packages around it without what their __init__ imports."""
    for name in ("lmms_eval", "lmms_eval.tasks"):
        if name not in sys.modules:
            bare = ModuleType(name)
            bare.__path__ = [str(LMMS.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = bare
    return importlib.import_module(f"lmms_eval.{module}")


def function(file: str, name: str) -> Any:
    """One function of a file of lmms-eval whose imports are not needed, with those of the file that it calls."""
    import ast

    source = (LMMS / file).read_text()
    wanted = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    for node in wanted:
        node.decorator_list = []
    kept = [n for n in wanted if n.name in (name, "levenshtein_distance")]
    space: dict[str, Any] = {}
    exec(compile(ast.Module(kept, []), file, "exec"), space)
    return space[name]


def vqa(draw: random.Random) -> list[dict[str, Any]]:
    score, text = lmms("tasks.vqav2.utils").vqav2_process_results, lmms("tasks.textvqa.utils").textvqa_process_results
    processor = lmms("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    rows = []
    for i in range(80):
        few = draw.sample(ANSWERS, 4)
        people = draw.choices(few, [6, 3, 2, 1], k=10)
        said = draw.choice([*few, *few, draw.choice(ANSWERS)])
        doc = {"question_id": i, "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(people)]}
        row = {"answer": said, "references": people, "score": score(doc, [said])["exact_match"]}
        if not any(mark in "".join([said, *people]) for mark in (",", "?", "'s")):  # TextVQA's own tokens
            row["textvqa"] = text({"question_id": i, "answers": list(people)}, [said])["exact_match"]
        rows.append(row)
    for answer in ANSWERS:
        plain = answer.replace("\n", " ").replace("\t", " ").strip()
        spelled = processor.process_digit_article(processor.process_punctuation(plain))
        rows.append({"answer": answer, "spelled": spelled})
    return rows


def anls(draw: random.Random) -> list[dict[str, Any]]:
    score = function("api/metrics.py", "anls")
    rows = []
    for _ in range(80):
        right = "".join(draw.choices(LETTERS, k=draw.randint(1, 14))).strip() or "x"
        letters = list(right)
        for _ in range(draw.randint(0, 5)):
            letters[draw.randrange(len(letters))] = draw.choice(["", "z", "Q", "b"])
        said, others = (
            " ".join("".join(letters).split()),
            [" ".join(right.split()), draw.choice(["other", right.upper()])],
        )
        others = [" ".join(other.split()) for other in others]
        rows.append({"answer": said, "references": others, "score": score(others, [said])["anls"]})
    return rows


def relaxed(draw: random.Random) -> list[dict[str, Any]]:
    score = function("tasks/chartqa/utils.py", "relaxed_correctness")
    pairs = [(a, b) for a in NUMBERS for b in draw.sample(NUMBERS, 4)]
    pairs += [(str(round(100 * (1 + draw.uniform(-0.1, 0.1)), 2)), "100") for _ in range(30)]
    pairs += [("95", "100"), ("105", "100"), ("94.99", "100"), ("105.01", "100"), ("-3.1", "-3")]
    return [{"answer": a, "references": [b], "score": bool(score(a, b))} for a, b in pairs]


def pope(draw: random.Random) -> dict[str, Any]:
    task = lmms("tasks.pope.utils")
    rows = [{"answer": draw.choice(SAID[:5]), "right": draw.choice(["yes", "no"])} for _ in range(60)]
    found = [
        task.pope_process_results({"question_id": i, "answer": row["right"]}, [row["answer"]])["pope_f1_score"]
        for i, row in enumerate(rows)
    ]
    figures = ("accuracy", "precision", "recall", "f1_score")
    return {"rows": rows, **{key: getattr(task, f"pope_aggregate_{key}")(found) for key in figures}}


def captions(draw: random.Random) -> dict[str, Any]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    references = [[" ".join(draw.choices(WORDS, k=draw.randint(5, 9))) for _ in range(3)] for _ in range(24)]
    said = []
    for texts in references:
        words = draw.choice(texts).split()
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        said.append(" ".join(words[: draw.randint(3, 9)]))
    gts, res = dict(enumerate(references)), {i: [text] for i, text in enumerate(said)}
    return {
        "answers": said,
        "references": references,
        "cider": [float(x) for x in Cider().compute_score(gts, res)[1]],
        "bleu": [float(x) for x in Bleu(4).compute_score(gts, res, verbose=0)[1][-1]],
    }


def main() -> None:
    made = {
        "made by": "benchmarks/metrics_peers.py",
        "lmms-eval": version("lmms-eval"),
        "pycocoevalcap": version("pycocoevalcap"),
        "vqa": vqa(random.Random(1)),
        "anls": anls(random.Random(2)),
        "relaxed": relaxed(random.Random(3)),
        "pope": pope(random.Random(4)),
        "captions": captions(random.Random(5)),
    }
    OUT.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
