"""A fixed λ against one that follows the load: latency and right answers a second, as more questions come.

Questions of the shipped pair come at a fixed rate for a while, sampled as the pair's generation config says. In the
mode `load` every request may have λ up to 1, and the server has a --target-latency; in the others λ is fixed.

    rate       requests a second that come
    answered   answers a second, from the first request to the last answer; right, right ones
    accuracy   share of right ones
    intensity  mean λ granted
    p50, p95   seconds from a request to its last token
    late       share of answers that took longer than the target
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.client import ask, chat
from benchmarks.serving.questions import questions
from benchmarks.serving.server import about, quantile, serving


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[4, 8, 16, 32], metavar="RATE")
    parser.add_argument("--seconds", type=float, default=20, help="that requests come, at each rate and in each mode")
    parser.add_argument("--target", type=float, default=4, help="seconds, for the server in the mode load")
    parser.add_argument("--fixed", nargs="*", type=float, default=[0.0, 0.5, 1.0], metavar="λ")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows = []
    for fixed in [*options.fixed, None]:
        with serving(*([] if fixed is not None else ["--target-latency", str(options.target)])) as server:
            ask(server.url, [chat("2 + 2 =", max_tokens=1)])
            for rate in options.rates:
                rows.append(measure(server.url, fixed, rate, options.seconds, options.target))
                server.wait_until_idle()
    columns = ("mode", "rate", "answered", "right", "accuracy", "intensity", "tokens", "p50", "p95", "late")
    print(text_table([columns, *([row[column] for column in columns] for row in rows)]))
    store(rows, options.results / "serving_control.csv")
    return 0


def measure(url: str, fixed: float | None, rate: float, seconds: float, target: float) -> dict[str, object]:
    asked = questions(min(int(rate * seconds), 768))
    lam = {"max_intensity": 1.0} if fixed is None else {"intensity": fixed}
    bodies = [chat(question.text, seed=i, **lam) for i, question in enumerate(asked)]
    said, took = ask(url, bodies, rate=rate)
    if lost := [answer.error for answer in said if answer.error]:
        raise RuntimeError(f"{len(lost)} of {len(said)} answers did not come: {lost[0]}")
    right = sum(answer.text.strip() == question.answer for answer, question in zip(said, asked, strict=True))
    latencies = [answer.seconds for answer in said]
    return {
        **about(),
        "mode": "load" if fixed is None else f"λ={fixed:g}",
        "rate": f"{rate:g}",
        "target": f"{target:g}",
        "requests": len(said),
        "answered": f"{len(said) / took:.2f}",
        "right": f"{right / took:.2f}",
        "accuracy": f"{right / len(said):.3f}",
        "intensity": f"{fmean(answer.intensity for answer in said):.3f}",
        "tokens": f"{fmean(answer.tokens for answer in said):.1f}",
        "first_p50": f"{quantile([answer.first for answer in said], 0.5):.2f}",
        "mean": f"{fmean(latencies):.2f}",
        "p50": f"{quantile(latencies, 0.5):.2f}",
        "p95": f"{quantile(latencies, 0.95):.2f}",
        "late": f"{sum(latency > target for latency in latencies) / len(said):.3f}",
    }


if __name__ == "__main__":
    raise SystemExit(main())
