"""Writes the tables of the README and the docs from results/*.csv, between `<!-- table: NAME -->` and `<!-- end -->`.

python -m benchmarks.tables
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from dami.evaluation.statistics import Interval
from dami.evaluation.study import PERMUTED, read_study

from benchmarks import decode
from benchmarks.host import GPU, GPU_STEPS, STEPS
from benchmarks.lams import KINDS, SEQUENCE
from benchmarks.linear import BLEND, COPIES, CUDA, HUGE, MERGED, MERGED_FLOAT32, OURS, TRITON, TWO
from benchmarks.record import RESULTS, latest, load
from dami_kernels.tuning.cuda import MAX_ROWS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
FORMATS = ("pair", "int8", "int4", "w8d4", "lowrank")
LAYER = ("model", "layer", "n", "k", "m")  # identifies a case of linear.csv at one kind of λ
NOT_MEASURED = "Not measured yet."
GAINS = (
    "preference, price 0.2",
    "router, price 0.2",
    "calibrated on",
    "confidence, trial of 3, its",
    "confidence router, trial of 3, its",
)
LEFT_OUT = r"price 0\.[13]|trial of (1|20)\b|(its λ|oracle).* price (0\.5|1)$"  # policies that are in the results only
Row = dict[str, str]


def newest(path: Path, **wanted: str) -> list[Row]:
    """Returns the rows of the newest run among a results file's rows with the wanted values."""
    rows = load(path, **wanted)
    date = max(row["date"] for row in rows)
    return [row for row in rows if row["date"] == date]


def measured(file: str, is_wanted: Callable[[Row], bool], **wanted: str) -> list[Row]:
    """Returns the wanted rows of the device measured last."""
    rows = [row for row in load(RESULTS / file, **wanted) if is_wanted(row)]
    device = max(rows, key=lambda row: row["date"])["device"] if rows else None
    return [row for row in rows if row["device"] == device]


def is_gpu(row: Row) -> bool:
    return row["isa"].startswith(("sm_", "gfx"))


def is_cpu(row: Row) -> bool:
    return not is_gpu(row)


