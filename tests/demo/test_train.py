"""The trainer: its optimizer, and a run that is killed ends with the weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svlm.calib import muon


@pytest.mark.parametrize("shape", [(8, 8), (6, 12), (12, 6)])
def test_orthogonalise(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(x, steps=10))
    assert values.min() > 0.5 and values.max() < 1.3
    one = muon.orthogonalise(x[1:2], steps=10)[0]
    torch.testing.assert_close(one, muon.orthogonalise(x, steps=10)[1], atol=1e-4, rtol=0)


def test_muon_descends() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 4, generator=generator)
    weight = torch.zeros(6, 4, requires_grad=True)
    optimizer = muon.Muon([weight], lr=0.05)
    for _ in range(200):
        loss = (weight - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    from svlm.calib.demo import train

    small = ["--vision-batch", "5", "--batch", "5", "--questions", "2"]
    ends = []
    for name, legs in (("straight", [(2, 3)]), ("resumed", [(2, 0), (2, 1), (2, 3)])):
        for vision, full in legs:
            out = ["--out", str(tmp_path / name), "--resume"]
            options = train.parser().parse_args([*small, *out, "--vision-steps", str(vision), "--steps", str(full)])
            trainer = train.Trainer(options)
            if (tmp_path / name).exists():
                trainer.load(tmp_path / name / "checkpoint.pt")
            trainer.phases["full"] = 3  # the schedule of the whole run, of which a leg is a part
            for batch in trainer.batches():
                trainer.learn(batch)
                if trainer.step == vision + full:
                    break
            (tmp_path / name).mkdir(exist_ok=True)
            trainer.save(tmp_path / name / "checkpoint.pt")
        ends.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["average"])
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
