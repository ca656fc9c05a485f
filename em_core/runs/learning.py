"""Learn concepts from beginning to end: the library's main entry point."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

from ..errors import StoreWarning, UserError
from ..examples import Example
from ..method.loop import StepEvent
from ..method.problem import Problem, prepare
from ..method.start import initialise
from ..method.state import RunState
from ..model.protocol import DiffusionModel
from ..presets import em_settings
from ..settings import EMSettings, JointSettings, VisualSettings
from .concept_set import ConceptSet, conclude
from .digest import Unreadable
from .key import model_digest, run_key
from .runner import Listener, run, steps
from .state_file import StateFile
from .store import Result, RunStore


class Learning(Iterator[StepEvent]):
    """A run to iterate over: each step yields an event, and `concepts()` returns what was learned so far.

    Attributes:
        problem: what the run works on.
        state: the state after the latest step.
    """

    def __init__(self, problem: Problem, state: RunState) -> None:
        self.problem, self.state = problem, state
        self._left = steps(problem, state)

    def __next__(self) -> StepEvent:
        event, self.state = next(self._left)
        return event

    def concepts(self) -> ConceptSet:
        """Return the concepts as they are now. This ends a joint phase that is still running."""
        self._left.close()
        return conclude(self.problem, self.state)


def learning(
    host: DiffusionModel,
    examples: Sequence[Example],
    settings: EMSettings | None = None,
    joint: JointSettings | None = None,
) -> Learning:
    """Start learning the concepts in the examples' prompts; see :func:`learn_concepts`.

    Example:
        run = learning(host, examples)
        for event in run:
            print(event.phase, event.step, event.losses)
        concepts = run.concepts()
    """
    problem = prepare(host, examples, settings or em_settings(host.identity().family), joint)
    return Learning(problem, initialise(problem))


def learn_concepts(
    host: DiffusionModel,
    examples: Sequence[Example],
    settings: EMSettings | None = None,
    joint: JointSettings | None = None,
    concepts: ConceptSet | None = None,
    *,
    listeners: Sequence[Listener] = (),
    store: RunStore | None = None,
    key: str | None = None,
) -> ConceptSet:
    """Learn a token for each concept in the examples' prompts, and find each concept's masks.

    Source: Rahman et al. 2024, arXiv 2402.11487; the joint phase is Break-a-Scene's.

    Args:
        host: the model, such as :class:`em_core.DiffusersHost`.
        examples: pictures with their prompts.
        settings: settings of the EM loop; None takes the defaults of the model's family.
        joint: settings of the phase that learns tokens and weights together; None skips it.
        concepts: concepts to go on from, learned before or imported: those that the prompts name start
            from their vectors. Weights that came with them act meanwhile, and are kept as they are.
        listeners: called with the event and the state of every step.
        store: where finished runs are kept for reuse, and stopped ones to be continued. What cannot be
            kept there is said by a StoreWarning; the concepts are returned all the same.
        key: key of the run in the store; None takes a hash of the model, the examples and the settings.

    Raises:
        UserError: examples, settings, concepts and model do not go together.
        TrainingError: a loss is not finite; with a store, the last good step is kept.
    """
    settings = settings or em_settings(host.identity().family)
    joint = joint or JointSettings()
    if concepts is not None:
        require_start(concepts, joint)
        concepts.require_fit(host.identity(), any_weights=True)
    if store is not None and key is None:
        key = key_or_none(host, examples, settings, joint, concepts=concepts)
    weights = (concepts.weights, concepts.lora_scale) if concepts else ({}, 1.0)
    known = concepts.vectors if concepts else None
    return carry_out(
        lambda: prepare(host, examples, settings, joint, known=known),
        lambda made, state: with_weights_of(concepts, conclude(made, state)),
        ConceptSet,
        lambda: host.applied(*weights) if weights[0] else nullcontext(),
        examples=examples,
        listeners=listeners,
        store=store,
        key=key,
    )


def require_start(concepts: ConceptSet, joint: JointSettings) -> None:
    """Refuse to learn further weights beside those of the concepts that a run goes on from.

    Raises:
        UserError: both are there.
    """
    if concepts.weights and joint.kind != "none":
        raise UserError(
            f"The concepts {', '.join(concepts.names)} have weights of their own, such as a LoRA, beside which no "
            "further ones are learned. Learn tokens alone, or start from concepts that are tokens alone."
        )


def with_weights_of(before: ConceptSet | None, learned: ConceptSet) -> ConceptSet:
    """Return what was learned, with the weights of the concepts that it went on from."""
    if before is None or not before.weights:
        return learned
    return replace(learned, weights=before.weights, lora_scale=before.lora_scale)


def carry_out(
    make: Callable[[], Problem],
    end: Callable[[Problem, RunState], Result],
    kind: type[Result],
    applied: Callable[[], AbstractContextManager[None]],
    *,
    examples: Sequence[Example],
    listeners: Sequence[Listener],
    store: RunStore | None,
    key: str | None,
) -> Result:
    """Return the result of a finished run from the store, or run what is left of it and keep its result.

    Args:
        make: gives what the run works on.
        end: gives the result that its last state holds, of the type `kind`.
        applied: lets learned weights act in the model while the run goes on.
        examples, listeners, store, key: as of :func:`learn_concepts`; without a key nothing is kept.
    """
    if store is None or key is None:
        with applied():
            problem = make()
            state = run(problem, initialise(problem), listeners)
        return end(problem, state)
    found = store.finished(key, examples, kind)
    if found is not None:
        return found
    file = store.state(key, examples)
    try:
        with applied():
            problem = make()
            state = run(problem, state_of(problem, file), listeners, file)
    finally:
        store.prune(keep=file.path)
    result = end(problem, state)
    store.keep(key, result)
    return result


def key_or_none(
    host: DiffusionModel,
    examples: Sequence[Example],
    settings: EMSettings,
    joint: JointSettings,
    visual: VisualSettings | None = None,
    concepts: ConceptSet | None = None,
) -> str | None:
    """Return a run's key, or warn and return None if something that acts on it cannot be read."""
    try:
        return run_key(model_digest(host), examples, settings, joint, visual, concepts)
    except Unreadable as error:
        warnings.warn(
            f"This run is neither looked up nor kept in the store: the model holds {error}, which "
            "cannot be read.",
            StoreWarning,
            stacklevel=3,
        )
        return None


def state_of(problem: Problem, file: StateFile) -> RunState:
    """Load the state of a stopped run, or start anew if there is no such file or it is damaged."""
    if file.exists():
        try:
            return file.load(problem.host.device)
        except UserError:
            with suppress(OSError):
                file.remove()
    return initialise(problem)
