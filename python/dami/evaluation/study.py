"""The pilot study: what happens between the two ends of a pair, and which part of the model makes it happen.

Representation continuity: how alike the states of every layer are at neighbouring λ, and to those of both ends.
Structural connectivity: loss and accuracy along the path from the instruct end to the thinking end, a little beyond
both, and the same along a control path to another model. Ablations: λ = 1 in one part of the model only, or in all but
one. All λ and all ablations of a question are rows of one mixed batch, both where it is answered and where texts are
read.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dami.chat import answers_of, encode
from dami.doctor import installed, machine
from dami.evaluation.frontier import Interval, wilson
from dami.evaluation.path import Array, Barrier, Similarity, barrier, bootstrap, similarities
from dami.evaluation.permutations import permute
from dami.evaluation.sweeps import append, fingerprint, resume
from dami.evaluation.tasks import TO_STUDY, Task, check_distinct, check_enough
from dami.generation.pieces import generate_in_pieces
from dami.layers.base import LerpModule
from dami.patching.patch import patch_model
from dami.saving.merging import materialize
from dami.thoughts import Reader

Cell = tuple[str, int | None]  # a group of modules, and the layer
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

ENDS = (0.0, 1.0)
PATH = tuple(tenth / 10 for tenth in range(-2, 13))
TEXTS = ("answer", "instruct", "thinking")
GROUPS = {
    "attention": ("attn",),
    "MLP": ("mlp", "experts"),
    "norms": ("norm",),
    "embeddings": ("embed", "head"),
    "other": ("other",),
}
THIRDS = ("first third", "middle third", "last third")
PERMUTED = "permuted"
STATES = 8  # of a question, at most, that similarities are measured on
TEXT_TOKENS = 256  # of a text that is read, at most
COLUMNS = ("score", "tokens", "thought", "well_formed")


@dataclass(frozen=True)
class Setting:
    """λ of the whole model; or 1 in one part of it and 0 elsewhere, or the other way round.

    Attributes:
        intensity: λ outside the part.
        part: a key of `parts_of`; λ in it is 1 − intensity. None if there is none.
    """

    intensity: float
    part: str | None = None

    @property
    def name(self) -> str:
        if self.part is None:
            return f"{self.intensity:g}"
        return f"{'all but' if self.intensity else 'only'} {self.part}"


def parts_of(model: nn.Module) -> dict[str, frozenset[Cell]]:
    """The parts that can be set apart in a patched model: thirds of its layers, and groups of its modules.

    What lies outside the layers, such as embeddings and the last norm, is in no third.
    """
    cells = cells_of(model)
    layers = sorted({layer for _, layer in cells if layer is not None})
    found = {name: [cell for cell in cells if cell[0] in groups] for name, groups in GROUPS.items()}
    for name, third in zip(THIRDS, np.array_split(np.array(layers, dtype=int), 3), strict=True):
        found[name] = [cell for cell in cells if cell[1] in third.tolist()]
    names = (*THIRDS, *GROUPS)
    return {name: frozenset(found[name]) for name in names if found[name] and len(found[name]) < len(cells)}


def cells_of(model: nn.Module) -> list[Cell]:
    """Groups and layers of all interpolated modules, each once."""
    return list(dict.fromkeys((m.lerp.group, m.lerp.layer) for m in model.modules() if isinstance(m, LerpModule)))


def intensity_of(settings: Sequence[Setting], model: nn.Module) -> dict[Any, list[float]]:
    """What `generate(intensity=…)` and `forward` take, for one row per setting."""
    cells, parts = cells_of(model), parts_of(model)
    layers: dict[tuple[str, tuple[float, ...]], list[int | None]] = {}
    for cell in cells:
        lams = tuple(
            1 - each.intensity if each.part is not None and cell in parts[each.part] else each.intensity
            for each in settings
        )
        layers.setdefault((cell[0], lams), []).append(cell[1])
    # A group without layers means all its modules: first, for later ones hold.
    whole = {group: list(lams) for (group, lams), indices in layers.items() if None in indices}
    inside = {
        (group, tuple(index for index in indices if index is not None)): list(lams)
        for (group, lams), indices in layers.items()
    }
    return whole | {key: lams for key, lams in inside.items() if key[1]}


@dataclass(frozen=True)
class Trial:
    """One answer.

    Attributes:
        index: the question's place.
        setting: its name.
        score: from 0 to 1.
        tokens: generated, thought and end token included.
        thought: whether there is one.
        well_formed: whether there is an answer, and it came to its end.
        said: all of it, special tokens included.
    """

    index: int
    setting: str
    score: float
    tokens: int
    thought: bool
    well_formed: bool
    said: str


def answer(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: Sequence[Setting],
    path: Path,
    *,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> list[Trial]:
    """Answers every question in every setting; a question's rows are in one batch, and a batch on disk when it is done.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        settings: distinct ones.
        path: a file of JSON lines, at which an interrupted run goes on.
        rows: of a batch, at most; but no fewer than settings.
        seed: of the sampling, if `options` say so.
        on_batch: is told how many questions are done.
        options: of `model.generate`, those of `dami.generation.pieces.KNOWN`.
    """
    count = len(task.questions)
    step = max(1, rows // len(settings))
    batches = [range(start, min(start + step, count)) for start in range(0, count, step)]
    told = {
        "weights": fingerprint(model),
        "task": task.name,
        "questions": count,
        "settings": [each.name for each in settings],
        "rows": rows,
        "seed": seed,
        "options": {key: repr(value) for key, value in sorted(options.items())},
    }
    trials = [Trial(**found) for found in resume(path, told, [len(b) * len(settings) for b in batches])]
    reader = Reader.of(tokenizer)
    for number, batch in enumerate(batches):
        if len(trials) < batch.stop * len(settings):
            torch.manual_seed(hash((seed, number)))
            asked = [(index, setting) for index in batch for setting in settings]
            prompts = [task.questions[index].question for index, _ in asked]
            texts, inputs = encode(tokenizer, prompts)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            lams = intensity_of([setting for _, setting in asked], model)
            with torch.inference_mode():
                ids = generate_in_pieces(model, inputs, lams, **options).cpu()
            answers = answers_of(model, reader, ids, prompts, None, texts)
            news = [
                Trial(
                    index=index,
                    setting=setting.name,
                    score=task.score(index, said.text),
                    tokens=said.tokens,
                    thought=bool(said.thought),
                    well_formed=said.finished and bool(said.text),
                    said=tokenizer.decode(row[: said.tokens]),
                )
                for (index, setting), said, row in zip(asked, answers, ids, strict=True)
            ]
            append(path, [asdict(trial) for trial in news])
            trials += news
        on_batch(batch.stop)
    return trials


@dataclass(frozen=True, eq=False)
class Reading:
    """What settings make of given texts.

    Attributes:
        losses: cross-entropy in nats, summed over each text's tokens, [questions, settings], by kind of text.
        tokens: of each text, [questions], by kind.
        states: of every layer, at every λ of the path, [L, N, D].
        questions: which question each of the N states belongs to.
    """

    losses: dict[str, Array]
    tokens: dict[str, NDArray[np.int64]]
    states: list[Tensor]
    questions: NDArray[np.int64]

    def loss(self, kind: str, rows: Any = slice(None)) -> Array:
        """Mean cross-entropy per token of some questions' texts in every setting, in nats, [settings].

        Args:
            kind: of text; "both" is the mean of "instruct" and "thinking".
            rows: the questions' places.
        """
        if kind == "both":
            return (self.loss("instruct", rows) + self.loss("thinking", rows)) / 2
        return self.losses[kind][rows].sum(0) / max(1, self.tokens[kind][rows].sum())


def read(
    model: Any,
    tokenizer: Any,
    task: Task,
    said: Mapping[str, Sequence[str]],
    settings: Sequence[Setting],
    on_question: Callable[[int], None] = lambda done: None,
) -> Reading:
    """Reads texts after their questions, teacher-forced: each in one forward pass, whose rows are the settings.

    Losses are of the text's tokens only. States are taken where tokens of the thinking end's own text are predicted, at
    even distances from the prompt's last token on, at the λ of the whole model.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: the questions.
        said: what follows each question, by kind, one of them "thinking".
        settings: one row each.
        on_question: is told how many questions are done.
    """
    lams = intensity_of(settings, model)
    path = [place for place, setting in enumerate(settings) if setting.part is None]
    reader = Reader.of(tokenizer)
    losses = {kind: np.zeros((len(task.questions), len(settings))) for kind in said}
    tokens = {kind: np.zeros(len(task.questions), dtype=np.int64) for kind in said}
    states: list[list[Tensor]] = []
    owners: list[int] = []
    for index, question in enumerate(task.questions):
        (prompt,), batch = encode(tokenizer, [question.question])
        for kind, texts in said.items():
            text = texts[index]
            before = batch["input_ids"][0]
            if kind == "answer" and reader.opens(prompt):
                before = torch.cat([before, _ids(tokenizer, reader.tags.ends[0])])
            after = _ids(tokenizer, text)[:TEXT_TOKENS]
            tokens[kind][index] = n = len(after)
            if not n:
                continue
            wanted = kind == "thinking"
            with torch.inference_mode():
                output = model(
                    input_ids=torch.cat([before, after]).expand(len(settings), -1).to(model.device), intensity=lams,
                    logits_to_keep=n + 1, output_hidden_states=wanted, use_cache=False,
                )  # fmt: skip
            target = after.to(output.logits.device)
            losses[kind][index] = [
                cross_entropy(row[:-1].float(), target, reduction="sum").item() for row in output.logits
            ]
            if wanted:
                at = np.unique(np.linspace(0, n - 1, min(n, STATES)).round().astype(int)) + len(before) - 1
                owners += [index] * len(at)
                states.append([layer[path][:, at].cpu() for layer in output.hidden_states])
        on_question(index + 1)
    return Reading(losses, tokens, [torch.cat(layer, 1) for layer in zip(*states, strict=True)], np.array(owners))


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


@dataclass(frozen=True)
class Way:
    """A path between two models.

    Attributes:
        intensities: L rising λ, 0 and 1 among them.
        accuracy, tokens, thoughts, well_formed: of the answers at every λ; all but tokens are shares.
        losses: nats per token at every λ, by kind of text.
        barriers: of each loss, and of the "error", 1 − accuracy.
        similarity: of states at neighbouring λ and at either end, by layer.
    """

    intensities: tuple[float, ...]
    accuracy: list[Interval]
    tokens: list[Interval]
    thoughts: list[Interval]
    well_formed: list[Interval]
    losses: dict[str, list[Interval]]
    barriers: dict[str, Barrier]
    similarity: list[Similarity]


@dataclass(frozen=True)
class Ablation:
    """One part of the model set apart.

    Attributes:
        name: such as "only MLP": λ = 1 there and 0 elsewhere; "all but MLP" is the other way round.
        accuracy, tokens, thoughts, well_formed: of the answers; all but tokens are shares.
        loss: nats per token of the thinking end's own texts.
        gain: accuracy above the end that it starts from, λ = 0 of "only" and λ = 1 of "all but".
        more_tokens: likewise.
    """

    name: str
    accuracy: Interval
    tokens: Interval
    thoughts: Interval
    well_formed: Interval
    loss: Interval
    gain: Interval
    more_tokens: Interval


@dataclass(frozen=True)
class Study:
    """All that was found.

    Attributes:
        task, questions: what was asked, and how many.
        pair: the path between the pair's ends.
        controls: paths from the instruct end to other models, by name.
        permuted: the modules whose neurons or heads were permuted for the control of that name.
        ablations: of the pair.
    """

    task: str
    questions: int
    pair: Way
    controls: dict[str, Way]
    permuted: list[str]
    ablations: list[Ablation]


def study(
    model: Any,
    tokenizer: Any,
    task: Task,
    directory: str | Path,
    *,
    controls: Sequence[str] = (),
    intensities: Sequence[float] = PATH,
    rows: int = 256,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
    **options: Any,
) -> Study:
    """Studies a pair on a task. Answers are kept in `directory`, and a run that was interrupted goes on with them.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier.
        directory: of the answers, made if need be.
        controls: "permuted", the thinking end with its neurons and heads in another order; or other checkpoints of the
            architecture, with the same tokens, by directory or hub name.
        intensities: λ of the paths; 0 and 1 must be among them.
        rows: of a batch of answers, at most; but no fewer than λ and ablations together.
        seed: of the permutations, and of the sampling if `options` say so.
        progress: is told what is being done.
        options: of `model.generate`, those of `dami.generation.pieces.KNOWN`.

    Raises:
        ValueError: 0 or 1 is not among the λ; λ or controls are not distinct; fewer than 4 questions; a control
            cannot be loaded or does not match the pair; the directory's answers belong to a run with other settings.
    """
    lams = tuple(sorted(float(lam) for lam in intensities))
    check_distinct(lams, ENDS)
    count = len(task.questions)
    if len(set(controls)) < len(controls):
        raise ValueError(f"controls must be distinct, got {list(controls)}")
    check_enough(task, TO_STUDY)
    for control in set(controls) - {PERMUTED}:
        _check_tokens(tokenizer, control)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = [Setting(lam) for lam in lams]
    settings = [*path, *(Setting(end, part) for end in (0.0, 1.0) for part in parts_of(model))]

    def ask(model: Any, settings: Sequence[Setting], name: str) -> list[Trial]:
        return answer(
            model, tokenizer, task, settings, directory / f"{name}.jsonl", rows=rows, seed=seed,
            on_batch=lambda done: progress(f"{name}: answers", done, count), **options,
        )  # fmt: skip

    trials = ask(model, settings, "pair")
    by_setting = {name: [trial for trial in trials if trial.setting == name] for name in ("0", "1")}
    end = tokenizer.eos_token or ""
    said = {
        "answer": [question.answer + end for question in task.questions],
        "instruct": [trial.said for trial in by_setting["0"]],
        "thinking": [trial.said for trial in by_setting["1"]],
    }

    def look(model: Any, settings: Sequence[Setting], name: str) -> Reading:
        told = partial(progress, f"{name}: reading")
        return read(model, tokenizer, task, said, settings, lambda done: told(done, count))

    reading = look(model, settings, "pair")
    ways, permuted = {}, []
    for control in controls:
        name = PERMUTED if control == PERMUTED else "control-" + re.sub(r"[^\w.-]+", "-", control).strip("-.")
        other, permuted_now = control_pair(model, tokenizer, control, task, seed)
        permuted += permuted_now
        ways[control] = _way(
            lams, ask(other, path, name), look(other, path, name), partial(progress, f"{name}: layers")
        )
        del other
    pair = _way(lams, trials, reading, partial(progress, "pair: layers"))
    return Study(task.name, count, pair, ways, permuted, _ablations(settings, trials, reading))


def _check_tokens(tokenizer: Any, control: str) -> None:
    try:
        tokens = AutoTokenizer.from_pretrained(control).get_vocab()
    except (OSError, ValueError) as error:  # these do not say which
        raise ValueError(f"cannot load the control {control}: {' '.join(str(error).split())}") from error
    if tokens != tokenizer.get_vocab():
        raise ValueError(f"the control {control} must have the pair's tokens, and its tokenizer has others")


def control_pair(model: Any, tokenizer: Any, control: str, task: Task, seed: int) -> tuple[Any, list[str]]:
    """A patched model from the pair's instruct end to another model; and the modules that were permuted for it.

    Raises:
        ValueError: the other model does not match the pair, or is its instruct end.
    """
    instruct = materialize(model, 0.0).eval()
    permuted: list[str] = []
    if control == PERMUTED:
        other = materialize(model, 1.0).eval()
        _, batch = encode(tokenizer, [task.questions[0].question])
        permuted = permute(other, {name: tensor.to(model.device) for name, tensor in batch.items()}, seed)
    else:
        other = AutoModelForCausalLM.from_pretrained(control, dtype=instruct.dtype).to(model.device).eval()
    patched = patch_model(instruct, other)
    if not cells_of(patched):
        raise ValueError(f"the control {control} must differ from the instruct end")
    return patched, permuted


def circumstances(model: Any, checkout: Path) -> dict[str, str]:
    """Date, device, versions and commit of a run; the commit is of a checkout, if it is one."""
    commit = "unknown"
    if (checkout / ".git").exists():
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip() or commit
    facts = machine()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": facts["GPU"] if model.device.type == "cuda" else facts["CPU"],
        "versions": ", ".join(f"{package} {version}" for package, version in installed().items()),
        "commit": commit,
    }


def _tables(settings: Sequence[Setting], trials: Sequence[Trial]) -> dict[str, Array]:
    """Values of all trials, [questions, settings] each."""
    at = {setting.name: place for place, setting in enumerate(settings)}
    shape = (1 + max(trial.index for trial in trials), len(settings))
    tables = {name: np.zeros(shape) for name in COLUMNS}
    for trial in trials:
        if trial.setting in at:
            for name, table in tables.items():
                table[trial.index, at[trial.setting]] = getattr(trial, name)
    return tables


def _way(lams: tuple[float, ...], trials: Sequence[Trial], reading: Reading, progress: Callable[..., None]) -> Way:
    tables = _tables([Setting(lam) for lam in lams], trials)
    count = len(tables["score"])
    here = slice(len(lams))  # the path comes first

    def loss(kind: str) -> Callable[[Any], Array]:
        return lambda rows: reading.loss(kind, rows)[here]

    kinds = (*TEXTS, "both")
    barriers = {kind: barrier(lams, loss(kind), count) for kind in kinds}
    barriers["error"] = barrier(lams, lambda rows: 1 - tables["score"][rows].mean(0), count)
    similarity = []
    for layer, states in enumerate(reading.states):
        similarity += similarities(layer, states.double().numpy(), reading.questions, lams)
        progress(layer + 1, len(reading.states))
    return Way(
        lams,
        *_summaries(tables),
        {kind: bootstrap(loss(kind), count) for kind in kinds},
        barriers,
        similarity,
    )


def _summaries(tables: Mapping[str, Array]) -> tuple[list[Interval], list[Interval], list[Interval], list[Interval]]:
    """Accuracy, tokens, thoughts and well-formed answers in every setting."""
    scores, tokens, thoughts, well_formed = (tables[name] for name in COLUMNS)
    return _shares(scores), _means(tokens), _shares(thoughts), _shares(well_formed)


def _shares(table: Array) -> list[Interval]:
    return [Interval(share, *wilson(share, len(table))) for share in table.mean(0).tolist()]


def _means(table: Array) -> list[Interval]:
    return bootstrap(lambda rows: table[rows].mean(0), len(table))


def _ablations(settings: Sequence[Setting], trials: Sequence[Trial], reading: Reading) -> list[Ablation]:
    tables = _tables(settings, trials)
    ends = np.array([settings.index(Setting(each.intensity if each.part else 0.0)) for each in settings])
    columns = [*_summaries(tables)]
    columns.append(bootstrap(lambda rows: reading.loss("thinking", rows), len(tables["score"])))
    columns += [_means(tables[name] - tables[name][:, ends]) for name in ("score", "tokens")]
    return [
        Ablation(setting.name, *values)
        for setting, *values in zip(settings, *columns, strict=True)
        if setting.part is not None
    ]
