"""Questions, and worked solutions of them in four styles. All but those about elements are reasoning-gym's.

A question's solution is a list of steps. The styles differ in how much of each step is written down:

    direct   73
    terse    <think>85 73</think>73
    full     <think>47 + 38 = 85\\n85 - 12 = 73</think>73
    check    <think>47 + 38 = 85, 85 - 38 = 47\\n85 - 12 = 73, 73 + 12 = 85</think>73
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import reasoning_gym
from elements import counting_up, draw_elements
from reasoning_gym.arithmetic.leg_counting import ANIMALS

LEVELS = range(1, 6)
STYLES = ("direct", "terse", "full", "check")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HELD_OUT_SEED = 1_000_000_000  # reasoning-gym draws item i from seed + i, so training seeds stay far below
ELEMENTS = "elements"  # the task that is not reasoning-gym's

# Task -> its reasoning-gym configuration at a level.
Configs = Mapping[str, Callable[[int], dict[str, object]]]
CONFIGS: Configs = {
    "chain_sum": lambda level: {
        "min_terms": max(level, 2),
        "max_terms": max(level, 2),
        "min_digits": min(level, 2),
        "max_digits": 2,
    },
    "leg_counting": lambda level: {
        "min_animals": max(level - 1, 1),
        "max_animals": max(level - 1, 1),
        "min_instances": 10 if level == 2 else 1,
        "max_instances": 19 if level == 2 else 9,
    },
    "gcd": lambda level: {"max_value": (25, 40, 60, 80, 99)[level - 1]},
    "calendar_arithmetic": lambda level: {
        "tasks": ["weekday_offset"],
        "offset_upper_bound": (7, 20, 60, 200, 600)[level - 1],
    },
}
TASKS = (*CONFIGS, ELEMENTS)


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the same question in fewer words."""

    task: str
    level: int
    text: str
    answer: str
    short_text: str


@dataclass(frozen=True)
class Step:
    """One step of a solution: `work` gives `result`; `check` undoes or redoes it and gives `expected`."""

    work: str
    result: str
    check: str
    expected: str


def draw(task: str, level: int, count: int, seed: int, configs: Configs = CONFIGS) -> list[Question]:
    """Draw `count` questions of one task and level."""
    if task == ELEMENTS:
        drawn = draw_elements(level, count, seed, unseen=seed >= HELD_OUT_SEED)
        return [Question(task, level, *question) for question in drawn]
    dataset = reasoning_gym.create_dataset(task, size=count, seed=seed, **configs[task](level))
    return [
        Question(task, level, item["question"], item["answer"], shorten(task, item["question"])) for item in dataset
    ]


def draw_held_out(count: int, tasks: Sequence[str] = TASKS, configs: Configs = CONFIGS) -> list[Question]:
    """Draw about `count` questions for every task and level, all different, from seeds that training never uses."""
    held_out: dict[str, Question] = {}
    for task in tasks:
        for level in LEVELS:
            distinct = {question.text: question for question in draw(task, level, 4 * count, HELD_OUT_SEED, configs)}
            # A question may be drawn at two levels: it stays at the easier one.
            held_out = dict(list(distinct.items())[:count]) | held_out
    return sorted(held_out.values(), key=lambda question: (tasks.index(question.task), question.level))


def is_reserved(question: Question) -> bool:
    """Whether training keeps off a question, so that estimators can learn from it.

    There are only so many questions for two small numbers: of each task and level, an eighth is reserved. About
    elements, `draw` has other wordings for seeds from HELD_OUT_SEED on.
    """
    return question.task != ELEMENTS and crc32(question.text.encode()) % 8 == 0


def score(task: str, answer: str, correct_answer: str) -> float:
    """reasoning-gym's own score of an answer; 1 for the right one about an element, else 0."""
    if task == ELEMENTS:
        return float(answer == correct_answer)
    dataset = reasoning_gym.create_dataset(task, size=1, seed=0, **CONFIGS[task](1))
    return dataset.score_answer(answer, {"answer": correct_answer, "metadata": {"task": "weekday_offset"}})


def shorten(task: str, text: str) -> str:
    """The question as a person in a hurry would type it."""
    if task == "chain_sum":
        return text.partition(": ")[2]
    if task == "leg_counting":
        return "How" + text.strip().partition("Now, how")[2]
    if task == "gcd":
        return f"gcd({', '.join(re.findall('[0-9]+', text))})"
    return re.split(r"(?<=\?) |(?<=[0-9]) - ", text)[0]


