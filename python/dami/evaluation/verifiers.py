"""Verifiers: named functions that score how right a text is. You can register your own:

@register_verifier("near")
def near(text: str, answer: str) -> float:
    return float(abs(float(text) - float(answer)) < 0.01)
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Verifier = Callable[[str, str], float]  # (text without its thought, right answer) → score from 0 to 1
AnyVerifier = TypeVar("AnyVerifier", bound=Verifier)

NUMBER = re.compile(r"-?\d+(\.\d+)?")
WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_]+([ '-][^\W\d_]+)*")


class Registered(NamedTuple):
    """A verifier, and a test of which right answers it can judge by."""

    verifier: Verifier
    can_judge: Callable[[str], bool]


VERIFIERS: dict[str, Registered] = {}


def register_verifier(
    name: str, can_judge: Callable[[str], bool] = lambda answer: True
) -> Callable[[AnyVerifier], AnyVerifier]:
    """Decorator that registers a verifier by name, for use in files of questions and `JsonLines`.

    The function gets a text without its thought, and the right answer. It returns a score from 0 to 1.

    Args:
        name: such as "near".
        can_judge: whether the verifier can judge by a given right answer. Files with other answers are rejected.

    Raises:
        ValueError: another verifier has the name, or the name holds ":", which separates a module from its function.
    """
    if ":" in name or not name:
        raise ValueError(f"name must be a word without ':', got {name!r}")

    def register(verifier: AnyVerifier) -> AnyVerifier:
        _add(name, Registered(verifier, can_judge))
        return verifier

    return register


def _add(name: str, entry: Registered) -> None:
    known = VERIFIERS.get(name)
    if known and _origin(known.verifier) != _origin(entry.verifier):  # a notebook cell may run again
        raise ValueError(f"name must be new, and {name!r} is a verifier already: {'.'.join(_origin(known.verifier))}")
    VERIFIERS[name] = entry


def _origin(verifier: Verifier) -> tuple[str, str]:
    kind = verifier if hasattr(verifier, "__qualname__") else type(verifier)
    return kind.__module__, kind.__qualname__


def import_verifier(name: str) -> None:
    """Imports the function that MODULE:FUNCTION or FILE.py:FUNCTION refers to. Does nothing for a registered name.

    Verifiers that the module registers become available too.

    Raises:
        ValueError: the module, file, function or name does not exist.
    """
    module, colon, function = name.rpartition(":")
    if not colon:
        check_known(name)
        return
    try:
        found = getattr(
            _import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), function
        )
    except (ImportError, OSError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"verifier {name!r} must be MODULE:FUNCTION or FILE.py:FUNCTION: {error}") from error
    if not callable(found):
        raise ValueError(f"verifier {name!r} must be a function of a text and an answer, got {found!r}")
    _add(name, Registered(found, lambda answer: True))


def _import_file(path: Path) -> Any:
    """Imports a file as a module, only once, so that it registers its verifiers once."""
    name = f"dami_verifiers_{path.resolve()}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        spec: Any = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def check_known(name: Any) -> None:
    """Raises ValueError if no verifier has this name."""
    if not isinstance(name, str) or name not in VERIFIERS:
        raise ValueError(f"verifier must be one of {sorted(VERIFIERS)}, got {name!r}")


def can_judge(verifier: str, answer: str) -> bool:
    """Whether a verifier, by name, can judge by a given right answer.

    The built-in verifiers can if they accept the right answer itself. "math" does not judge words: it would read
    Tuesday as the product of its letters.
    """
    return VERIFIERS[verifier].can_judge(answer)


def verify(verifier: str, text: str, answer: str) -> float:
    """Scores a text with a verifier, by name, from 0 to 1.

    Raises:
        ValueError: the verifier fails or returns something else. The message quotes the text.
    """
    try:
        score = float(VERIFIERS[verifier].verifier(text, answer))
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"verifier {verifier!r} failed on the text {text!r} and the answer {answer!r}: {error!r}"
        ) from error
    if not 0 <= score <= 1:  # nan too
        raise ValueError(f"verifier {verifier!r} must return a number from 0 to 1, got {score} for the text {text!r}")
    return score


@register_verifier("word", lambda answer: re.fullmatch(r"-?\d+|\w+", answer) is not None)
def last_word(text: str, answer: str) -> float:
    """Returns 1 if `answer` is the last number of `text`, or its last word if `answer` is not a number."""
    pattern = r"-?\d+" if re.fullmatch(r"-?\d+", answer) else r"\w+"
    return float(re.findall(pattern, text.replace(",", ""))[-1:] == [answer])


@register_verifier("contains", lambda answer: answer != "")
def contains(text: str, answer: str) -> float:
    """Returns 1 if `answer` occurs anywhere in `text`, as whole words."""
    return float(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None)


def _is_mathematics(answer: str) -> bool:
    import_optional("math_verify")  # fails when the questions are read, not at the first answer
    return _finds_itself(answer)


@cache  # answers repeat within files, and math-verify is slow
def _finds_itself(answer: str) -> bool:
    if NUMBER.fullmatch(answer):
        return True
    return not WORDS.fullmatch(answer) and same_math(rf"\boxed{{{answer}}}", answer) == 1


@register_verifier("math", _is_mathematics)
def same_math(text: str, answer: str) -> float:
    r"""Returns 1 if math-verify finds `text` equivalent to `answer`: numbers, fractions, sets, \boxed{…} and so on."""
    math_verify = import_optional("math_verify")
    gold = math_verify.parse(answer if "$" in answer or "\\" in answer else f"${answer}$")
    return float(math_verify.verify(gold, math_verify.parse(text)))


def import_optional(name: str) -> Any:
    """Imports an optional package.

    Raises:
        ImportError: it is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        from dami_kernels.installation import needs  # here, because dami_kernels imports torch

        raise ImportError(needs("this", name)) from error
