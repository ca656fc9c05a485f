"""What carries out work on many items: here, now and one by one; the protocol of all others."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")
Result = TypeVar("Result")
Stop = Callable[[], bool]


class Lost:
    """Stands for a result that is lost with the process that had the item.

    Attributes:
        why: what is known of it.
    """

    def __init__(self, why: str = "") -> None:
        self.why = why


@runtime_checkable
class Executor(Protocol):
    """Carries out work on items in any order, and keeps its processes from one `map` to the next."""

    def map(
        self, work: Callable[[Item, Stop], Result], items: Iterable[Item], stop: Stop
    ) -> Iterator[tuple[Item, Result | Lost]]:
        """Yield each item and its result as they finish.

        Args:
            work: a function of a module, which others can import too; it gets an item and what tells it to
                stop.
            items: taken one by one as there is room for them; none is taken any more once `stop` is true.
            stop: whether to stop; what is at work is told so, and its results are waited for.
        """

    def close(self) -> None:
        """End all processes."""


class OneByOne:
    """Carries out work in this process."""

    def map(
        self, work: Callable[[Item, Stop], Result], items: Iterable[Item], stop: Stop
    ) -> Iterator[tuple[Item, Result | Lost]]:
        for item in items:
            if stop():
                return
            yield item, work(item, stop)

    def close(self) -> None:
        pass
