"""The state of a run: one value that is saved and loaded whole."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import UserError
from ..files import read_tensors, write_tensors

Curves = dict[str, list[tuple[int, float]]]
KIND = "visual-concepts run state 1"


@dataclass
class PictureState:
    """What the E-step knows of one picture with k concepts.

    Attributes:
        maps: [k, h, w] attention maps averaged over `rounds` rounds.
        rounds: number of rounds in `maps`, the start's included.
        pending: [k, h, w] sum of maps seen since the last E-step, `pending_count` [k] of them.
        masks: [k, H, W] masks that the M-step trains under, 0..1.
        labels: [k, H, W] the same as labels.
        contrast: [k] of the masks when they were estimated; see `Estimate`.
    """

    maps: Float[Tensor, "k h w"]
    rounds: int
    pending: Float[Tensor, "k h w"]
    pending_count: Float[Tensor, " k"]
    masks: Float[Tensor, "k H W"]
    labels: Bool[Tensor, "k H W"]
    contrast: Float[Tensor, " k"]

    def tensors(self) -> dict[str, Tensor]:
        names = ("maps", "pending", "pending_count", "masks", "labels", "contrast")
        return {"rounds": torch.tensor(self.rounds)} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> "PictureState":
        moved = {name: x.to(device) for name, x in tensors.items() if name != "rounds"}
        return cls(rounds=int(tensors["rounds"]), **moved)


@dataclass
class RunState:
    """Everything that changes during a run.

    Attributes:
        key: hash of the run's inputs; a state continues only the run that it came from.
        vectors: concept -> encoder -> token vectors [n, d].
        weights: weight tensors under training in the joint phase (LoRA factors or whole weights).
        moments: of an optimizer that was loaded and not yet built.
        optimizer: AdamW over both.
        generator: the one source of randomness.
        pictures: one per example.
        phase, step: "em" or "joint", and how many steps of it are done.
        settled: E-steps in a row that changed nothing.
        curves: name -> [(step, value)].
        finished: whether the EM loop has ended.
    """

    key: str
    vectors: dict[str, dict[str, nn.Parameter]]
    optimizer: torch.optim.AdamW
    generator: torch.Generator
    pictures: list[PictureState]
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    phase: str = "em"
    step: int = 0
    settled: int = 0
    finished: bool = False
    curves: Curves = field(default_factory=dict)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append to the curves."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))

    def to_file(self, path: Path) -> None:
        """Save as safetensors, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        tensors |= {f"vectors/{c}/{e}": v for c, of in self.vectors.items() for e, v in of.items()}
        tensors |= {f"weights/{name}": w for name, w in self.weights.items()}
        moments = self.moments or flatten_optimizer(self.optimizer)
        tensors |= {f"optimizer/{name}": x for name, x in moments.items()}
        for i, picture in enumerate(self.pictures):
            tensors |= {f"pictures/{i}/{name}": x for name, x in picture.tensors().items()}
        tensors["generator"] = self.generator.get_state()
        plain = {
            name: getattr(self, name)
            for name in ("key", "phase", "step", "settled", "finished", "curves")
        }
        write_tensors(path, {n: x.detach() for n, x in tensors.items()}, KIND, plain)

    def load(self, path: Path) -> None:
        """Take over the state in `path`; itself must be a fresh state of the same run.

        Moments of an optimizer that does not exist yet wait in `moments`.

        Raises:
            UserError: the file is not a state, is damaged, or belongs to another run.
        """
        tensors, plain = read_tensors(path, KIND)
        if plain.get("key") != self.key:
            raise UserError(
                f"{path} belongs to a run with other pictures, prompts, settings or model. "
                "Resume with the same inputs, or start a new run in another folder."
            )
        device = self.pictures[0].maps.device
        with torch.no_grad():
            for concept, of in self.vectors.items():
                for encoder, v in of.items():
                    v.copy_(tensors[f"vectors/{concept}/{encoder}"])
        self.weights = {
            n: nn.Parameter(w.to(device)) for n, w in below(tensors, "weights/").items()
        }
        self.moments = below(tensors, "optimizer/")
        self.pictures = [
            PictureState.from_tensors(below(tensors, f"pictures/{i}/"), device)
            for i in range(len(self.pictures))
        ]
        self.generator.set_state(tensors["generator"])
        self.phase, self.step, self.settled = plain["phase"], plain["step"], plain["settled"]
        self.finished = plain["finished"]
        self.curves = {
            name: [(s, v) for s, v in points] for name, points in plain["curves"].items()
        }
        if self.phase == "em":
            self.use_optimizer(self.optimizer)

    def use_optimizer(self, optimizer: torch.optim.AdamW) -> None:
        """Go on with this optimizer; moments that were loaded become its own."""
        self.optimizer = optimizer
        if self.moments:
            unflatten_optimizer(optimizer, self.moments)
            self.moments = {}


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter index>/<moment>` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{name}": torch.as_tensor(x) for i, of in state.items() for name, x in of.items()}


def unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`flatten_optimizer` for an optimizer over the same parameters."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        index, _, moment = name.partition("/")
        state.setdefault(int(index), {})[moment] = x
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
