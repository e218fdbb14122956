"""Train a recorded FLUX case with our trainer, on the same draws, and compare every step and every tensor.

    python -m tests.parity.compare_flux RECORD [RECORD ...] [--out FOLDER]

As `compare` does for SD: losses have to agree to 1e-5 relative at every step and trained tensors to 1e-4.
Ends with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from tests.parity.compare import Findings, job_of, recorded_batch, relative, tensor_error, train
from tests.parity.replay import Record, ReplayDraws
from trainer.job import Job
from trainer.objectives import flow


def compare_objective(record: Record, job: Job, findings: Findings) -> None:
    """Noising, and the first loss's input, from recorded draws and latents."""
    objective = flow.prepare(job, "cpu")
    draws = ReplayDraws(0, record, [])
    worst_noisy = worst_loss = 0.0
    place = 0
    for micro, step in enumerate(record.micro_steps):
        latents = torch.stack([record.tensors[f"latents.{name}"] for name in step["pictures"]])
        draw_ids = tuple(range(place, place + len(latents)))
        place += len(latents)
        channels, height, width = latents.shape[1:]
        noised = objective.mix(
            latents, objective.noise_on_cpu((channels, height, width), draw_ids, micro, draws)
        )
        worst_noisy = max(worst_noisy, tensor_error(noised.noisy_BCHW, record.drawn(micro, "noisy_latents")))
        # What was recorded is already read by its prediction type: back to what the model gave.
        read = record.drawn(micro, "prediction")
        kind = job.config.model_prediction_type
        sigma = noised.sigma_B.view(-1, 1, 1, 1)
        if kind == "additive":
            read = read - noised.noisy_BCHW
        elif kind == "sigma_scaled":
            read = (noised.noisy_BCHW - read) / sigma
        loss, _ = objective.loss(read, noised, recorded_batch(step, draw_ids, latents))
        worst_loss = max(worst_loss, relative(float(loss), step["loss"]))
    findings.add("noised latents, worst step", f"{worst_noisy:.1e}", worst_noisy < 1e-6)
    findings.add("loss of recorded predictions, worst", f"{worst_loss:.1e}", worst_loss < 5e-6)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="keep what our trainer writes here")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    ok = True
    for folder in args.records:
        record = Record.load(folder)
        findings = Findings()
        with tempfile.TemporaryDirectory() as scratch:
            out = (args.out / folder.name) if args.out else Path(scratch)
            job = job_of(record, out, {})
            compare_objective(record, job, findings)
            train(record, [record], job, False, findings)
        findings.print(f"{folder.name}: {record.report['program']} and ours")
        ok = ok and findings.ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