def markdown(lines: Iterable[Iterable[object]]) -> str:
    head, *body = [[str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def about(rows: list[Row]) -> str:
    """Returns one line that says where the newest of the rows was measured."""
    row = max(rows, key=lambda row: row["date"])
    threads = f", {row['threads']} threads" if row["threads"] else f", driver {row['driver']}, {row['clock_mhz']} MHz"
    return f"{row['device']} ({row['isa']}){threads}, torch {row['torch']}, {row['dtype']}, commit {row['commit']}.\n\n"


def pair() -> str:
    """Tabulates accuracy and tokens of the shipped pair over λ, on easy, hard and all questions."""
    from dami.evaluation.frontier import wilson

    rows = newest(RESULTS / "pair_curve.csv", sampling="temperature 0.8, top_p 0.95")
    lines = [["λ", "accuracy, %", "tokens", "level 1: accuracy, tokens", "level 5: accuracy, tokens"]]
    for lam in sorted({row["intensity"] for row in rows}, key=float):

        def summary(levels: str, lam: str = lam) -> tuple[int, float, float]:
            some = [row for row in rows if row["intensity"] == lam and row["level"] in levels]
            n = sum(int(row["n"]) for row in some)
            means = [sum(int(row["n"]) * float(row[key]) for row in some) / n for key in ("accuracy", "tokens_mean")]
            return n, *means  # type: ignore[return-value]

        n, accuracy, tokens = summary("12345")
        low, high = wilson(accuracy, n)
        cells = [f"{float(lam):g}", f"{accuracy:.0%} ({low:.0%} to {high:.0%})".replace("%", ""), f"{tokens:.0f}"]
        for level in "15":
            _, accuracy, tokens = summary(level)
            cells.append(f"{100 * accuracy:.0f}, {tokens:.0f}")
        lines.append(cells)
    return markdown(lines)


def smollm2() -> str:
    """Tabulates accuracy and tokens of SmolLM2 and its thinking adapter over λ, by task."""
    rows = [row for row in newest(RESULTS / "smollm2_curve.csv") if row["level"] == "all"]
    by = {(row["intensity"], row["task"]): row for row in rows}
    tasks = sorted({row["task"] for row in rows}, key=lambda task: (task == "all", task))
    lams = sorted({row["intensity"] for row in rows}, key=float)
    lines = [["questions", *(f"λ = {float(lam):g}" for lam in lams)]]
    for task in tasks:
        cells = [f"{task if task == 'all' else f'`{task}`'} ({by[lams[0], task]['n']})"]
        for lam in lams:
            row = by[lam, task]
            right, low, high = (100 * float(row[key]) for key in ("accuracy", "acc_low", "acc_high"))
            cells.append(f"{right:.0f} ({low:.0f} to {high:.0f}), {float(row['tokens_mean']):.0f}")
        lines.append(cells)
    for name, key in (("thinks, %", "thinking"), ("comes to its end, %", "well_formed")):
        lines.append([name, *(f"{100 * float(by[lam, 'all'][key]):.0f}" for lam in lams)])
    return markdown(lines)


def cell(rows: dict[tuple[str, ...], Row], key: tuple[str, ...], unit: tuple[str, ...], bold: bool) -> str:
    """Formats the ratio to the row `unit` and, for our operators, the share of the limit in brackets."""
    if key not in rows or unit not in rows or rows[key]["date"] != rows[unit]["date"]:
        return "–"  # compare only within one run
    row, median = rows[key], float(rows[key]["median_ms"])
    ratio = f"{median / float(rows[unit]['median_ms']):.2f}"
    return f"**{ratio}** ({float(row['limit_ms']) / median:.0%})" if bold else ratio


def linear(rows: list[Row]) -> str:
    """Tabulates one layer's time relative to F.linear on one merged weight, by rows, with our share of the limit."""
    if not rows:
        return NOT_MEASURED
    by = latest(rows, "lam", "method", "format", "m")
    sizes = sorted({row["m"] for row in rows}, key=int)
    merged = {row["m"]: f"{float(row['median_ms']):.3g} ms" for row in by.values() if row["method"] == MERGED}
    lines: list[list[str]] = [["weights", "λ", *(f"M={m}" for m in sizes)]]
    lines.append(["`F.linear` on one merged weight", "one", *(merged.get(m, "–") for m in sizes)])

    def add(kind: str, method: str, format: str = "") -> None:
        if any(key[:3] == (kind, method, format) for key in by):
            cells = (cell(by, (kind, method, format, m), (kind, MERGED, "", m), bool(format)) for m in sizes)
            name = f"`{format}`, huge pages" if method == HUGE else f"`{format}`" if format else method
            lines.append([name, KINDS[kind], *cells])

    for kind in ("distinct", "uniform", "identical", "zero"):
        add(kind, HUGE, "pair")
        for format in FORMATS:
            if format != "lowrank" or kind == "distinct":  # its time does not depend on λ
                add(kind, OURS, format)
    for kind, method in (("distinct", COPIES), ("distinct", TWO), ("uniform", BLEND), ("identical", BLEND)):
        add(kind, method)
    add("distinct", MERGED_FLOAT32)
    return about(rows) + markdown(lines)


def by_case(rows: list[Row], *keys: str) -> str:
    """Tabulates, per case (columns `keys`), the time relative to plain PyTorch on one merged weight."""
    if not rows:
        return NOT_MEASURED
    by = latest(rows, *keys, "method", "format")
    lines: list[list[str]] = []
    for (*case, method, _), row in by.items():
        if method.endswith("one merged") or method == "one merged model":
            unit = (*case, method, "")
            ours = {
                key[-1]: cell(by, key, unit, True)
                for key in by
                if [*key[:-2]] == case and key[-1] and key[-2] not in (CUDA, HUGE, TRITON)
            }
            two = [cell(by, key, unit, False) for key in by if [*key[:-2]] == case and key[-2].startswith("two")]
            cells = [*(ours.get(format, "–") for format in FORMATS), *(two or ["–"])]
            lines.append([*case, f"{float(row['median_ms']):.3g} ms", *cells])
    titles = ({"m": "M", "n": "N", "k": "K"}.get(key, key) for key in keys)
    head = [*titles, "one merged", *(f"`{format}`" for format in FORMATS), "two"]
    return about(rows) + markdown([head, *lines])


def kernels(rows: list[Row]) -> str:
    """Tabulates, per case of few rows, the operator's chosen kernel and the other one, in microseconds."""
    by = latest(
        [row for row in rows if row["format"] in FORMATS and int(row["m"]) <= MAX_ROWS], *LAYER, "format", "method"
    )
    lines = []
    for key, row in by.items():
        for other in (CUDA, TRITON):
            if key[-1] == OURS and (beside := by.get((*key[:-1], other))) and beside["date"] == row["date"]:
                times = [f"{1e3 * float(each['median_ms']):.1f} µs" for each in (row, beside)]
                lines.append([*key[1:-1], *(times if other == CUDA else times[::-1])])
    if not lines:
        return NOT_MEASURED
    return about(rows) + markdown([["layer", "N", "K", "M", "format", "Triton", "CUDA C++"], *lines])


def formats() -> str:
    """Tabulates each format's loss in the weights and in the shipped pair's answers."""
    errors = latest(newest(RESULTS / "formats.csv"), "weights", "stored", "lam")
    asked = latest(newest(RESULTS / "format_quality.csv"), "format", "lam")
    lams = sorted({lam for _, lam in asked}, key=float)
    lines = [["format", "λ", "error, Gaussian", "error, shipped pair", "KL", "accuracy, %", "tokens"]]
    for format in dict.fromkeys(format for format, _ in asked):
        for lam in lams:
            row = asked[format, lam]
            accuracy, low, high = (f"{float(row[key]):.0%}" for key in ("accuracy", "accuracy_low", "accuracy_high"))
            error = [f"{float(errors[source, format, lam]['error']):.4f}" for source in ("Gaussian", "shipped pair")]
            name = f"`{format}`" if lam == lams[0] else ""
            interval = f"{accuracy} ({low} to {high})".replace("%", "")
            lines.append(
                [name, f"{float(lam):g}", *error, f"{float(row['kl']):.6f}", interval, f"{float(row['tokens']):.0f}"]
            )
    return markdown(lines)


def roundings() -> str:
    """Tabulates the error at λ=1 by bits, group size and rounding of the difference."""
    errors = latest([row for row in newest(RESULTS / "formats.csv") if row["lam"] == "1.0"], "stored", "weights")
    sources = list(dict.fromkeys(source for _, source in errors))
    lines = [["difference stored in", "bytes per weight", *(f"error, {source}" for source in sources)]]
    for stored in dict.fromkeys(stored for stored, _ in errors):
        if " " in stored and not stored.startswith("a merged copy"):  # ways to store the difference, no formats
            cells = (f"{float(errors[stored, source]['error']):.4f}" for source in sources)
            lines.append([stored, f"{float(errors[stored, sources[0]]['bytes_per_weight']):.2f}", *cells])
    return markdown(lines)


def loading() -> str:
    """Tabulates time and memory of packing and loading a pair."""
    by = latest(load(RESULTS / "loading.csv"), "model", "format", "way")
    lines = [["model", "format", "", "seconds", "own memory, GB", "files, GB"]]
    for (model, format, way), row in by.items():
        name = "`dami.pack`" if way == "pack" else f"load {way}"
        lines.append([model, f"`{format}`", name, row["seconds"], row["own_gb"], row["stored_gb"]])
    return markdown(lines)


def scaled() -> str:
    """Tabulates what published pairs need, computed from the rates measured last."""
    from benchmarks import scale

    rows = latest(load(RESULTS / "scale.csv"), "what", "of").values()
    if not rows:
        return NOT_MEASURED
    row = max(rows, key=lambda row: row["date"])
    head, *lines = scale.table(scale.shown(), scale.rates(RESULTS))
    told = f"Computed from rates of one core and the disk of {row['device']}, commit {row['commit']}.\n\n"
    return told + markdown([head, *([line[0], f"`{line[1]}`", *line[2:]] for line in lines)])


def load_test(name: str, keys: tuple[str, ...], columns: Mapping[str, str]) -> str:
    """Tabulates the newest row of each combination of `keys`, with these columns renamed."""
    rows = latest(load(RESULTS / f"serving_{name}.csv"), *keys).values()
    return markdown([[*keys, *columns.values()], *([row[column] for column in (*keys, *columns)] for row in rows)])


def square(isa: str) -> str:
    return linear(measured("linear.csv", is_cpu, model="square", dtype="bf16", isa=isa))


def four_b(kind: str, is_wanted: Callable[[Row], bool]) -> list[Row]:
    return measured("linear.csv", is_wanted, model="Qwen3-4B", dtype="bf16", lam=kind)


def percents(row: Row, name: str) -> list[float]:
    """Returns a share and the bounds of its interval, in percent."""
    return [100 * float(row[f"{name}{end}"]) for end in ("", "_low", "_high")]


def percent(row: Row, name: str) -> str:
    """Formats a share with its interval."""
    return "{:.1f} ({:.1f} to {:.1f})".format(*percents(row, name))


def change(row: Row, name: str) -> str:
    """Formats a difference of shares with its interval, in points."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*percents(row, name))


def budgets(pair: str) -> str:
    """Tabulates what keeping thoughts within a budget costs, by the ways to do so."""
    rows = newest(RESULTS / f"budgets_{pair}.csv")
    shares = ("without an answer, %", "thoughts that end by themselves, %")
    lines = [["λ", "budget", "way", "accuracy, %", "gain over the cut, points", *shares, "tokens"]]
    for row in rows:
        cells = [percent(row, "accuracy"), "" if row["way"] == "cut" else change(row, "gain")]
        cells += [f"{100 * float(row[key]):.0f}" for key in ("empty", "ended")]
        lines.append([f"{float(row['intensity']):g}", row["budget"], row["way"], *cells, f"{float(row['tokens']):.0f}"])
    return markdown(lines)


def budgets_of_zoo() -> str:
    """Tabulates the cut, and λ that bends over a thought's own length, on the pairs of the zoo at λ = 1."""
    budgets = ("8", "24")
    heads = [
        f"{what} {budget}{unit}" for budget in budgets for what, unit in (("cut at", ": %"), ("bend to", ": gain"))
    ]
    lines = [["pair", *heads]]
    for file in sorted(RESULTS.glob("budgets_zoo_*.csv")):
        rows = [row for row in newest(file) if float(row["intensity"]) == 1]
        cells = []
        for budget in budgets:
            by_way = {row["way"].split(" over")[0]: row for row in rows if row["budget"] == budget}  # the last bend
            cells += [f"{100 * float(by_way['cut']['accuracy']):.0f}", change(by_way["bend"], "gain")]
        lines.append([f"`{file.stem.removeprefix('budgets_zoo_')}`", *cells])
    return markdown(lines)


def estimators(pair: str) -> str:
    """Compares policies on a pair with static λ at equal tokens."""
    lines = [["λ by", "accuracy, %", "tokens", "static λ with as many, %", "gain, points"]]
    for row in newest(RESULTS / f"estimators_{pair}.csv"):
        if re.search(LEFT_OUT, row["policy"]):
            continue
        cells = [row["policy"], percent(row, "accuracy"), f"{float(row['tokens']):.1f}"]
        lines.append([*cells, f"{100 * float(row['static']):.1f}", change(row, "gain")])
    return markdown(lines)


def tails(pair: str) -> str:
    """Tabulates accuracy and tokens over λ by the tail of the prompt, and what each tail costs."""
    if not load(RESULTS / f"tails_{pair}.csv"):
        return NOT_MEASURED
    rows = newest(RESULTS / f"tails_{pair}.csv")
    lams = list(dict.fromkeys(row["intensity"] for row in rows))
    lines = [["read at λ", *(f"λ = {float(lam):g}" for lam in lams), "worth lost, points", "accuracy lost at λ = 1"]]
    for tail in dict.fromkeys(row["tail"] for row in rows):
        of_tail = [row for row in rows if row["tail"] == tail]
        cells = [f"{100 * float(row['accuracy']):.0f} @ {float(row['tokens']):.0f}" for row in of_tail]
        name = {"all": "all of the prompt", "turn": "the last user message on", "1": "the last token"}
        lost = ["", ""] if tail == "all" else [change(of_tail[0], what) for what in ("worth_lost", "accuracy_lost")]
        lines.append([name.get(tail, f"the last {tail} tokens"), *cells, *lost])
    return markdown(lines)


def tails_of_zoo() -> str:
    """Tabulates what each tail costs at λ = 1 on every measured pair of the zoo, and the least that costs nothing."""
    names = {"1": "last token", "8": "last 8", "turn": "last user message on"}
    lines = [["pair", "λ = 1, %", *(f"lost behind the {name}, points" for name in names.values()), "least tail"]]
    for file in sorted(RESULTS.glob("tails_zoo_*.csv")):
        end = {row["tail"]: row for row in newest(file) if float(row["intensity"]) == 1}
        lost = [change(end[tail], "accuracy_lost") for tail in names]
        right = f"{100 * float(end['all']['accuracy']):.0f}"
        lines.append([f"`{file.stem.removeprefix('tails_zoo_')}`", right, *lost, end["all"]["least"] or "none"])
    return markdown(lines)


def tuning(pair: str) -> str:
    """Tabulates the ways to answer that a search has found, and those of one λ, by their tokens."""
    lines = [["λ of the thought", "of the answer", "of the prompt", "accuracy, %", "tokens", "gain, points", "preset"]]
    for row in sorted(newest(RESULTS / f"tuning_{pair}.csv"), key=lambda row: float(row["tokens"])):
        lams = [row["thought"], *(row[name] or "the same" for name in ("answer", "prompt"))]
        gain = change(row, "gain") if row["answer"] + row["prompt"] else ""
        cells = [percent(row, "accuracy"), f"{float(row['tokens']):.1f}", gain, row["presets"].replace(" ", ", ")]
        lines.append([*lams, *cells])
    return markdown(lines)


def study_paths() -> str:
    """Tabulates the barriers on a pair's path, and on those to its controls."""
    study = read_study(RESULTS / "study_shipped.json")
    heads = ["barrier of both ends' answers, nats per token", "of the right answer", "of the error, points"]
    lines = [["path from the instruct end to", *heads]]
    for name, path in {"the thinking end": study.pair, **study.controls}.items():
        of = path.barriers
        named = "the same, permuted" if name == PERMUTED else name
        losses = [within(of[kind].height, 1, 2) for kind in ("both", "answer")]
        lines.append([named, *losses, within(of["error"].height, 100, 0)])
    return markdown(lines)


def study_parts() -> str:
    """Tabulates what each part of the pair does at λ = 1 alone, and what the others do without it."""
    study = read_study(RESULTS / "study_shipped.json")
    of = {each.name: [within(each.accuracy, 100, 0), f"{each.tokens.value:.0f}"] for each in study.ablations}
    zero, one = study.pair.intensities.index(0.0), study.pair.intensities.index(1.0)
    whole = [[within(study.pair.accuracy[at], 100, 0), f"{study.pair.tokens[at].value:.0f}"] for at in (zero, one)]
    lines = [["λ = 1 only in", "right, %", "tokens", "λ = 1 in all but", "right, %", "tokens"]]
    lines.append(["nothing (λ = 0)", *whole[0], "nothing (λ = 1)", *whole[1]])
    parts = [name.removeprefix("only ") for name in of if name.startswith("only ")]
    return markdown([*lines, *([name, *of[f"only {name}"], name, *of[f"all but {name}"]] for name in parts)])


def within(interval: Interval, unit: float, digits: int) -> str:
    """Formats a value with its interval."""
    value, low, high = (f"{unit * each:.{digits}f}" for each in interval)
    return f"{value} ({low} to {high})"


def ends(pair: str) -> str:
    """Tabulates accuracy and tokens over λ with other ends or changing λ, and the worth that this wins."""
    if not load(RESULTS / "ends.csv", pair=pair):
        return NOT_MEASURED
    rows = newest(RESULTS / "ends.csv", pair=pair)
    lams = list(dict.fromkeys(row["intensity"] for row in rows))
    lines = [["pair", *(f"λ = {float(lam):g}" for lam in lams), "worth won, points"]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        some = [row for row in rows if row["variant"] == variant]
        cells = [f"{100 * float(row['accuracy']):.0f} @ {float(row['tokens']):.0f}" for row in some]
        lines.append([variant, *cells, "" if variant == rows[0]["variant"] else change(some[0], "won")])
    return markdown(lines)


def by_pair() -> dict[tuple[str, ...], Row]:
    """Returns the newest row of each pair and policy in estimator_pairs.csv; pairs that rules were chosen on first."""
    found = latest(load(RESULTS / "estimator_pairs.csv"), "pair", "policy")
    return dict(sorted(found.items(), key=lambda item: item[1]["tuned_on"] != "True"))


def won_of_room(row: Row) -> str:
    """Formats what a policy adds to the best static λ, and the room for that, in points of worth."""
    room = 100 * float(row["room"])
    return f"{room * float(row['won']):+.1f} of {room:.1f}"


def estimator_pairs(policy: str) -> str:
    """Tabulates what a policy gives on each pair, beside the two ends."""
    rows = by_pair()
    heads = ["pair", "λ = 0: accuracy, tokens", "λ = 1", "`auto`", "gain, points", "AES", "empty or cut, %"]
    lines = [[*heads, "won of the room, points", "time"]]
    for pair in dict.fromkeys(pair for pair, _ in rows):
        row = rows[pair, policy]
        shown = [rows[pair, "λ = 0"], rows[pair, "λ = 1"], row]
        cells = [f"{100 * float(each['accuracy']):.1f}, {float(each['tokens']):.1f}" for each in shown]
        cells += [change(row, "gain"), f"{float(row['aes']):.2f}"]
        cells += [
            f"{100 * float(row['incomplete']):.1f}",
            won_of_room(row),
            f"{float(row['time']):.2f}".replace("nan", "–"),
        ]
        lines.append([f"`{pair.removeprefix('zoo/')}`" + ("" if row["tuned_on"] == "True" else ", unseen"), *cells])
    return markdown(lines)


def estimator_gains() -> str:
    """Tabulates the gain of policies at the default price on each pair, and what of the room they win, in points."""
    rows = by_pair()
    pairs = [pair for pair, policy in rows if policy == "calibrated on states alone"]  # of which all was measured
    lines = [["λ by", *(f"`{pair.removeprefix('zoo/')}`: gain, won" for pair in pairs)]]
    for policy in dict.fromkeys(policy for _, policy in rows):
        if policy.startswith(GAINS):
            some = [rows[pair, policy] for pair in pairs]
            lines.append([policy, *(f"{100 * float(row['gain']):+.1f}, {won_of_room(row)}" for row in some)])
    return markdown(lines)


def summary() -> str:
    """Compares N λ in one batch with N merged copies: bytes, time, accuracy."""
    stored = latest(newest(RESULTS / "formats.csv"), "stored")
    rows = measured("linear.csv", is_cpu, model="square", dtype="bf16", isa="avx512_bf16", lam="distinct")
    by = latest(rows, "method", "format", "m")
    asked = {row["format"]: row for row in newest(RESULTS / "format_quality.csv") if row["lam"] == "0.5"}
    sizes = ("1", "4", "16")
    lines: list[list[str]] = [["weights", "bytes per weight", *(f"time, M = {m}" for m in sizes), "accuracy, %"]]

    def times(method: str, format: str) -> list[str]:
        return [cell(by, (method, format, m), (MERGED, "", m), False) for m in sizes]

    lines.append(["a merged bfloat16 copy per λ", "2 N", *times(COPIES, ""), "as `pair`"])
    for format in ("pair", "int4", "w8d4"):
        accuracy, low, high = (
            f"{float(asked[format][key]):.0%}" for key in ("accuracy", "accuracy_low", "accuracy_high")
        )
        interval = f"{accuracy} ({low} to {high})".replace("%", "")
        lines.append(
            [f"`{format}`", f"{float(stored[format,]['bytes_per_weight']) + 1e-9:.2f}", *times(OURS, format), interval]
        )
    return about(rows) + markdown(lines)


def predicted(kind: str, *gpus: str) -> str:
    """Tabulates predict.csv for gate_up: the time as a ratio to one merged weight's least, and the limit that sets it.

    Args:
        kind: of λ; empty for all kinds.
        gpus: their names.
    """
    rows = predictions(layer="gate_up", kernel="lerp_linear")
    rows = [row for row in rows if row["gpu"] in gpus and kind in ("", row["lam"])]
    sizes = list(dict.fromkeys(row["m"] for row in rows))
    by = {(row["gpu"], row["format"], row["lam"], row["m"]): row for row in rows}
    lines: list[list[str]] = [["GPU", "weights", "λ", *(f"M={m}" for m in sizes)]]
    for gpu in gpus:
        times = {row["m"]: f"{float(row['merged_us']):.1f} µs" for row in rows if row["gpu"] == gpu}
        lines.append([gpu, "one merged", "one", *times.values()])
        for format, lam in dict.fromkeys(key[1:3] for key in by if key[0] == gpu):
            lines.append([gpu, f"`{format}`", KINDS[lam], *(told(by[gpu, format, lam, m]) for m in sizes)])
    return source(rows) + markdown(lines)


def told(row: Row) -> str:
    """Describes a prediction: of our kernel and its limit, of the library's route where that is taken; and what our
    kernel was measured to take."""
    merged = float(row["merged_us"])
    text = f"{float(row['predicted_us']) / merged:.2f} ({row['limit']})"
    if row.get("route_us"):
        text = f"{float(row['route_us']) / merged:.2f} ({row['route']}; kernel {text})"
    return f"{text}, measured {float(row['measured_us']) / merged:.2f}" if row["measured_us"] else text


def predicted_code() -> str:
    """Tabulates what of the machine code on an H100 or H200 the predictions for gate_up follow from."""
    rows = [row for row in predictions(layer="gate_up", kernel="lerp_linear", gpu="H200") if row["lam"] != "identical"]
    by = {(row["format"], row["m"], row["lam"]): row for row in rows}
    head = ["weights", "M", "tile", "registers", "spills", "blocks", "one end", "both ends", "fma", "alu", "convert"]
    lines: list[list[str]] = [[*head, "shared"]]
    for format, m in dict.fromkeys(key[:2] for key in by):
        end, both = by[format, m, "zero"], by[format, m, "distinct"]
        cells = [both[key] for key in ("tile", "registers", "spills", "blocks")]
        pipes = [both[f"{pipe}_instructions"] for pipe in ("fma", "alu", "convert", "shared")]
        lines.append([f"`{format}`", m, *cells, end["instructions"], both["instructions"], *pipes])
    return source(rows) + markdown(lines)


def predicted_others() -> str:
    """Tabulates the predictions of what is not `lerp_linear`, on an H200."""
    rows = [row for row in predictions(gpu="H200", lam="distinct") if row["m"] in ("1", "4096")]
    rows = [row for row in rows if row["kernel"] != "lerp_linear"]
    lines: list[list[str]] = [
        ["operator", "N", "K", "weights", "M", "registers", "memory, µs", "predicted, µs", "limit"]
    ]
    keys = ("n", "k", "format", "m", "registers", "memory_us", "predicted_us", "limit")
    lines += [[f"`{row['kernel']}`", *(row[key] for key in keys)] for row in rows]
    return source(rows) + markdown(lines)


def predictions(**wanted: str) -> list[Row]:
    """Returns the wanted rows of the last run of `predict` for each GPU and kernel."""
    rows = load(RESULTS / "predict.csv")
    last = {(row["gpu"], row["kernel"]): row["date"] for row in sorted(rows, key=lambda row: str(row["date"]))}
    newest = [row for row in rows if row["date"] == last[row["gpu"], row["kernel"]]]
    return [row for row in newest if all(row[key] == value for key, value in wanted.items())]


def source(rows: list[Row]) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"Predicted, not measured: `python -m benchmarks predict`, bf16, commit {commits}.\n\n"


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "pair": pair,
    "load throughput": lambda: load_test(
        "throughput",
        ("model", "mode"),
        {
            "answers_per_second": "answers/s",
            "tokens_per_second": "tokens/s",
            "p50": "median latency, s",
            "p95": "95th percentile",
            "memory_gb": "memory, GB",
        },
    ),
    "load prefixes": lambda: load_test(
        "prefixes",
        ("measure", "mode"),
        {"requests": "requests", "tokens": "tokens read", "cpu": "CPU, s", "overhead": "overhead"},
    ),
    "load streams": lambda: load_test(
        "streams",
        ("mode", "streams"),
        {
            "lost": "lost",
            "crossed": "crossed",
            "other": "rounded otherwise",
            "tokens_per_second": "tokens/s",
            "whole_p50": "median latency, s",
            "whole_p99": "99th percentile",
        },
    ),
    "load faults": lambda: load_test(
        "faults",
        ("fault", "faulty"),
        {
            "beside": "answers beside",
            "lost": "lost",
            "other": "changed",
            "server_errors": "5xx",
            "slowest": "slowest beside, s",
            "alone_slowest": "without faults",
        },
    ),
    "load soak": lambda: load_test(
        "soak",
        ("requests",),
        {
            "answered": "answered",
            "lost": "lost",
            "wrong": "refused, as they were wrong",
            "other": "other answers to wrong ones",
            "growth": "growth of memory",
            "held": "KV cache held",
            "small_p95": "small request, s",
            "beside_p95": "beside giants, s",
            "refused": "429 under overload",
            "drained": "ended after SIGTERM",
            "exit": "exit",
        },
    ),
    "load control": lambda: load_test(
        "control",
        ("rate", "mode"),
        {
            "intensity": "mean λ",
            "accuracy": "accuracy",
            "right": "right answers/s",
            "mean": "mean latency, s",
            "p95": "95th percentile",
            "late": "share later than the target",
        },
    ),
    "estimators shipped": lambda: estimators("shipped"),
    "estimators smollm2": lambda: estimators("smollm2"),
    "budgets shipped": lambda: budgets("shipped"),
    "budgets zoo": budgets_of_zoo,
    "tails shipped": lambda: tails("shipped"),
    "tails smollm2": lambda: tails("smollm2"),
    "tails zoo": tails_of_zoo,
    "tuning shipped": lambda: tuning("shipped"),
    "study paths": study_paths,
    "study parts": study_parts,
    "ends shipped": lambda: ends("shipped"),
    "ends products": lambda: ends("zoo/products"),
    "estimator pairs": lambda: estimator_pairs("calibrated, price 0.2"),
    "estimator gains": estimator_gains,
    "smollm2": smollm2,
    "formats": formats,
    "roundings": roundings,
    "loading": loading,
    "scale": scaled,
    "host": lambda: host(lambda case: case not in ("model", STEPS) and not case.startswith(GPU)),
    "host steps": lambda: host(STEPS.__eq__),
    "host launches": lambda: host(lambda case: case.startswith(GPU) and case != GPU_STEPS),
    "host launch steps": lambda: host(GPU_STEPS.__eq__),
    "host model": lambda: host("model".__eq__, 1000, "ms"),
    "peers shipped": lambda: peers("shipped"),
    "peers smollm2 amx": lambda: peers("SmolLM2-135M's shapes", isa="amx"),
    "peers smollm2 avx512_bf16": lambda: peers("SmolLM2-135M's shapes", isa="avx512_bf16"),
    "load steps": lambda: steps(),
    "generate avx2": lambda: generate("avx2"),
    "generate amx": lambda: generate("amx"),
    "generate avx512_bf16": lambda: generate("avx512_bf16"),
    "decode": lambda: decoding([decode.STEP, decode.LEAST]),
    "decode parts": lambda: decoding([*decode.PARTS, decode.PYTHON]),
    "linear amx": lambda: square("amx"),
    "linear avx2": lambda: square("avx2"),
    "linear avx512_bf16": lambda: square("avx512_bf16"),
    "layers cpu": lambda: by_case(four_b("distinct", is_cpu), *LAYER),
    "operators cpu": lambda: by_case(measured("operators.csv", is_cpu), "operator", "shape", "m"),
    "step cpu": lambda: by_case(measured("step.csv", is_cpu), "layers", "m"),
    "linear gpu": lambda: linear(measured("linear.csv", is_gpu, model="Qwen3-4B", layer="gate_up", dtype="bf16")),
    "layers gpu": lambda: by_case(four_b("distinct", is_gpu), *LAYER),
    "prefill gpu": lambda: by_case([row for row in four_b("uniform", is_gpu) if int(row["m"]) > SEQUENCE], *LAYER),
    "ragged gpu": lambda: by_case([row for row in four_b("ragged", is_gpu) if int(row["m"]) > SEQUENCE], *LAYER),
    "kernels gpu": lambda: kernels(four_b("distinct", is_gpu)),
    "operators gpu": lambda: by_case(measured("operators.csv", is_gpu), "operator", "shape", "m"),
    "predict": lambda: predicted("", "H200"),
    "predict gpus": lambda: predicted("distinct", "H100", "B200", "MI300X"),
    "predict code": predicted_code,
    "predict others": predicted_others,
    "step gpu": lambda: by_case(measured("step.csv", is_gpu), "layers", "m"),
}


def where(row: Row) -> str:
    """Returns one line that says where a row of host.csv or generate.csv was measured."""
    threads = "one thread" if row["threads"] == "1" else f"{row['threads']} threads"
    return f"{row['device']} ({row['isa']}), {threads}, torch {row['torch']}, commit {row['commit']}.\n\n"


def host(wanted: Callable[[str], bool], unit: float = 1.0, name: str = "µs") -> str:
    """Tabulates host.csv of the quietest machine: the first method's time, and the others' as ratios to it."""
    rows = newest_run("host.csv", lambda row: wanted(row["case"]), isa="avx512_bf16")
    lines: list[list[str]] = [["case", "method", name, "ratio"]]
    lines += [[row["case"], row["method"], f"{float(row['median_us']) / unit:.3g}", row["ratio"]] for row in rows]
    return where(rows[0]) + markdown(lines)


def newest_run(file: str, wanted: Callable[[Row], bool] = lambda _: True, **equal: str) -> list[Row]:
    """Returns the rows of a file's last run, whose parts are minutes apart, that has any that are wanted."""
    rows = [row for row in load(RESULTS / file, **equal) if wanted(row)]
    last = max(rows, key=lambda row: row["date"], default={})
    return [row for row in rows if (row["date"], row["commit"]) == (last["date"], last["commit"])]


def generate(isa: str) -> str:
    """Tabulates generate.csv: a step of the plain model in ms, and of the patched one as ratios to it."""
    last = newest_run("generate.csv", isa=isa)[0]  # of its commit, as cases may have been measured in several runs
    rows = load(RESULTS / "generate.csv", isa=isa, device=last["device"], commit=last["commit"])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [["dtype", "B", "plain, ms a step", *(f"`{method}`" for method in methods[1:])]]
    by_case = {(row["dtype"], row["batch"], row["method"]): row for row in rows}
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
        plain, *ours = (by_case[dtype, batch, method] for method in methods)
        lines.append([dtype, batch, f"{float(plain['median_ms']):.1f}", *(f"**{row['ratio']}**" for row in ours)])
    return where(rows[0]) + markdown(lines)


def peers(model: str, **where_measured: str) -> str:
    """Tabulates peers.csv for a model: rates of each method, and of its tokens as a ratio to `dami serve` at five λ."""
    if not (measured := newest_run("peers.csv", model=model, **where_measured)):
        return NOT_MEASURED
    same = {name: measured[0][name] for name in ("device", "commit")}  # methods may be run apart, with --only
    rows = list(latest(load(RESULTS / "peers.csv", model=model, **same), "method", "dtype").values())
    ours = next((float(row["tokens_per_second"]) for row in rows if row["method"] == "dami serve, five λ"), None)
    lines = [["method", "dtype", "tokens/s", "ratio", "answers/s", "memory, GB", "equal, %"]]
    for row in rows:
        ratio = f"{float(row['tokens_per_second']) / ours:.2f}" if ours else "–"
        cells = [row["method"], row["dtype"], f"{float(row['tokens_per_second']):.0f}", ratio]
        equal = f"{100 * float(row['equal']):.0f}"
        lines.append([*cells, f"{float(row['answers_per_second']):.2f}", row["memory_gb"], equal])
    engines = ", ".join(dict.fromkeys(row["engine"] for row in rows))
    loads = [float(row["load_before"]) for row in rows]
    asked = f"{rows[0]['questions']} questions, {rows[0]['tokens']} tokens each"
    said = f"{engines}. {asked}. Load average before a method: {min(loads):g} to {max(loads):g}."
    return f"{where(rows[0]).strip()} {said}\n\n{markdown(lines)}"


def steps() -> str:
    """Tabulates serving_steps.csv: where the time of a step goes."""
    rows = newest_run("serving_steps.csv")
    if not rows:
        return NOT_MEASURED
    lines = [["part", "ms", "%"], *([row["part"], row["ms"], f"{100 * float(row['share']):.0f}"] for row in rows)]
    return where(rows[0]) + markdown(lines)


def decoding(parts: list[str]) -> str:
    """Tabulates decode.csv: parts of a step in ms by method, and with the whole step also tokens/s."""
    if not load(RESULTS / "decode.csv"):
        return NOT_MEASURED
    rows = newest_run("decode.csv")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by = {(row["method"], row["part"]): row for row in rows}
    lines = [["ms", *(f"`{method}`" for method in methods)]]
    lines += [[part, *(f"{float(by[method, part]['ms']):.2f}" for method in methods)] for part in parts]
    if decode.STEP in parts:
        for name, key in ("tokens/s", "tokens_per_s"), ("against plain", "speedup"), ("compiling, s", "compile_s"):
            lines.append([name, *(by[method, decode.STEP][key] or "–" for method in methods)])
    return where(rows[0]) + markdown(lines)


def shown(text: str) -> Iterator[str]:
    """Returns the names of the tables on a page."""
    return (match[1] for match in re.finditer(r"^<!-- table: (.+?) -->$", text, re.MULTILINE))


def filled(text: str) -> str:
    """Returns a page with every table regenerated."""
    return re.sub(
        r"^(<!-- table: (.+?) -->\n).*?^(<!-- end -->)$",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
