"""The pilot study: which λ each module gets, what is read and answered, and the report."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dami
import numpy as np
import pytest
import torch
from dami.cli import app
from dami.evaluation import load_task
from dami.evaluation.pages import render
from dami.evaluation.statistics import Interval
from dami.evaluation.study import (
    Setting,
    answer,
    control_pair,
    model_parts,
    module_cells,
    read_study,
    read_texts,
    row_intensities,
    study,
)
from dami.evaluation.study.figures import TEXTS, ends_and_ablations, paths_of, pictures
from dami.evaluation.study.report import layers_of, most_of, worst_step, write_study_report
from dami.layers.base import LerpModule
from typer.testing import CliRunner

from tests.dami.evaluation.test_report import Text
from tests.dami.families import pair as random_pair

QUESTIONS = dami.example_pair()[0].parent / "questions.jsonl"
LAMS = (-0.2, 0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    """The shipped pair in float32."""
    model, tokenizer = dami.load_pair(*dami.example_pair())
    ends = [dami.materialize(model, end).float().eval() for end in (0.0, 1.0)]
    return dami.patch_model(*ends), tokenizer


@pytest.fixture
def task() -> Any:
    return load_task(str(QUESTIONS), 4, verifier="word")


def all_settings(model: Any, lams: Sequence[float] = LAMS) -> list[Setting]:
    return [*map(Setting, lams), *(Setting(end, part) for end in (0.0, 1.0) for part in model_parts(model))]


def test_parts_cover_the_model(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    parts, cells = model_parts(model), set(module_cells(model))
    assert list(parts) == [
        "first third", "middle third", "last third", "attention", "MLP", "norms", "embeddings",
    ]  # fmt: skip
    groups = [parts[name] for name in ("attention", "MLP", "norms", "embeddings")]
    assert frozenset.union(*groups) == cells
    assert sum(map(len, groups)) == len(cells)
    thirds = [parts[f"{name} third"] for name in ("first", "middle", "last")]
    assert cells - frozenset.union(*thirds) == {("embed", None), ("head", None), ("norm", None)}
    assert [sorted({layer for _, layer in third}) for third in thirds] == [[0, 1], [2, 3], [4, 5]]


def test_a_model_of_two_layers_has_two_model_parts_layers() -> None:
    assert [name for name in model_parts(dami.patch_model(*random_pair("qwen3"))) if "third" in name] == [
        "first third", "middle third",
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_every_module_gets_its_own_intensity(family: str) -> None:
    model = dami.patch_model(*random_pair(family))
    settings, parts = all_settings(model), model_parts(model)
    with dami.intensity(model, row_intensities(settings, model)):
        for module in model.modules():
            if isinstance(module, LerpModule):
                cell = (module.lerp.group, module.lerp.layer)
                for setting, lam in zip(settings, module.lerp.lam.tolist(), strict=True):
                    inside = setting.part is not None and cell in parts[setting.part]
                    wanted = 1 - setting.intensity if inside else setting.intensity
                    assert lam == pytest.approx(wanted), (setting.name, cell)


@torch.no_grad()
def test_rows_of_ablations_are_what_dami_intensity_gives(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    ids = torch.tensor([[5, 17, 300, 99, 42, 8, 61]])
    by_hand = {
        "only first third": [(1.0, range(2), None)],
        "only MLP": [(1.0, None, "mlp")],
        "only embeddings": [(1.0, None, ["embed", "head"])],
        "all but attention": [(1.0, None, "*"), (0.0, None, "attn")],
        "all but last third": [(1.0, None, "*"), (0.0, range(4, 6), None)],
    }
    settings = all_settings(model)
    logits = model(ids.expand(len(settings), -1), intensity=row_intensities(settings, model)).logits
    for name, steps in by_hand.items():
        mapping = {(modules or "*", tuple(layers)) if layers else modules: lam for lam, layers, modules in steps
                   if not isinstance(modules, list)}  # fmt: skip
        mapping |= {each: lam for lam, _, modules in steps if isinstance(modules, list) for each in modules}
        wanted = model(ids, intensity={"*": 0.0, **mapping}).logits[0]
        row = logits[[setting.name for setting in settings].index(name)]
        assert (row - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


@torch.no_grad()
def test_reading_is_the_loss_of_merged_models(shipped: tuple[Any, Any], task: Any) -> None:
    model, tokenizer = shipped
    said = {
        "answer": [question.answer + tokenizer.eos_token for question in task.questions],
        "thinking": [f"<think>1 + {n} = {n + 1}</think>{n + 1}" for n in range(4)],
    }
    found = read_texts(model, tokenizer, task, said, all_settings(model))
    at = [1, 0, 3]  # some of the path, in any order
    for place in at:
        merged = dami.materialize(model, LAMS[place]).double().eval()
        total, count, states = 0.0, 0, []
        for question, text in zip(task.questions, said["thinking"], strict=True):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question.question}], tokenize=False, add_generation_prompt=True
            )
            before, after = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (prompt, text))
            output = merged(torch.tensor([before + after]), output_hidden_states=True)
            scores = output.logits[0, len(before) - 1 : -1].numpy()
            normal = scores - np.log(np.exp(scores).sum(1, keepdims=True))
            total -= normal[np.arange(len(after)), after].sum()
            count += len(after)
            chosen = np.unique(np.linspace(0, len(after) - 1, min(8, len(after))).round().astype(int))
            states.append([layer[0, len(before) - 1 + chosen] for layer in output.hidden_states])
        assert found.loss("thinking")[place] == pytest.approx(total / count, rel=1e-4)
        assert found.tokens["thinking"].sum() == count
        for mine, theirs in zip(found.states, zip(*states, strict=True), strict=True):
            wanted = torch.cat(theirs)
            assert mine.shape == (len(LAMS), *wanted.shape)
            assert (mine[place] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert found.questions.tolist() == sorted(found.questions.tolist())
    assert len(found.questions) == found.states[0].shape[1]
    assert len(found.losses["answer"][0]) == len(all_settings(model))


def test_an_answer_is_read_after_a_closed_thought(shipped: tuple[Any, Any], task: Any) -> None:
    """Where the template opens one, as that of some thinking models does."""
    model, tokenizer = shipped
    settings = [Setting(0.0), Setting(1.0)]
    opening = copy.deepcopy(tokenizer)
    opening.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    closed = copy.deepcopy(tokenizer)
    closed.chat_template += "{% if add_generation_prompt %}<think></think>{% endif %}"
    said = {"answer": ["12"] * 4, "thinking": ["</think>12"] * 4}
    wanted = read_texts(model, closed, task, {"answer": ["12"] * 4, "thinking": ["12"] * 4}, settings)
    found = read_texts(model, opening, task, said, settings)
    assert found.losses["answer"] == pytest.approx(wanted.losses["answer"], rel=1e-5)


def test_answers_are_those_of_one_intensity(shipped: tuple[Any, Any], task: Any, tmp_path: Path) -> None:
    """What a row says does not depend on the ablations beside it; and the file holds every trial."""
    model, tokenizer = shipped
    options = {"do_sample": False, "max_new_tokens": 12}
    settings = all_settings(model, (0.0, 1.0))
    trials = answer(model, tokenizer, task, settings, tmp_path / "a.jsonl", rows=40, **options)
    assert [(t.index, t.setting) for t in trials] == [(i, s.name) for i in range(4) for s in settings]
    for lam in (0.0, 1.0):
        said = dami.chat.ask(model, tokenizer, [q.question for q in task.questions], [lam] * 4, **options)
        mine = [trial for trial in trials if trial.setting == f"{lam:g}"]
        assert [(t.tokens, t.thought, t.score) for t in mine] == [
            (s.tokens, bool(s.thought), task.score(i, s.text)) for i, s in enumerate(said)
        ]
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1 + len(trials)


def test_an_interrupted_run_goes_on(shipped: tuple[Any, Any], task: Any, tmp_path: Path) -> None:
    model, tokenizer = shipped
    options: dict[str, Any] = {"rows": 2, "do_sample": True, "max_new_tokens": 4}
    settings = [Setting(0.0), Setting(1.0)]
    whole = answer(model, tokenizer, task, settings, tmp_path / "whole", **options)
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    (tmp_path / "torn").write_text("".join(lines[:4]) + lines[4][:20])
    done: list[int] = []
    assert whole == answer(model, tokenizer, task, settings, tmp_path / "torn", on_batch=done.append, **options)
    assert done == [1, 2, 3, 4]
    assert (tmp_path / "torn").read_text() == (tmp_path / "whole").read_text()
    with pytest.raises(ValueError, match=r"holds a sweep with other settings \(settings: "):
        answer(model, tokenizer, task, settings[:1], tmp_path / "whole", **options)
    other = control_pair(model, tokenizer, "permuted", task, 0)[0]
    with pytest.raises(ValueError, match=r"holds a sweep with other settings \(weights: "):
        answer(other, tokenizer, task, settings, tmp_path / "whole", **options)


@torch.no_grad()
def test_the_permuted_control_has_the_same_ends(shipped: tuple[Any, Any], task: Any) -> None:
    model, tokenizer = shipped
    other, permuted = control_pair(model, tokenizer, "permuted", task, seed=1)
    assert len(permuted) == 12
    ids = torch.tensor([[5, 17, 300, 99, 42, 8, 61]] * 3)
    mine, theirs = (each(ids, intensity=[0.0, 0.5, 1.0]).logits for each in (model, other))
    scale = mine.abs().max()
    assert (mine - theirs)[[0, 2]].abs().max() < 1e-5 * scale
    assert (mine - theirs)[1].abs().max() > 0.1 * scale


@pytest.fixture(scope="module")
def found(shipped: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    task = load_task(str(QUESTIONS), 4, verifier="word")
    told: list[tuple[str, int, int]] = []
    controls = ["permuted", str(dami.example_pair()[1])]
    result = study(
        *shipped, task, tmp_path_factory.mktemp("study"), controls=controls, intensities=LAMS, do_sample=False,
        max_new_tokens=8, progress=lambda *each: told.append(each),
    )  # fmt: skip
    assert {stage for stage, done, total in told if done == total} >= {"pair: answers", "permuted: layers"}
    return result


def test_a_study_says_what_its_parts_say(found: Any, shipped: tuple[Any, Any]) -> None:
    permuted, itself = found.controls.values()
    assert found.questions == 4
    for way in (found.pair, permuted, itself):
        assert way.intensities == LAMS
        assert {*way.losses} == {"answer", "instruct", "thinking", "both"}
        assert {*way.barriers} == {*way.losses, "error"}
        assert len(way.accuracy) == len(way.tokens) == len(way.thoughts) == len(way.losses["both"]) == len(LAMS)
        for i, j, both in zip(way.losses["instruct"], way.losses["thinking"], way.losses["both"], strict=True):
            assert both.value == pytest.approx((i.value + j.value) / 2)
    for kind, losses in found.pair.losses.items():
        for end in (1, 3):
            assert permuted.losses[kind][end].value == pytest.approx(losses[end].value, rel=1e-3)
    # The thinking end as a control is the pair itself.
    for kind, losses in itself.losses.items():
        assert [loss.value for loss in losses] == pytest.approx([loss.value for loss in found.pair.losses[kind]])
    assert itself.tokens == found.pair.tokens
    for mine, theirs in zip(itself.similarity, found.pair.similarity, strict=True):
        assert mine.cka.value == pytest.approx(theirs.cka.value, abs=1e-6)
    assert permuted.barriers["thinking"].height.value > found.pair.barriers["thinking"].height.value + 1
    names = [each.name for each in found.ablations]
    assert names == [s.name for s in all_settings(shipped[0]) if s.part]
    for each in found.ablations:
        start = LAMS.index(0.0 if each.name.startswith("only") else 1.0)
        assert each.gain.value == pytest.approx(each.accuracy.value - found.pair.accuracy[start].value)
        assert each.more_tokens.value == pytest.approx(each.tokens.value - found.pair.tokens[start].value)


def test_the_report_is_one_page_with_all_numbers(found: Any, tmp_path: Path) -> None:
    found = replace(found, controls={})  # their panels are alike
    write_study_report(found, tmp_path / "out", {"pair": "a < b & <i>c</i>", "versions": "dami 1"})
    page = (tmp_path / "out" / "report.html").read_text()
    parser = Text()
    parser.feed(page)
    assert "a < b & <i>c</i>" in parser.text
    assert parser.open.count("svg") == 6 + 2 * 3 + 3  # along the path, by two measures, of ablations
    assert "i" not in parser.open
    assert "img" not in parser.open
    for name in ("all but embeddings", "layer 6", "model.layers.5.mlp"):
        assert name in parser.text
    assert page.index("<h2>Findings") < page.index("<figure") < page.index("<h2>This run") < page.index("dami 1")
    for name in ("path", "cka", "cosine", "ablations"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text()
    numbers = json.loads((tmp_path / "out" / "study.json").read_text())
    assert numbers["about"]["pair"] == "a < b & <i>c</i>"
    assert numbers["pair"]["accuracy"][1] == list(found.pair.accuracy[1])
    assert len(numbers["pair"]["similarity"]) == len(found.pair.similarity)


def test_a_study_is_read_from_its_numbers(found: Any, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"about": {}, **asdict(found)}))
    assert read_study(tmp_path / "study.json") == found


def page_of(found: Any) -> str:
    """Without pictures."""
    return render(
        "study.html", {name: {} for name in pictures(found)}, title="", study=found, paths=paths_of(found), texts=TEXTS,
        steps={name: worst_step(path) for name, path in paths_of(found).items()},
        layers={name: list(layers_of(path)) for name, path in paths_of(found).items()}, most=most_of(found),
        rows=ends_and_ablations(found), about={},
    )  # fmt: skip


def test_estimates_and_intervals_have_columns_of_their_own(found: Any, tmp_path: Path) -> None:
    """Every row of a table has as many cells as its heading."""
    page = page_of(found)
    tables = page.split("<table>")[1:]
    assert len(tables) == 4
    for table in tables:
        head, *rows = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
        assert head.count("95 % interval") > 1
        assert {len(re.findall("<t[hd]", row)) for row in rows} == {len(re.findall("<th", head))}
        for value, low, high in re.findall(r"<td>([-−+.\d]+)</td><td class=\"interval\">(\S+) to (\S+)</td>", table):
            value, low, high = (float(each.replace("−", "-")) for each in (value, low, high))
            assert low <= value <= high or value == pytest.approx(low, abs=1)
    assert found.ablations[0].name in tables[3]
    assert f"<td>{100 * found.ablations[0].accuracy.value:.0f}</td>" in tables[3]


def test_findings_are_as_sure_as_their_intervals(found: Any) -> None:
    def gains(only: Interval, without: Interval) -> Any:
        """One part by itself, and all but another."""
        both = [each for each in found.ablations if each.name in ("only MLP", "all but norms")]
        return replace(found, ablations=[replace(each, gain=g) for each, g in zip(both, (only, without), strict=True)])

    sure = page_of(gains(Interval(0.3, 0.1, 0.5), Interval(-0.2, -0.3, -0.1)))
    assert "<strong>MLP</strong> adds the most accuracy, +30 points (+10 to +50)" in sure
    assert "without <strong>norms</strong> the most accuracy is lost, −20 points (−30 to −10)" in sure
    unsure = page_of(gains(Interval(0.3, 0.0, 0.5), Interval(-0.2, -0.3, 0.0)))
    assert "no part surely adds accuracy; MLP comes closest, +30 points (+0 to +50)" in unsure
    assert "no part is surely missed; norms is missed most, −20 points (−30 to +0)" in unsure
    assert "no barrier can be seen" not in sure
    ends = replace(found.pair, intensities=(0.0, 1.0), accuracy=found.pair.accuracy[:2], tokens=found.pair.tokens[:2])
    similarity = [each for each in ends.similarity if {each.intensity, each.other} == {0.0, 1.0}]
    assert "so no barrier can be seen" in page_of(
        replace(found, pair=replace(ends, similarity=similarity), controls={})
    )


def test_lines_are_drawn_through_three_points_at_least(found: Any) -> None:
    def two(path: Any) -> Any:
        ends = [path.intensities.index(end) for end in (0.0, 1.0)]
        lists = {name: [getattr(path, name)[at] for at in ends] for name in ("accuracy", "tokens", "thoughts")}
        similarity = [each for each in path.similarity if {each.intensity, each.other} == {0.0, 1.0}]
        losses = {kind: [losses[at] for at in ends] for kind, losses in path.losses.items()}
        return replace(path, intensities=(0.0, 1.0), losses=losses, similarity=similarity, **lists)

    short = replace(found, pair=two(found.pair), controls={})
    for shown, joined in ((replace(found, controls={}), True), (short, False)):
        for name, picture in pictures(shown).items():
            for title, figure in picture.apart().items():
                (axes,) = figure.axes
                through = [line for line in axes.lines if len(set(line.get_xdata())) > 1]
                if name != "ablations":
                    assert any(line.get_linestyle() != "None" for line in through) is joined, (name, title)
                    assert len(axes.texts) == (1 if name == "path" else 7)  # labels of the lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intensities": [0.0, 0.5]}, r"intensities must be distinct and hold 0 and 1, got \[0.0, 0.5\]"),
        ({"intensities": [0, 1, 1]}, "must be distinct"),
        ({"controls": ["permuted", "permuted"]}, "controls must be distinct"),
    ],
)
def test_bad_arguments_are_named(
    options: Any, message: str, shipped: tuple[Any, Any], task: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        study(*shipped, task, tmp_path, **options)


def test_too_few_questions_are_refused(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="questions must be at least 4, got 3"):
        study(*shipped, load_task(str(QUESTIONS), 3, verifier="word"), tmp_path)


def test_a_control_with_other_tokens_is_refused(shipped: tuple[Any, Any], task: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(shipped[1])
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have the pair's tokens, and its tokenizer has others"):
        study(*shipped, task, tmp_path / "out", controls=[str(tmp_path)])
    assert not (tmp_path / "out").exists()  # before anything is asked


def test_the_instruct_end_is_no_control(shipped: tuple[Any, Any], task: Any) -> None:
    with pytest.raises(ValueError, match="must differ from the instruct end"):
        control_pair(*shipped, str(dami.example_pair()[0]), task, 0)


def test_the_command_writes_the_report_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["study", "--questions", "4", "-l", "0", "-l", "1", "--max-tokens", "4", "-o", str(tmp_path)]
    written: list[Any] = []
    monkeypatch.setattr("dami.evaluation.study.report.write_study_report", lambda *each: written.append(each))
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "report.html" in result.output
    (first, directory, about), (second, _, _) = written
    assert first == second
    assert directory == tmp_path
    assert about["answers"] == "greedy"
    assert about["verifier"] == "word"
    assert {"pair", "format", "date", "device", "versions", "commit", "command"} <= about.keys()
    assert len((tmp_path / "pair.jsonl").read_text().splitlines()) == 1 + 4 * (2 + 14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "a", "b"], "a task is needed for a pair of your own"),
        (["-l", "0", "--questions", "4"], "intensities must be distinct and hold 0 and 1"),
        (["--control", "permuted", "--control", "permuted"], "controls must be distinct"),
        (["--control", "tests"], "tests is no checkpoint: it has no config.json"),
    ],
)
def test_the_command_tells_of_mistakes_in_a_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["study", *arguments, "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output
