"""The scheduler: a story and a scene to a list of what is done where, and for how long.

Story-to-Motion asks a large language model. Here that is any function from a prompt to an answer,
which must be JSON of one form; without one, rules read plain sentences ("Anna walks to the door,
then she waves."). Nothing here needs a network.

    segments = schedule(story, scene)                        # by rules
    segments = schedule(story, scene, language_model=ask)    # ask("...") -> '[{"text": ...}]'

Places become paths by A* over the free cells of the scene, whose corners are then cut where the
straight way is free.
"""

import heapq
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

WALKING = 1.4
"""Metres a second, which a segment without a duration is walked at."""
IN_PLACE = 3.0
"""Seconds of what is done in one place and is not said how long."""

VERBS = {
    "walk": "a person walks",
    "go": "a person walks",
    "come": "a person walks",
    "stroll": "a person walks",
    "run": "a person runs",
    "jog": "a person runs",
    "rush": "a person runs",
    "hurry": "a person runs",
    "sit": "a person sits",
    "rest": "a person sits",
    "wave": "a person waves",
    "greet": "a person waves",
    "stand": "a person stands",
    "wait": "a person stands",
    "look": "a person stands",
    "stop": "a person stands",
}
"""Verb -> what a clip's caption says."""
PAST = {"went": "go", "came": "come", "ran": "run", "sat": "sit", "stood": "stand"}


class Segment(NamedTuple):
    """One thing that is done.

    Attributes:
      text: what.
      place: where it ends, in metres, y up; None: where the one before ended.
      seconds: how long.
    """

    text: str
    place: tuple[float, float, float] | None
    seconds: float


@dataclass(frozen=True)
class Scene:
    """A map.

    Attributes:
      places: where what has a name is, in metres, y up.
      blocked: cells of the ground (x, then z) that nobody can walk on; None: all are free.
      cell: size of a cell, in metres.
      origin: x and z of the corner of the first cell.
    """

    places: Mapping[str, tuple[float, float, float]]
    blocked: Bool[np.ndarray, "x z"] | None = field(default=None, repr=False)
    cell: float = 0.25
    origin: tuple[float, float] = (0.0, 0.0)