def solve(question: Question) -> list[Step]:
    """The steps that lead to the answer; the last result that matters is the answer."""
    if question.task == ELEMENTS:
        return [Step(known, found, found, known) for known, found in counting_up(question.answer)]
    return SOLVERS[question.task](question.text)


def _plus(total: int, term: int) -> Step:
    operator, inverse = ("-", "+") if term < 0 else ("+", "-")
    size, result = abs(term), total + term
    return Step(f"{total} {operator} {size}", str(result), f"{result} {inverse} {size}", str(total))


def _solve_chain_sum(text: str) -> list[Step]:
    first, *terms = re.findall(r"[+-]? ?[0-9]+", text.partition(": ")[2])
    total, steps = int(first), []
    for term in terms:
        steps.append(_plus(total, int(term.replace(" ", ""))))
        total = int(steps[-1].result)
    return steps


def _solve_leg_counting(text: str) -> list[Step]:
    total, steps = None, []
    for count, animal in re.findall(r"([0-9]+) ([a-z ]+)", text):
        legs = ANIMALS[animal] if animal in ANIMALS else ANIMALS[animal.removesuffix("s")]
        product = int(count) * legs
        steps.append(Step(f"{animal} {count} * {legs}", str(product), f"{legs} * {count}", str(product)))
        if total is not None:
            steps.append(_plus(total, product))
        total = product if total is None else total + product
    return steps


def _solve_gcd(text: str) -> list[Step]:
    small, large = sorted(int(number) for number in re.findall("[0-9]+", text))
    steps = []
    while small:
        quotient, rest = divmod(large, small)
        steps.append(Step(f"{large} mod {small}", str(rest), f"{small} * {quotient} + {rest}", str(large)))
        large, small = small, rest
    return steps


def _solve_calendar(text: str) -> list[Step]:
    (day,) = (day for day in WEEKDAYS if re.search(f"(is|from) {day},", text))
    # The offset is the number that is neither the day of the month nor the year.
    days = int(re.search(r"(?:in|a|forward|backward|it|was it) ([0-9]+)[ -]day", text)[1])
    sign = -1 if re.search(r"ago|before|backward", text) else 1
    steps = []
    for weeks in (10, 1):
        if days >= 7 * weeks:
            steps.append(_plus(days, -(days - days % (7 * weeks))))
            days %= 7 * weeks
    there, back = ("+", "-") if sign > 0 else ("-", "+")
    result = WEEKDAYS[(WEEKDAYS.index(day) + sign * days) % 7]
    return [*steps, Step(f"{day} {there} {days}", result, f"{result} {back} {days}", day)]


SOLVERS = {
    "chain_sum": _solve_chain_sum,
    "leg_counting": _solve_leg_counting,
    "gcd": _solve_gcd,
    "calendar_arithmetic": _solve_calendar,
}


def write_solution(question: Question, style: str, rng: random.Random, slip_rate: float = 0.06) -> tuple[str, list]:
    """Write the answer in a style; returns the text and the character spans that must not be imitated.

    In style `check` some steps slip first: a wrong result, the check that exposes it, "no", and the step again. The
    wrong result is the part that must not be imitated: the model learns to notice a slip, not to make one.
    """
    if style == "direct":
        return question.answer, []
    steps = solve(question)
    if style == "terse":
        return f"<think>{' '.join(step.result for step in steps)}</think>{question.answer}", []
    text, slips = "<think>", []
    for number, step in enumerate(steps):
        text += "\n" * (number > 0) + f"{step.work} = "
        if style == "check":
            slip = rng.random() < slip_rate and _slip(step, rng)
            if slip:
                slips.append((len(text), len(text) + len(slip.result)))
                text += f"{slip.result}, {slip.check} = {slip.expected} no\n{step.work} = "
            text += f"{step.result}, {step.check} = {step.expected}"
        else:
            text += step.result
    return f"{text}</think>{question.answer}", slips


def _slip(step: Step, rng: random.Random) -> Step | None:
    """The step with a plausible wrong result and the check that follows from it; None where there is no such check."""
    match = re.fullmatch(r"(\S+) ([+-]) ([0-9]+)", step.check)
    if not match:
        return None
    _, operator, size = match.groups()
    shift = int(size) if operator == "+" else -int(size)
    if step.result in WEEKDAYS:
        wrong = WEEKDAYS[(WEEKDAYS.index(step.result) + rng.choice((-1, 1, 2))) % 7]
        expected = WEEKDAYS[(WEEKDAYS.index(wrong) + shift) % 7]
    else:
        wrong = int(step.result) + rng.choice((-10, -1, 1, 10))
        expected = wrong + shift
    return Step(step.work, str(wrong), f"{wrong} {operator} {size}", str(expected))
