"""The exception tree is what the command line's exit codes and messages rest on."""

import pytest

from svlm.compress import errors
from svlm.compress.errors import SvlmError, did_you_mean

EXIT_CODES = {
    "SvlmError": 3, "UsageError": 2, "RecipeError": 2, "SelectorError": 2, "DataError": 2, "ModelError": 2,
    "OutputError": 2, "Unmet": 2, "GateFailed": 1, "PromiseBroken": 1, "WorkFailed": 3,
}  # fmt: skip


def _tree() -> list[type[SvlmError]]:
    found, todo = [], [SvlmError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_every_error_has_the_exit_code_of_the_documented_tree() -> None:
    assert {kind.__name__: kind.exit_code for kind in _tree()} == EXIT_CODES


@pytest.mark.parametrize("kind", _tree())
def test_the_docstring_draws_every_error(kind: type[SvlmError]) -> None:
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__


def test_a_message_says_what_where_found_and_what_to_change() -> None:
    error = errors.DataError("no such image", where="rows.jsonl, line 3", found="a.png", change="fix the path")
    assert str(error).splitlines() == [
        "no such image", "  where: rows.jsonl, line 3", "  found: a.png", "  try: fix the path",
    ]  # fmt: skip
    assert (error.what, error.where, error.found, error.change) == (
        "no such image", "rows.jsonl, line 3", "a.png", "fix the path",
    )  # fmt: skip


def test_a_message_leaves_out_what_is_not_known() -> None:
    assert str(errors.WorkFailed("the disk is full")) == "the disk is full"


def test_did_you_mean_offers_the_nearest_word_and_lists_all() -> None:
    assert did_you_mean("bit", ["group", "bits"]) == "did you mean 'bits'? known: bits, group"
    assert did_you_mean("zzzz", ["group", "bits"]) == "known: bits, group"