def schedule(
    story: str,
    scene: Scene,
    language_model: Callable[[str], str] | None = None,
    start: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> list[Segment]:
    """What is done, one after the other.

    Args:
      story: plain text.
      scene: whose places it names.
      language_model: from the prompt to an answer; None: rules.
      start: where the character is at first.

    Raises:
      ValueError: if the answer is not of the form that was asked for, or rules find nothing.
    """
    if language_model is None:
        return by_rules(story, scene, start)
    return parse_answer(language_model(prompt(story, scene)), start)


def prompt(story: str, scene: Scene) -> str:
    """What a language model is asked."""
    places = json.dumps({name: list(place) for name, place in scene.places.items()})
    return (
        "Turn the story into a schedule for one character. Answer with a JSON list only. Each item "
        'has "text" (one action, such as "a person walks"), "position" ([x, y, z] in metres where '
        'it ends, or null for no change) and "duration" (seconds, or null).\n'
        f"Places: {places}\nStory: {story}"
    )


def parse_answer(answer: str, start: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> list[Segment]:
    """The segments of an answer; a missing duration is the distance at walking speed.

    Raises:
      ValueError: naming the first thing that is not as asked for.
    """
    text = re.sub(r"^\s*```(?:json)?\s*|\s*```\s*$", "", answer)
    try:
        items = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The answer is no JSON ({error}): {answer[:60]!r}.") from None
    if not isinstance(items, list) or not items:
        raise ValueError(f"The answer must be a list of actions, not {str(items)[:60]!r}.")
    segments, here = [], start
    for number, item in enumerate(items):
        segment = _checked(item, number, here)
        here = segment.place or here
        segments.append(segment)
    return segments


def _checked(item: object, number: int, here: tuple[float, float, float]) -> Segment:
    known = {"text", "position", "duration"}
    if not isinstance(item, dict) or "text" not in item or set(item) - known:
        raise ValueError(
            f"Action {number} must be an object of text, position and duration, not {item!r}."
        )
    text, place, seconds = item["text"], item.get("position"), item.get("duration")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"Action {number} needs words for its text, not {text!r}.")
    if place is not None:
        if not isinstance(place, list) or len(place) != 3 or not all(map(_is_number, place)):
            raise ValueError(f"Action {number} needs a position [x, y, z], not {place!r}.")
        place = tuple(float(x) for x in place)
    if seconds is None:
        seconds = IN_PLACE if place is None else max(_distance(here, place) / WALKING, 1.0)
    if not _is_number(seconds) or seconds <= 0:
        raise ValueError(f"Action {number} needs a duration above 0 seconds, not {seconds!r}.")
    return Segment(text, place, float(seconds))


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return math.hypot(a[0] - b[0], a[2] - b[2])


def by_rules(
    story: str, scene: Scene, start: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> list[Segment]:
    """Segments of plain sentences: a verb of `VERBS`, a place of the scene, "for 5 seconds".

    A part without a verb that names a place is walked to; one with neither is left out.

    Raises:
      ValueError: if nothing is found.
    """
    segments, here = [], start
    for part in re.split(r"[.!?;]+|,?\s*\b(?:and\s+)?then\b|,\s*and\b|\band\b", story.lower()):
        verbs = [VERBS[verb] for word in re.findall(r"[a-z]+", part) if (verb := _verb(word))]
        named = [
            name for name in scene.places if re.search(rf"\b{re.escape(name.lower())}\b", part)
        ]
        if not verbs and not named:
            continue
        text = verbs[0] if verbs else "a person walks"
        place = max(named, key=len) if named else None
        moving = text in ("a person walks", "a person runs")
        if place is not None and not moving:  # "sits at the bench": walk there first
            there = scene.places[place]
            if _distance(here, there) > 0.5:
                segments.append(_going("a person walks", here, there))
                here = there
            place = None
        said = re.search(r"for (\d+(?:\.\d+)?) seconds?", part)
        if place is not None:
            there = scene.places[place]
            segment = _going(text, here, there)
            here = there
        else:
            segment = Segment(text, None, IN_PLACE)
        segments.append(segment._replace(seconds=float(said[1])) if said else segment)
    if not segments:
        raise ValueError(
            f"The rules find nothing to do in {story[:60]!r}; name a place of the scene "
            f"({', '.join(scene.places)}) or use one of {', '.join(VERBS)}."
        )
    return segments


def _going(text: str, here: Sequence[float], there: tuple[float, float, float]) -> Segment:
    speed = 2.4 if text == "a person runs" else WALKING
    return Segment(text, there, max(_distance(here, there) / speed, 1.0))


def _verb(word: str) -> str | None:
    from zoo.motion.matching import stem

    word = PAST.get(word, word)
    stems = {stem(verb): verb for verb in VERBS}
    return word if word in VERBS else stems.get(stem(word))


# -------------------------------------------------------------------------------- paths


def find_path(
    scene: Scene, start: tuple[float, float], goal: tuple[float, float], points: int = 64
) -> Float[np.ndarray, "points 2"]:
    """Points at equal distances on a free way (A*, corners cut where that is free).

    Args:
      scene: whose blocked cells are gone around.
      start: x and z of its first point.
      goal: of its last.
      points: how many.

    Raises:
      ValueError: if there is no free way.
    """
    ends = np.array([start, goal], float)
    if scene.blocked is None:
        return _even(ends, points)
    cells = [tuple(np.floor((end - scene.origin) / scene.cell).astype(int)) for end in ends]
    for cell, end in zip(cells, ends, strict=True):
        if not _free(scene, cell):
            raise ValueError(f"The place {tuple(map(float, end))} is blocked or off the map.")
    route = _search(scene, *cells)
    middle = [(np.array(cell) + 0.5) * scene.cell + scene.origin for cell in route[1:-1]]
    way = [ends[0], *middle, ends[1]]
    kept, at = [way[0]], 0
    while at < len(way) - 1:
        at = next(i for i in range(len(way) - 1, at, -1) if i == at + 1
                  or _sees(scene, way[at], way[i]))  # fmt: skip
        kept.append(way[at])
    return _even(np.array(kept), points)


def _free(scene: Scene, cell: tuple[int, int]) -> bool:
    inside = all(0 <= c < n for c, n in zip(cell, scene.blocked.shape, strict=True))
    return inside and not scene.blocked[cell]


def _search(scene: Scene, start: tuple[int, int], goal: tuple[int, int]) -> list[tuple[int, int]]:
    """The cells of a shortest way; diagonals do not cut blocked corners."""
    came: dict[tuple[int, int], tuple[int, int] | None] = {start: None}
    cost, queue = {start: 0.0}, [(0.0, start)]
    while queue:
        _, cell = heapq.heappop(queue)
        if cell == goal:
            route = [cell]
            while (cell := came[cell]) is not None:
                route.append(cell)
            return route[::-1]
        for dx in (-1, 0, 1):
            for dz in (-1, 0, 1):
                other = (cell[0] + dx, cell[1] + dz)
                beside = (other, (cell[0] + dx, cell[1]), (cell[0], cell[1] + dz))
                if other == cell or not all(_free(scene, each) for each in beside):
                    continue
                new = cost[cell] + math.hypot(dx, dz)
                if new < cost.get(other, math.inf) - 1e-9:
                    cost[other], came[other] = new, cell
                    ahead = math.hypot(goal[0] - other[0], goal[1] - other[1])
                    heapq.heappush(queue, (new + ahead, other))
    raise ValueError(f"There is no free way from cell {start} to cell {goal} of the scene.")


def _sees(scene: Scene, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the straight way is free, half a cell on both sides included."""
    count = max(2, int(4 * np.linalg.norm(b - a) / scene.cell))
    side = np.array([b[1] - a[1], a[0] - b[0]]) / max(np.linalg.norm(b - a), 1e-9)
    for shift in (-0.5, 0.0, 0.5):
        line = a + np.linspace(0, 1, count)[:, None] * (b - a) + shift * scene.cell * side
        cells = np.floor((line - scene.origin) / scene.cell).astype(int)
        if not all(_free(scene, tuple(cell)) for cell in cells):
            return False
    return True


def _even(way: Float[np.ndarray, "corners 2"], points: int) -> Float[np.ndarray, "points 2"]:
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(way, axis=0), axis=1))])
    wanted = np.linspace(0.0, along[-1], points)
    return np.stack([np.interp(wanted, along, way[:, i]) for i in (0, 1)], 1)
