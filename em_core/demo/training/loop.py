"""The training loop that the autoencoder and the denoiser share."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .parallel import average_gradients, share_parameters
from .schedule import AveragedWeights, Log, cosine_rate

Parts = dict[str, float]
LossOf = Callable[[int], tuple[Tensor, Parts]]
AfterStep = Callable[[int], None]


@dataclass(frozen=True)
class Round:
    """One round of training: AdamW under a cosine that would end after `steps`.

    `end` is the share of them that is run, `batch` is per process, `average` the decay of the
    averaged weights.
    """

    steps: int
    rate: float
    batch: int
    end: float = 1.0
    warmup: int = 100
    weight_decay: float = 0.0
    average: float = 0.995
    seed: int = 0


def optimise(
    model: nn.Module,
    average: AveragedWeights,
    round_: Round,
    loss_of: LossOf,
    after: AfterStep,
    report: Callable[[int, Parts], None],
    checkpoint: Checkpoint,
) -> None:
    """Run a round, or the rest of it where its checkpoint exists.

    `loss_of` gets the number of steps done and must depend on nothing else that changes, or a round
    that goes on would not be the same. `report` gets the mean parts of the loss every 100 steps.

    Raises FloatingPointError when a gradient is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, round_.rate, (0.9, 0.99), weight_decay=round_.weight_decay
    )
    done, last = checkpoint.load(model, average, optimiser), round(round_.steps * round_.end)
    share_parameters(model.parameters())
    sums: Parts = defaultdict(float)
    for step in range(done, last):
        loss, parts = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        average_gradients(trained)
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(trained, 1.0)):
            raise FloatingPointError(f"The gradient is not finite at step {step}.")
        factor = cosine_rate(step / round_.steps, step, round_.warmup)
        optimiser.param_groups[0]["lr"] = round_.rate * factor
        optimiser.step()
        average.update(model)
        for name, value in parts.items():
            sums[name] += value / 100
        if (step + 1) % 100 == 0:
            report(step + 1, dict(sums))
            sums.clear()
        after(step + 1)
        due = (step + 1) % checkpoint.every == 0 or step + 1 == last
        if due and dist.get_rank() == 0:
            checkpoint.save(step + 1, model, average, optimiser)


def reporter(log: Log, part: str, rank: int, samples: int) -> Callable[[int, Parts], None]:
    """Write process 0's reports to a log; `samples` is how many a step takes in all."""

    def report(step: int, parts: Parts) -> None:
        if rank == 0:
            rounded = {name: round(value, 5) for name, value in parts.items()}
            log.write(part=part, step=step, samples=step * samples, **rounded)

    return report
