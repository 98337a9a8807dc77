"""--help and the menu answer at once: half a second of CPU, and no torch."""

import os
import resource
import subprocess
import sys

import pytest

LIMIT = 0.5  # seconds of CPU time, user and system
# the children inherit the search path of this process, so that they run the svlm under test
CODE = "import sys; from svlm.cli import main; code = main(sys.argv[1:]); print(*sorted(sys.modules)); sys.exit(code)"


def _run(*arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done


@pytest.mark.parametrize(
    "arguments", [("--help",), ("passes",), ("passes", "quantize.gptq"), ("compress", "--help"), ("export", "--help")]
)
def test_answers_within_half_a_second_and_without_torch(arguments: tuple[str, ...]) -> None:
    _run(*arguments)  # the first run may compile byte code
    seconds, done = min((_run(*arguments) for _ in range(3)), key=lambda pair: pair[0])
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.splitlines()[-1].split())
    assert "click" in modules
    assert not {"torch", "transformers", "numpy", "matplotlib", "PIL"} & modules
    assert seconds < LIMIT, f"{seconds:.2f} s of CPU time"


def test_import_svlm_is_light() -> None:
    code = "import sys, svlm; print(svlm.__version__, 'torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
