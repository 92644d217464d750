"""A thousand streams at once, each answer compared with that to the same question asked alone, greedily.

lost      answers that did not come whole
crossed   answers that are another request's: of another λ, or those of another question
other     answers that are neither that nor their own: where rounding decides, unless the server is --invariant
distinct  different answers among those asked alone
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.client import Said, ask, chat
from benchmarks.serving.questions import questions
from benchmarks.serving.server import about, quantile, serving

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=40, help="each asked at five λ")
    parser.add_argument("--modes", nargs="+", choices=("plain", "invariant"), default=("plain", "invariant"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows = [measure(mode, options.streams, options.questions) for mode in options.modes]
    columns = ("mode", "streams", "lost", "crossed", "other", "distinct", "seconds", "tokens_per_second", "first_p50")
    print(text_table([columns, *([row[column] for column in columns] for row in rows)]))
    store(rows, options.results / "serving_streams.csv")
    return int(any(row["lost"] or row["crossed"] for row in rows))


def measure(mode: str, streams: int, count: int) -> dict[str, object]:
    bodies = [
        chat(question.text, intensity=lam, temperature=0, max_tokens=256)
        for question in questions(count)
        for lam in LAMS
    ]
    asked = [i % len(bodies) for i in range(streams)]
    random.Random(0).shuffle(asked)
    with serving(*(["--invariant"] if mode == "invariant" else [])) as server:
        alone, _ = ask(server.url, bodies, users=1)
        said, seconds = ask(server.url, [bodies[i] for i in asked])
        server.wait_until_idle()
    lost, crossed, other = compare(said, [alone[i] for i in asked], alone)
    return {
        **about(),
        "mode": mode,
        "streams": streams,
        "lost": lost,
        "crossed": crossed,
        "other": other,
        "distinct": len({content(answer) for answer in alone}),
        "seconds": f"{seconds:.1f}",
        "tokens_per_second": round(sum(answer.tokens for answer in said) / seconds),
        "first_p50": f"{quantile([answer.first for answer in said], 0.5):.2f}",
        "first_p99": f"{quantile([answer.first for answer in said], 0.99):.2f}",
        "whole_p50": f"{quantile([answer.seconds for answer in said], 0.5):.2f}",
        "whole_p99": f"{quantile([answer.seconds for answer in said], 0.99):.2f}",
    }


def content(answer: Said) -> tuple[str, str]:
    return answer.thought, answer.text


def compare(said: Sequence[Said], wanted: Sequence[Said], alone: Sequence[Said]) -> tuple[int, int, int]:
    """Counts answers that are lost, crossed (another request's) or otherwise wrong.

    Args:
        said: the answers received.
        wanted: what each should have been.
        alone: answers to all requests, each asked alone.

    Raises:
        RuntimeError: an answer asked alone is missing, so there is nothing to compare with.
    """
    if missing := [answer.error for answer in alone if answer.error]:
        raise RuntimeError(f"{len(missing)} of {len(alone)} answers did not come when asked alone: {missing[0]}")
    askers: dict[tuple[str, str], set[str]] = defaultdict(set)  # without a thought, an answer may be anyone's
    for answer in alone:
        askers[content(answer)].add(answer.question if answer.thought else "")
    lost = crossed = other = 0
    for answer, right in zip(said, wanted, strict=True):
        if answer.error:
            lost += 1
        elif content(answer) == content(right) and answer.intensity == right.intensity:
            continue
        elif answer.intensity != right.intensity or not {"", answer.question} & askers.get(content(answer), {""}):
            crossed += 1
        else:
            other += 1
    return lost, crossed, other


if __name__ == "__main__":
    raise SystemExit(main())
