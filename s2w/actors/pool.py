"""A pool of actors of one kind: all that knows about their lives, and the queue of what they are asked.

Requests wait in one queue, and a member has a bounded number of them: one that joins finds work, and what waits is not
bound to a member that dies. A request of a dead member goes back to the front of the queue. Each member is asked for a
sign of life, so one that hangs is found like one that dies; both are replaced while the others go on.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import ray

from s2w.actors.calls import all_up, as_future
from s2w.actors.failures import PROCESS_DEATHS, reason
from s2w.actors.starting import Watcher, watched
from s2w.actors.vllm import SHUTDOWN_S
from s2w.config.schema import ClusterConfig
from s2w.errors import LeftOutError
from s2w.records import Fault

BEAT_S = 5.0
"""Seconds between two questions for a sign of life."""
QUEUE_DEPTH = 2
"""Requests that a member has for each that it can run at once, so that it never waits for the next one."""
SUSPECT = 2
"""Deaths under one request from which on it may be their cause: it runs beside no other such request."""
FIRST_BACKOFF_S = 1.0
"""Seconds before the second try to start a replacement; four times as long before each further one."""

State = Literal["starting", "loaded", "serving"]


class Actors(Protocol):
    """What differs between the pools."""

    def create(self, number: int, slot: int) -> Any:
        """A new actor.

        Args:
            number: its own, which no other member of the pool ever has.
            slot: its place, from 0 to the size of the pool, which a replacement takes over.
        """

    def load(self, actor: Any) -> ray.ObjectRef:
        """Makes a new actor ready to serve."""

    def forget(self, number: int) -> None:
        """The member is gone, and its prefix cache with it."""


@dataclass(eq=False, slots=True)
class Member:
    """An actor of the pool."""

    number: int
    slot: int
    actor: Any
    state: State = "starting"
    requests: int = 0
    """That it has now."""
    suspects: int = 0
    """Of these, how many may be what kills members."""
    beat: asyncio.Task[None] | None = None


Choose = Callable[[Sequence[Member]], Member | None]
"""Takes one of the members that may be asked, or none of them yet."""


@dataclass(eq=False, slots=True)
class _Waiting:
    choose: Choose
    suspect: bool
    member: asyncio.Future[Member] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class UnresponsiveError(RuntimeError):
    """A member gives no sign of life."""


class Pool:
    """``size`` actors, driven from the controller's event loop.

    Args:
        name: of a member in messages, before its number.
        sequences: requests that a member can run at once.
        cluster: how long members may take to start and to answer, and how often a start is tried.
        on_fault: called with each death once its member is replaced, or will not be.
    """

    def __init__(
        self,
        name: str,
        size: int,
        actors: Actors,
        *,
        sequences: int,
        in_turn: bool = False,
        cluster: ClusterConfig,
        on_fault: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self.name = name
        self._actors, self._cluster, self._in_turn = actors, cluster, in_turn
        self.at_once = QUEUE_DEPTH * sequences
        """Requests that a member has at most."""
        self._on_fault = on_fault
        self._watcher: Watcher | None = None
        self._waiting: deque[_Waiting] = deque()
        self._replacing: set[asyncio.Task[None]] = set()
        self._lost: Exception | None = None
        self._next = 0
        self.admission: Callable[[], None] | None = None
        """Called when a replacement has loaded, which :meth:`admit` then lets serve; without it, it does at once."""
        self.members = [self._member(slot) for slot in range(size)]
        """All that are not gone."""

    async def start(self, timeout_s: float, watcher: Watcher | None = None) -> list[Any]:
        """Waits until every member has loaded; returns what their start did.

        Args:
            watcher: shows what the members do meanwhile, and later who dies and those that replace them.

        Raises:
            RuntimeError: a member could not be placed, could not load, or died in each of ``cluster.start_attempts``
                starts.
        """
        self._watcher = watcher
        together = [[member] for member in self.members] if self._in_turn else [self.members]
        answers = [answer for members in together for answer in await self._start(members, timeout_s)]
        for member in self.members:
            self._serve(member)
        return answers

    async def _start(self, members: Sequence[Member], timeout_s: float) -> list[Any]:
        """Loads members, and those that die meanwhile again; what their start did, in their order."""
        answers: dict[int, Any] = {}
        starting = list(members)
        for attempt in range(self._cluster.start_attempts):
            loaded = await self._load(starting, timeout_s)
            answers |= {member.slot: loaded[member.number] for member in starting}
            dead = [member for member in starting if isinstance(loaded[member.number], Exception)]
            if not dead:
                break
            if attempt + 1 == self._cluster.start_attempts:
                raise answers[dead[0].slot]
            starting = []
            for member in dead:
                self._warn(f"{loaded[member.number]}; it is started again")
                await self._end(member, in_order=False)
                again = self._member(member.slot)
                self.members[self.members.index(member)] = again
                starting.append(again)
        return [answers[member.slot] for member in members]

    @property
    def serving(self) -> list[Member]:
        """Members that take requests."""
        return [member for member in self.members if member.state == "serving"]

    @property
    def loaded(self) -> list[Member]:
        """Members that wait for :meth:`admit`."""
        return [member for member in self.members if member.state == "loaded"]

    async def call(
        self,
        uid: str,
        ask: Callable[[Member], ray.ObjectRef],
        choose: Choose,
        done: Callable[[Member], None] = lambda member: None,
    ) -> Any:
        """One request, repeated at another member if one dies; cancelling it cancels the actor's call.

        Args:
            uid: of the request, for messages.
            ask: makes the call to a member's actor.
            choose: the member, of those that have room.
            done: called when the member does not have the request any more.

        Raises:
            LeftOutError: members died under it, the last one under it alone of all such requests.
            RuntimeError: no member is left.
            Exception: what the actor raised.
        """
        deaths = 0
        while True:
            suspect = deaths >= SUSPECT
            async with self.member(choose, suspect=suspect, first=deaths > 0) as member:
                call = ask(member)
                try:
                    return await call
                except asyncio.CancelledError:
                    ray.cancel(call)
                    raise
                except PROCESS_DEATHS as error:
                    self.lose(member.number, error)
                    deaths += 1
                    if suspect:
                        raise LeftOutError(
                            f"{uid}: {deaths} {self.name}s died while they had this request; it is left out"
                        ) from error
                finally:
                    done(member)

    @asynccontextmanager
    async def member(self, choose: Choose, *, suspect: bool = False, first: bool = False) -> AsyncIterator[Member]:
        """A member for one request, which it has until the context ends.

        Args:
            suspect: the request may be what kills members.
            first: ahead of all that wait.

        Raises:
            RuntimeError: no member is left.
        """
        member = await self._acquire(choose, suspect, first)
        try:
            yield member
        finally:
            self._release(member, suspect)

    def lose(self, number: int, error: BaseException) -> None:
        """The member has died, or cannot be used any more: it is ended and replaced, in the background."""
        member = next((member for member in self.members if member.number == number), None)
        if member is None:
            return  # Another request found out earlier.
        who = self._who(member)
        why = reason(error, who)
        self._warn(f"{who} is lost: {why}; it is replaced, and its requests go to others")
        self._remove(member)
        dead = isinstance(error, PROCESS_DEATHS)
        task = asyncio.create_task(self._replace(member, dead, why, time.time()))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    def admit(self, number: int) -> None:
        """Lets a loaded member serve."""
        for member in self.loaded:
            if member.number == number:
                self._serve(member)

    async def check(self) -> None:
        """Finds out now which members are dead."""

        async def beat(member: Member) -> None:
            with suppress(TimeoutError):  # It hangs, which its own watch finds.
                try:
                    await asyncio.wait_for(as_future(member.actor.beat.remote()), BEAT_S)
                except PROCESS_DEATHS as error:
                    self.lose(member.number, error)

        await asyncio.gather(*map(beat, self.serving))

    async def any_left(self) -> None:
        """Waits until a member serves or has loaded.

        Raises:
            RuntimeError: none is left, and none will come.
        """
        while not (self.serving or self.loaded):
            if not self._replacing:
                raise self._none_left()
            await asyncio.wait(self._replacing, return_when=asyncio.FIRST_COMPLETED)

    async def shutdown(self) -> None:
        """Ends the members and their processes: those that have not started, or do not answer, by force."""
        for task in list(self._replacing):
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        members, self.members = self.members, []
        for member in members:
            if member.beat is not None:
                member.beat.cancel()
        up = ("serving", "loaded")
        await asyncio.gather(*(self._end(member, in_order=member.state in up) for member in members))

    def _member(self, slot: int) -> Member:
        number, self._next = self._next, self._next + 1
        return Member(number, slot, self._actors.create(number, slot))

    def _warn(self, text: str) -> None:
        if self._watcher is not None:
            self._watcher.warn(text)

    def _who(self, member: Member) -> str:
        return f"{self.name} {member.number}"

    async def _load(self, members: Sequence[Member], timeout_s: float) -> dict[int, Any]:
        """Results by number, as :func:`s2w.actors.calls.all_up`."""
        actors = {member.number: member.actor for member in members}
        async with watched(self.name, actors, self._watcher) as stages:
            calls = {number: self._actors.load(actor) for number, actor in actors.items()}
            return await all_up(self.name, calls, timeout_s, stages)

    def _serve(self, member: Member) -> None:
        member.state = "serving"
        member.beat = asyncio.create_task(self._watch(member))
        self._hand_out()

    async def _watch(self, member: Member) -> None:
        """Loses the member when it dies or gives no sign of life."""
        limit = self._cluster.hang_timeout_s
        try:
            while True:
                await asyncio.sleep(BEAT_S)
                await asyncio.wait_for(as_future(member.actor.beat.remote()), limit)
        except TimeoutError:
            self.lose(
                member.number,
                UnresponsiveError(f"it has given no sign of life for {limit:g} s (cluster.hang_timeout_s)"),
            )
        except PROCESS_DEATHS as error:
            self.lose(member.number, error)

    def _remove(self, member: Member) -> None:
        """Takes a member out of the pool."""
        self.members.remove(member)
        self._actors.forget(member.number)
        if member.beat is not None and member.beat is not asyncio.current_task():
            member.beat.cancel()

    async def _replace(self, lost: Member, dead: bool, why: str, since: float) -> None:
        """Ends a lost member, which makes its requests fail and so go back to the queue, and starts another in its
        place; tries again where that fails."""
        await self._end(lost, in_order=not dead)
        pause = FIRST_BACKOFF_S
        for attempt in range(self._cluster.start_attempts):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 4
            member: Member | None = None
            try:
                member = self._member(lost.slot)
                self.members.append(member)
                [result] = (await self._load([member], self._cluster.start_timeout_s)).values()
                if isinstance(result, Exception):
                    raise result
            except Exception as error:
                self._lost = error
                if member is not None:
                    self._remove(member)
                    await self._end(member, in_order=False)
                self._warn(
                    f"{self.name} {self._next - 1}, which was to replace {self._who(lost)}, failed: {reason(error)}"
                )
                continue
            seconds = time.time() - since
            self._warn(f"{self._who(member)} has replaced {self._who(lost)} after {seconds:.0f} s")
            self._on_fault(Fault(since, self.name, self._who(lost), why, self._who(member), seconds))
            if self.admission is None:
                self._serve(member)
            else:
                member.state = "loaded"
                self.admission()
            return
        self._on_fault(Fault(since, self.name, self._who(lost), why, None, None))
        # Those that wait hear of it if this was the last one; see any_left.
        asyncio.get_running_loop().call_soon(self._give_up)

    def _give_up(self) -> None:
        """Fails what waits if nobody is left to take it."""
        if self.members or any(not task.done() for task in self._replacing):
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.member.done():
                waiting.member.set_exception(self._none_left())

    def _none_left(self) -> RuntimeError:
        why = f": {reason(self._lost)}" if self._lost else ""
        return RuntimeError(f"no {self.name} is left{why}")

    async def _acquire(self, choose: Choose, suspect: bool, first: bool) -> Member:
        if not self.members and not self._replacing:
            raise self._none_left()
        waiting = _Waiting(choose, suspect)
        (self._waiting.appendleft if first else self._waiting.append)(waiting)
        self._hand_out()
        try:
            return await waiting.member
        except asyncio.CancelledError:
            if waiting.member.done() and not waiting.member.cancelled() and not waiting.member.exception():
                self._release(waiting.member.result(), suspect)
            raise

    def _release(self, member: Member, suspect: bool) -> None:
        member.requests -= 1
        member.suspects -= suspect
        self._hand_out()

    def _hand_out(self) -> None:
        """Gives what waits to the members that have room, the oldest first."""
        kept: list[_Waiting] = []
        while self._waiting:
            room = [member for member in self.serving if member.requests < self.at_once]
            if not room:
                break
            waiting = self._waiting.popleft()
            if waiting.member.done():
                continue  # Cancelled.
            if waiting.suspect:
                room = [member for member in room if not member.suspects]
            member = waiting.choose(room) if room else None
            if member is None:
                kept.append(waiting)
                continue
            member.requests += 1
            member.suspects += waiting.suspect
            waiting.member.set_result(member)
        self._waiting.extendleft(reversed(kept))

    async def _end(self, member: Member, *, in_order: bool) -> None:
        """Ends a member, dead or alive.

        Args:
            in_order: by its own method first, which reaches an engine core that hangs. The kill frees the resources of
                an actor that has not started, or is stuck itself.
        """
        if in_order:
            with suppress(Exception):
                await asyncio.wait_for(as_future(member.actor.shutdown.remote()), SHUTDOWN_S)
        ray.kill(member.actor)


def least_busy(members: Sequence[Member]) -> Member:
    """The member with the fewest requests."""
    return min(members, key=lambda member: (member.requests, member.number))


def idle(members: Sequence[Member]) -> Member | None:
    """A member without any request."""
    return next((member for member in members if not member.requests), None)
