"""The engine behind the server: takes requests from an event loop and batches them continuously in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import dami
from dami.chat import end_tokens
from dami.dial.choosing import estimates
from dami.dial.patch import patch_of
from dami.dial.values import one_lam, shortest, shortest_of
from dami.generation.batching import LerpManager, StepLoad, padded
from dami.generation.choices import Choice
from dami.generation.courses import Course
from dami.generation.reading import TAIL
from dami.generation.sampling import Logprobs, Sampling
from dami.serving.controller import IntensityController
from dami.upstream import forget_handler

if TYPE_CHECKING:  # this module needs FastAPI, and the engine doesn't
    from dami.serving.schema import FinishReason

logger = logging.getLogger(__name__)

GIB = 1 << 30
PAGE = 16  # tokens per block; prompts share whole blocks only
CHUNK = 32  # tokens of a row to handle before the event loop gets a turn
GREEDY = Sampling(temperature=0.0)  # until λ is known, on which the sampling may depend
WARMUP = 32  # tokens to generate before the first request, from a prompt twice as long


def can_capture(device: torch.device) -> bool:
    """Whether steps on a device can be captured as CUDA graphs."""
    return device.type == "cuda"


def layers_read(model: Any) -> tuple[int, ...]:
    """Returns the layers whose states are all that a model's estimator looks at; none if it needs anything else."""
    layers = tuple(getattr(patch_of(model).estimator, "layers", ()))
    states = model.config.get_text_config().num_hidden_layers + 1
    return layers if all(-states <= layer < states for layer in layers) else ()


class Overloaded(Exception):
    """There are more requests than the engine takes at once."""


class EstimatorFailed(Exception):
    """The estimator could not choose a λ for a prompt."""


class EngineDead(Exception):
    """The generation thread has failed; nothing more will be generated."""


