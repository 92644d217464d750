"""Guides an answer while it is generated: by λ, a budget for its thoughts, biases, penalties, and a grammar.

λ of a step is, in this order:

1. the λ set by hand (`Guide.turn`), from then on;
2. the answer's own λ, after a thought has ended;
3. the schedule: straight lines from the granted λ at 0 tokens through its points, and the last λ after them;
4. the granted λ.

Inside a thought that has a budget, it bends toward the Instruct end by the law of `dami.schedules.bent`, if that suits
the pair: over as many tokens as its thoughts take, or over all that is left once it is to wrap up. A thought that does
not end by itself is ended by the end tag.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dami.generation.budget import next_of
from dami.generation.courses import Course
from dami.schedules import bent
from dami.serving.structured import Grammar, Matcher
from dami.thoughts import Reader, ThoughtMeter


@dataclass(frozen=True)
class Thoughts:
    """How the thoughts of a model are marked.

    Attributes:
        reader: finds them.
        start, end: tokens of the tags that open and close one.
    """

    reader: Reader
    start: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, reader: Reader) -> Thoughts:
        """Returns the tags of a reader as the tokens by which its tokenizer writes them."""
        tags = (reader.tags.start, reader.tags.ends[0])
        return cls(reader, *(tuple(reader.tokenizer.encode(tag, add_special_tokens=False)) for tag in tags))

    def closed(self) -> Thoughts:
        """Returns them for an answer that must match a grammar: nothing but an end tag ends a thought."""
        reader = Reader(self.reader.tokenizer, replace(self.reader.tags, instead=()))
        return replace(self, reader=reader)


@dataclass(frozen=True)
class Guidance:
    """What a request wants of its tokens, beside `Sampling`.

    Attributes:
        biases: added to the scores of these tokens.
        presence_penalty: subtracted from the scores of tokens that the answer or its thought has already.
        frequency_penalty: subtracted once for each time that it has them.
        schedule: (tokens, λ) in ascending order of tokens.
        answer_intensity: λ after a thought; None for that of the thought.
        budget: the most tokens of its thoughts; None for no limit.
        span: the tokens before the budget's end over which λ bends; 0 to leave λ, so that the thought is cut off.
        grammar: what the answer, and not the thought, must match; None for any text.
    """

    biases: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    schedule: Sequence[tuple[int, float]] = ()
    answer_intensity: float | None = None
    budget: int | None = None
    span: float = 0.0
    grammar: Grammar | None = None


class Guide(Course):
    """The course of a request of the server.

    Args:
        prompt: number of tokens of its prompt.
        vocabulary: number of scores of a token.
        guidance: what the request wants.
        ends: tokens that end it.
        thoughts: how thoughts are marked; None for plain text, which has none.
        inside: whether its prompt ends inside a thought.
    """

    def __init__(
        self,
        prompt: int,
        vocabulary: int,
        guidance: Guidance,
        ends: frozenset[int],
        thoughts: Thoughts | None = None,
        inside: bool = False,
    ) -> None:
        super().__init__(prompt)
        self.vocabulary, self.guidance, self.ends, self.thoughts = vocabulary, guidance, ends, thoughts
        self.meter = None if thoughts is None else ThoughtMeter(thoughts.reader, inside)
        self.limit = guidance.budget  # tokens of its thoughts
        self._span = guidance.span  # tokens over which λ bends
        self._points: Sequence[tuple[int, float]] = ()
        self._by_hand: float | None = None
        self._wrap_up: int | None = None
        self._matcher: Matcher | None = None if guidance.grammar is None else guidance.grammar.matcher()
        self._opening = 0  # how many tokens of a start tag stand where the answer could begin
        self._said = False  # whether the answer has begun
        self._seen: set[int] = set()
        self._scores: Tensor | None = None  # biases and penalties
        if guidance.biases:
            self._scores = torch.zeros(vocabulary, dtype=torch.float32)
            self._scores[list(guidance.biases)] = torch.tensor(list(guidance.biases.values()), dtype=torch.float32)

    def turn(self, intensity: float | None = None, wrap_up: int | None = None) -> None:
        """Changes the course from the next token on; called in any thread.

        Args:
            intensity: λ from then on; None to leave it.
            wrap_up: the most tokens that the thought may still have; None to leave its budget.
        """
        if intensity is not None:
            self._by_hand = intensity
        if wrap_up is not None:
            self._wrap_up = wrap_up

    def begin(self, intensity: float) -> None:
        super().begin(intensity)
        self._points = ((0, intensity), *self.guidance.schedule)

    def decide(self, news: Sequence[int]) -> None:
        for token in news:
            self._take(token)
        wrap_up, self._wrap_up = self._wrap_up, None
        if wrap_up is not None and self.meter is not None:
            end = self.meter.tokens + wrap_up
            if self.limit is None or end < self.limit:
                self.limit, self._span = end, wrap_up if self._span else 0
        if self.tokens:
            self.intensity = self._lam()
        self.forced = self._next_of_tag()
        self.bias = None if self.forced is not None else self._bias()

    def _lam(self) -> float:
        """Returns λ of the next step, as the module says."""
        meter = self.meter
        if self._by_hand is not None:
            lam = self._by_hand
        elif self.guidance.answer_intensity is not None and meter is not None and meter.ended and not meter.inside:
            lam = self.guidance.answer_intensity
        else:
            lam = _between(self._points, len(self.tokens))
        if meter is None or not meter.inside or self.limit is None or not self._span:
            return lam
        return bent(lam, self.limit - meter.tokens, self._span)

    def _take(self, token: int) -> None:
        meter = self.meter
        before = meter is not None and meter.inside
        if meter is not None:
            meter.push(token)
        after = meter is not None and meter.inside
        if self.guidance.presence_penalty or self.guidance.frequency_penalty:
            self._penalise(token)
        if self._matcher is None or before or token in self.ends:
            return
        if after:  # the token completes a start tag
            self._opening = 0
        elif self._may_open() and self.thoughts is not None and token == self.thoughts.start[self._opening]:
            self._opening += 1
        else:
            self._said = True
            self._matcher.take(token)

    def _may_open(self) -> bool:
        """Whether a thought may begin where the answer could begin."""
        meter = self.meter
        return meter is not None and not self._said and not meter.ended and not self._spent()

    def _spent(self) -> bool:
        """Whether the thoughts have used up their budget."""
        return self.limit is not None and self.meter is not None and self.meter.tokens >= self.limit

    def _next_of_tag(self) -> int | None:
        """Returns the next token of a tag that has to be written now."""
        if self.thoughts is None or self.meter is None:
            return None
        if self.meter.inside and self._spent():
            return next_of(self.thoughts.end, self.tokens[-len(self.thoughts.end) :])
        return self.thoughts.start[self._opening] if self._opening else None

    def _penalise(self, token: int) -> None:
        if self._scores is None:
            self._scores = torch.zeros(self.vocabulary, dtype=torch.float32)
        first = token not in self._seen
        self._seen.add(token)
        self._scores[token] -= self.guidance.frequency_penalty + self.guidance.presence_penalty * first

    def _bias(self) -> Tensor | None:
        inside = self.meter is not None and self.meter.inside
        bias = self._scores
        if self._matcher is not None and not inside:
            allowed = self._matcher.allowed(self.ends)
            if self._may_open() and self.thoughts is not None:
                allowed[self.thoughts.start[0]] = True
            bias = _without(bias, ~allowed)
        elif self._matcher is not None:
            bias = _without(bias, torch.tensor(sorted(self.ends)), self.vocabulary)  # the answer is still to come
        if self._spent() and self.thoughts is not None and len(self.thoughts.start) == 1:
            bias = _without(bias, torch.tensor(self.thoughts.start), self.vocabulary)
        return bias


def _between(points: Sequence[tuple[int, float]], place: int) -> float:
    """Returns the value at a place on the straight lines through points, which are in ascending order."""
    after = bisect_left(points, place, key=lambda point: point[0])
    if after == len(points):
        return points[-1][1]
    if points[after][0] == place:
        return points[after][1]
    (left, low), (right, high) = points[after - 1 : after + 1]
    return low + (high - low) * (place - left) / (right - left)


def _without(bias: Tensor | None, ruled_out: Tensor, vocabulary: int = 0) -> Tensor:
    """Returns a bias that also rules out tokens, given by their ids or as bool [vocabulary]."""
    bias = torch.zeros(vocabulary or len(ruled_out), dtype=torch.float32) if bias is None else bias.clone()
    bias[ruled_out] = -torch.inf
    return bias