@dataclass(frozen=True)
class Load:
    """The load on the engine.

    Attributes:
        waiting: sequences that no step has processed yet.
        running: sequences that hold blocks.
        kv: share of the KV cache that the running sequences hold, 0 to 1.
    """

    waiting: int = 0
    running: int = 0
    kv: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The limits of the engine.

    Attributes:
        kv_memory: size of the KV cache in GiB.
        max_model_len: maximum tokens of prompt and answer together; None for as many as the model and the cache allow.
        max_batch_tokens: maximum tokens per step; longer prompts are prefilled in several steps.
        max_batch_rows: maximum sequences per step.
        max_requests: maximum sequences at once, waiting ones included.
        share_prefixes: whether sequences share the KV blocks of a common prefix that was read at the same λ.
        cuda_graphs: whether to capture steps as CUDA graphs and replay them; None to do so on a GPU, unless the model
            is invariant.
    """

    kv_memory: float = 1.0
    max_model_len: int | None = None
    max_batch_tokens: int = 512
    max_batch_rows: int = 64
    max_requests: int = 4096
    share_prefixes: bool = True
    cuda_graphs: bool | None = None

    @property
    def share(self) -> int:
        """Maximum sequences of one request: a quarter of all, so that one client doesn't shut out the others."""
        return max(1, self.max_requests // 4)


@dataclass(frozen=True)
class Auto:
    """A λ that the pair's estimator chooses when the prompt has been read.

    Attributes:
        low, high: the range that it is moved into.
        most: the highest λ granted.
    """

    low: float
    high: float
    most: float = math.inf

    def wanted(self, chosen: float) -> float:
        return min(max(chosen, self.low), self.high)


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: its id.
        intensity: λ of the step that gave it.
        logprobs: its log-probabilities, if they were asked for.
    """

    id: int
    intensity: float
    logprobs: Logprobs | None


@dataclass(eq=False)
class Row:
    """A sequence being generated: an asynchronous iterator over its tokens, in batches as they arrive.

    Attributes:
        prompt: token ids.
        intensity: its λ; that of its prompt until `granted`.
        course: decides about each of its tokens.
        name: the name of its request in the manager.
        reason: "stop" after an end token, "length" after `max_tokens`; None while it runs.
        granted: set when `intensity` is known, or will never be.
        lowered: whether it got less than the estimator chose.
        failure: why it broke off.
        trial: whether it tries the model out: the controller learns nothing from its length.
    """

    engine: Engine
    prompt: list[int]
    intensity: float
    course: Course
    name: str
    max_tokens: int
    ends: frozenset[int]
    arrival: float
    reason: FinishReason | None = None
    first_token: float | None = None
    seen: int = 0
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    lowered: bool = False
    failure: Exception | None = None
    trial: bool = False
    news: asyncio.Queue[list[Token] | Exception | None] = field(default_factory=asyncio.Queue)

    def take(self, output: Any) -> None:
        """Called on the event loop with everything generated for the request so far."""
        if output.error is not None:
            self.fail(EngineDead(output.error))
            return
        tokens, logprobs = output.generated_tokens, output.logprobs
        lams = map(shortest_of, self.course.lams[self.seen : len(tokens)])
        fresh = [
            Token(tokens[i], lam, logprobs[i] if i < len(logprobs) else None) for i, lam in enumerate(lams, self.seen)
        ]
        if fresh and self.first_token is None:
            self.first_token = time.monotonic()
            self.engine.waiting.pop(self.name, None)
        self.seen = len(tokens)
        if fresh:
            self.news.put_nowait(fresh)
        if output.is_finished():
            self.reason = "stop" if tokens and tokens[-1] in self.ends else "length"
            self.engine.forget(self, complete=True)
            self.news.put_nowait(None)

    def settle(self, granted: float, lowered: bool) -> None:
        """Called on the event loop with the λ that the estimator has chosen, as granted."""
        if self.name in self.engine.rows:
            if self.engine.controller is not None:
                self.engine.controller.finish(self.intensity, None)
                self.engine.controller.start(granted)
            self.intensity, self.lowered = granted, lowered
        self.granted.set()

    def fail(self, error: Exception) -> None:
        self.failure = error
        self.engine.forget(self)
        self.news.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        goes_on = True
        while goes_on:
            news, tokens = await self.news.get(), list[Token]()
            while isinstance(news, list):
                tokens += news
                if self.news.empty() or len(tokens) >= CHUNK:
                    break
                news = self.news.get_nowait()
            if tokens:
                yield tokens
                if not self.news.empty():  # else the next `get` gives the event loop its turn
                    await asyncio.sleep(0)
            if isinstance(news, Exception):
                raise news
            goes_on = news is not None

    def cancel(self, complete: bool = False) -> None:
        """Ends the row if it is still running, and frees its blocks. Pass `complete` if its text is complete."""
        if self.engine.forget(self, complete):
            self.engine.manager.cancel_request(self.name)
            self.news.put_nowait(None)


class Engine:
    """Generates for many requests at once, each at its own λ.

    You can create it anywhere. It runs on the event loop that enters it: `async with engine: …`.

    Args:
        model: a patched model. Nothing else may run it from then on.
        limits: the engine's limits.
        controller: lowers λ under load; with None, λ stays as requested.

    Raises:
        TypeError, ValueError: if the model is not patched or cannot be batched at several λ, if the cache cannot hold a
            sequence of `max_model_len`, or if steps cannot be captured and `cuda_graphs` asks for it.
    """

    def __init__(self, model: Any, limits: Limits | None = None, controller: IntensityController | None = None) -> None:
        self.model, self.limits, self.controller = model, limits or Limits(), controller
        patch = patch_of(model)
        self.cuda_graphs = self._captures()
        self.presets = dict(patch.presets)
        self.twin = dami.twin(model) if patch.estimator is not None else None
        self.layers = layers_read(model)
        self.least_tail: int | None = getattr(model.dami, "prompt_tail", None)
        self.ends = frozenset(end_tokens(model).tolist())
        self.rows: dict[str, Row] = {}
        self.waiting: dict[str, Row] = {}  # rows that have no token yet, oldest first
        self.load = Load()
        self.death: BaseException | None = None
        self.dead = asyncio.Event()
        self._estimating: asyncio.Task[None] | None = None
        self._to_estimate: list[tuple[list[int], asyncio.Future[float]]] = []
        self._estimator_thread = ThreadPoolExecutor(1, "estimator")
        self.manager: LerpManager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=sorted(self.ends) or -1), self._batching_config()
        )
        self.manager.sample_per_request()
        self.manager.warmup()
        cache = self.manager.batch_processor.cache
        self.capacity = cache.num_blocks * PAGE
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.capacity
        wanted = self.limits.max_model_len
        if wanted is not None and wanted > min(self.capacity, room):
            self.manager.destroy()
            raise ValueError(
                f"max_model_len must be at most {min(self.capacity, room)}, got {wanted}: the model takes "
                f"{room} tokens, and the cache holds {self.capacity} tokens"
            )
        self.max_model_len = wanted or min(self.capacity, room)

    def _batching_config(self) -> ContinuousBatchingConfig:
        limits = self.limits
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        nbytes = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize * PAGE
        return ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=max(1, int(limits.kv_memory * GIB / nbytes)),
            max_batch_tokens=limits.max_batch_tokens,
            max_requests_per_batch=min(limits.max_batch_rows, limits.max_batch_tokens),
            allow_block_sharing=limits.share_prefixes,
            use_async_batching=False,  # because log-probabilities are read right after their step
            use_cuda_graph=self.cuda_graphs,
        )

    def _captures(self) -> bool:
        """Whether to capture steps as CUDA graphs."""
        wanted, invariant = self.limits.cuda_graphs, patch_of(self.model).running.invariant
        possible = can_capture(self.model.device) and not invariant
        if wanted and not possible:
            why = "bits that do not depend on other requests" if invariant else f"a model on {self.model.device}"
            raise ValueError(f"cuda_graphs must be False for {why}, got True")
        return possible if wanted is None else wanted

    async def __aenter__(self) -> Engine:
        self._loop = asyncio.get_running_loop()
        self.manager.on_step = self._hand_over
        with torch.inference_mode():
            self.manager.start()
        self._watch = asyncio.create_task(self._watch_thread())
        try:
            await self._try_out()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._watch.cancel()
        if self._estimating is not None:
            self._estimating.cancel()
        for row in list(self.rows.values()):
            row.cancel()
        self.manager.on_step = None
        await asyncio.to_thread(functools.partial(self.manager.stop, block=True, hard_stop=True))
        self.manager.destroy()
        self._estimator_thread.shutdown(wait=False, cancel_futures=True)

    async def _try_out(self) -> None:
        """Generates tokens at both ends, so that a model that cannot be batched fails now and not at the first request.

        It does so twice. The controller measures only the second time, as the first steps are slow without any load.
        """
        tokens = max(1, min(WARMUP, self.max_model_len // 4))
        controller, self.controller = self.controller, None
        try:
            await self._warm_up(tokens)
        except EngineDead as dead:
            how = "batched continuously with CUDA graphs" if self.cuda_graphs else "batched continuously"
            raise ValueError(f"{type(self.model).__name__} cannot be {how}: {dead}") from dead
        finally:
            self.controller = controller
        await self._warm_up(tokens)

    async def _warm_up(self, tokens: int) -> None:
        prompt = [0, 1] * tokens
        for ends in [(0.0, 1.0)] if self.limits.max_requests > 1 else [(0.0,), (1.0,)]:
            rows = [self.submit(prompt, lam, Sampling(), tokens, frozenset()) for lam in ends]
            for row in rows:
                row.trial = True
            for row in rows:
                async for _ in row:
                    pass

    def submit(
        self,
        prompt: list[int],
        intensity: float | Auto,
        sampling: Sampling | Callable[[float], Sampling],
        max_tokens: int,
        ends: frozenset[int] | None = None,
        prompt_intensity: float | None = None,
        prompt_tail: int = TAIL,
        course: Course | None = None,
    ) -> Row:
        """Submits a sequence.

        Args:
            prompt: token ids, at least one.
            intensity: its λ, or how to choose it, if `chooses` allows that.
            sampling: how to sample its tokens; with an `Auto`, what says so for a λ.
            max_tokens: maximum tokens of the answer; prompt and answer together may have `max_model_len`.
            ends: ids of the tokens that end it; the model's own if None.
            prompt_intensity: λ at which the prompt is read, except for its tail; None for `intensity`.
            prompt_tail: how many tokens at the end of the prompt are read at `intensity` all the same.
            course: decides about each of its tokens; None for one that leaves them alone.

        Raises:
            Overloaded: if there are too many sequences.
            EngineDead: if the generation thread is not running.
        """
        self.check_room(1)
        ends = self.ends if ends is None else ends
        course = Course(len(prompt)) if course is None else course
        row = Row(self, prompt, 0.0, course, uuid.uuid4().hex, max_tokens, ends, time.monotonic())
        if isinstance(intensity, Auto):
            assert prompt_intensity is not None
            assert callable(sampling)
            row.intensity, prompt_intensity = prompt_intensity, None
            choice = Choice(self.layers, functools.partial(self._decide, row, intensity, sampling), prompt_tail)
            sampling = GREEDY
        else:
            assert isinstance(sampling, Sampling)
            row.intensity, choice = intensity, None
            row.granted.set()
        self.manager.register_result_handler(row.name, row.take)  # called later, on the event loop
        name = self.manager.add_request(
            prompt,
            row.name,
            max_tokens,
            streaming=True,
            eos_token_id=sorted(ends) or -1,
            intensity=row.intensity,
            prompt_intensity=prompt_intensity,
            prompt_tail=None if prompt_intensity is None else prompt_tail,
            choice=choice,
            sampling=sampling,
            course=course,
        )
        if name is None:
            self._unregister(row)
            status = self.manager.background_thread_status
            raise EngineDead(str(status.fatal_error or status.can_accept_new_requests()))
        self.rows[row.name] = self.waiting[row.name] = row
        if self.controller is not None:
            self.controller.start(row.intensity)
        return row

    def chooses(self, prompt_intensity: float | None, prompt_tail: int) -> bool:
        """Whether `submit` takes an `Auto`: if the estimator looks at nothing but the prompt's states at this λ."""
        return prompt_intensity == 0.0 and bool(self.layers) and self.manager.can_choose(prompt_tail)

    def _decide(self, row: Row, auto: Auto, sampling: Callable[[float], Sampling], states: Tensor) -> dict[str, Any]:
        """Returns the λ granted to a row by the states of its prompt; called in the generation thread."""
        try:
            estimator: Any = patch_of(self.model).estimator
            chosen = one_lam(estimator.choose(states).item(), "the estimator's choice")
            [chosen] = shortest(torch.tensor([chosen], dtype=torch.float32))
        except Exception as error:
            logger.exception("the estimator failed")
            self._call(row.fail, EstimatorFailed(str(error)))
            self.manager.cancel_request(row.name)
            return {"intensity": row.intensity}
        granted = min(auto.wanted(chosen), auto.most)
        self._call(row.settle, granted, granted < auto.wanted(chosen))
        return {"intensity": granted, "sampling": sampling(granted)}

    def check_room(self, rows: int) -> None:
        """Raises what `submit` would raise for this many sequences."""
        if self.death is not None:
            raise EngineDead(str(self.death))
        if len(self.rows) + rows > self.limits.max_requests:
            raise Overloaded(f"{len(self.rows)} sequences are under way, and {self.limits.max_requests} is the most")

    def forget(self, row: Row, complete: bool = False) -> bool:
        """Drops a row, and returns whether it was still there."""
        row.granted.set()
        if self.rows.pop(row.name, None) is None:
            return False
        self.waiting.pop(row.name, None)
        self._unregister(row)
        if self.controller is not None:
            self.controller.finish(row.intensity, row.seen if complete and not row.trial else None)
        return True

    def _unregister(self, row: Row) -> None:
        forget_handler(self.manager.output_router, row.name)

    async def estimate(self, prompt: list[int]) -> float:
        """Returns the λ that the pair's estimator chooses for a prompt. Prompts that arrive together share a batch.

        Raises:
            ValueError: if the model has no estimator.
        """
        if self.twin is None:
            raise ValueError("the pair has no estimator")
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._to_estimate.append((prompt, future))
        if self._estimating is None or self._estimating.done():  # a task: the caller may be cancelled while others wait
            self._estimating = asyncio.create_task(self._estimate_waiting())
        return await future

    async def _estimate_waiting(self) -> None:
        while waiting := [each for each in self._to_estimate if not each[1].done()]:
            taken, self._to_estimate = waiting[:16], waiting[16:]
            found: Sequence[float | Exception]
            try:
                prompts = [prompt for prompt, _ in taken]
                found = await self._loop.run_in_executor(self._estimator_thread, self._estimate, prompts)
            except Exception as error:
                found = [error] * len(taken)
            for (_, future), value in zip(taken, found, strict=True):
                if future.done():
                    continue
                if isinstance(value, Exception):
                    future.set_exception(value)
                else:
                    future.set_result(value)
        self._to_estimate = []

    @torch.inference_mode()
    def _estimate(self, prompts: Sequence[list[int]]) -> list[float]:
        assert self.twin is not None
        return shortest(estimates(self.twin, padded(prompts, self.model.device), len(prompts)))

    def grant(self, intensity: float, adjustable: bool) -> float:
        """Returns the λ at which a request is admitted."""
        if self.controller is None:
            return intensity
        return self.controller.grant(intensity, adjustable)

    def _hand_over(self, step: StepLoad) -> None:
        """Passes a step's load to the event loop; called in the generation thread after each step."""
        self._call(self._observe, step)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function on the event loop; called in the generation thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _observe(self, step: StepLoad) -> None:
        self.load = Load(step.waiting, step.running, step.blocks)
        if self.controller is not None:
            longest = next(iter(self.waiting.values()), None)
            waited = 0.0 if longest is None else time.monotonic() - longest.arrival
            self.controller.observe(step.rows, step.seconds, waited)

    async def _watch_thread(self) -> None:
        """Fails all running rows once the generation thread has ended."""
        while self.manager.is_running():
            await asyncio.sleep(0.2)
        self.death = self.manager.background_thread_status.fatal_error or RuntimeError(
            "the generation thread has ended"
        )
        self.load = Load()
        for row in list(self.rows.values()):
            row.fail(EngineDead(str(self.death)))
        self.dead.set()
