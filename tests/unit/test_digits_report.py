"""The demo's judge, figures and page, from answers whose figures are known beforehand."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.examples import example

corpus, judge, report = example("corpus"), example("judge"), example("report")
charts, page, curve, demo, sample = (example(name) for name in ("charts", "page", "curve", "demo", "sample"))


@pytest.fixture(scope="module")
def data():
    return corpus.split_scans(5)


@pytest.fixture(scope="module")
def book(data):
    return corpus.Codebook.fit(data.scans[data.train])


@pytest.fixture(scope="module")
def svm(data):
    return judge.train_judge(data)


def sampled(data, book, *, copied=90, wrong=18, mute=9):
    """360 "drawings" that are training scans, so of known digits; the first ``copied`` unchanged. Captions with faults.

    Of the captions ``wrong`` name the next digit and ``mute`` name none.
    """
    labels = data.labels[data.train]
    order = [np.flatnonzero(labels == digit) for digit in range(10)]
    places = np.array([order[i % 10][i // 10] for i in range(360)])
    codes = book.encode(data.scans[data.train[places]])
    known = {tuple(row) for row in book.encode(data.scans[data.train]).tolist()}
    for row in codes[copied:]:  # another code in a corner, until it is nobody's
        while tuple(row.tolist()) in known:
            row[3] = (row[3] + 1) % 32
    truth = data.labels[data.held_out]
    said = [f"the digit {corpus.DIGITS[label]}" for label in truth]
    for i in range(wrong):
        said[i] = f"the digit {corpus.DIGITS[(truth[i] + 1) % 10]}"
    for i in range(wrong, wrong + mute):
        said[i] = ("a drawing of a", "one or two", "")[i % 3]
    return judge.Sampled(np.arange(360) % 10, codes, said)


def test_figures_of_known_answers(data, book, svm):
    figures = judge.judge(data, book, sampled(data, book), svm).figures
    assert figures["i2t_accuracy"] == pytest.approx(333 / 360, abs=1e-6)
    assert figures["captions_without_a_digit"] == 9
    assert np.trace(figures["confusion_i2t"]) == 333
    assert sum(figures["confusion_i2t"][i][(i + 1) % 10] for i in range(10)) == 18
    assert np.sum(figures["confusion_i2t"]) == 351
    assert figures["exact_copy_share"] == 0.25
    assert figures["unique_share"] == 1
    assert figures["t2i_accuracy"] > 0.9  # training scans with a spoilt corner
    assert [sum(row) for row in figures["confusion_t2i"]] == [36] * 10
    assert np.trace(figures["confusion_t2i"]) == round(figures["t2i_accuracy"] * 360)
    assert figures["counts"] == {"drawn": 360, "held_out": 360, "training": 1437}
    shares = {"t2i_accuracy", "i2t_accuracy", "judge_accuracy", "judge_accuracy_on_reconstructions"}
    assert figures["intervals"].keys() == shares | {"exact_copy_share", "exact_copy_share_held_out"}
    for name, (low, high) in figures["intervals"].items():
        assert 0 <= low <= figures[name] <= high <= 1


def test_the_judge_knows_real_scans_and_has_not_seen_the_held_out_ones(data, book, svm):
    figures = judge.judge(data, book, sampled(data, book), svm).figures
    assert 0.97 < figures["judge_accuracy"] < 1
    assert 0.96 < figures["judge_accuracy_on_reconstructions"] < 1
    assert 20 < figures["psnr_db"] < 21  # 20.5 measured
    assert figures["exact_copy_share_held_out"] < 0.02  # 0.4 % measured
    assert len(svm.support_) < 1437 and svm.shape_fit_ == (1437, 64)


def test_a_copy_is_at_distance_0_and_the_nearest_is_found(data, book, svm):
    verdict = judge.judge(data, book, sampled(data, book, copied=360), svm)
    assert not verdict.distance.any()
    labels = data.labels[verdict.nearest]
    assert (labels == np.arange(360) % 10).mean() > 0.99
    assert verdict.figures["exact_copy_share"] == 1
    a, b = data.scans[:7], data.scans[7:50]
    places, distance = judge.nearest(a, b)
    brute = np.sqrt(((a[:, None] - b[None]) ** 2).sum((2, 3)))
    assert np.array_equal(places, brute.argmin(1))
    np.testing.assert_allclose(distance, brute.min(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("right", "count", "interval"), [(357, 360, (0.9758, 0.9972)), (0, 360, (0.0, 0.0106)), (10, 10, (0.7225, 1.0))]
)
def test_wilson_intervals(right, count, interval):
    """The values of R's prop.test without continuity correction."""
    assert judge.wilson(right, count) == pytest.approx(list(interval), abs=2e-4)


@pytest.mark.parametrize(
    ("caption", "digit"),
    [
        ("a handwritten zero", 0),
        ("a drawing of a nine", 9),
        ("the digit", -1),
        ("one two", -1),
        ("", -1),
        ("one one", -1),
    ],
)
def test_a_caption_is_right_with_exactly_one_digit(caption, digit):
    assert judge.digit_of(caption) == digit


STEPS = 120


@pytest.fixture(scope="module")
def results(data, book, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    lines = [
        {"step": step, "loss": 1.0, "loss_text": 3 / step, "loss_vision": 4 - step / 60, "tokens_per_s": 1000.0 * step}
        for step in range(1, STEPS + 1)
    ]
    lines.append({"step": STEPS, "evaluation/held_out_t2i/loss_vision": 2.0})
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.Results(
        split=5,
        data=data,
        book=book,
        sampled=sampled(data, book),
        templates=np.arange(360) // 10 % 3,
        by_step={50: {"t2i": 0.5, "i2t": 0.25}},
        run={"steps": STEPS, "ranks": 2, "parameters": 1201664},
        metrics=logs / "metrics.jsonl",
        wall_s={"corpus": 2.0, "train": 100.5},
    )


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, report.write(results, folder)


def test_report_json_has_every_figure(written):
    folder, figures = written
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(figures))
    fractions = {"t2i_accuracy", "i2t_accuracy", "judge_accuracy", "exact_copy_share", "exact_copy_share_held_out"}
    for key in fractions | {"unique_share", "unique_share_training"}:
        assert 0 <= stored[key] <= 1
    assert stored["wall_s"].keys() == {"corpus", "train", "report"}
    assert stored["wall_s_total"] == pytest.approx(sum(stored["wall_s"].values()), abs=0.1)
    assert stored["split"] == 5
    assert stored["accuracy_by_step"].keys() == {"50", "120"}
    assert stored["accuracy_by_step"]["120"]["i2t"] == stored["i2t_accuracy"]
    assert [point["step"] for point in stored["curve"]] == [100]
    assert stored["loss_held_out"] == {"120": {"held_out_t2i/loss_vision": 2.0}}
    assert stored["loss"]["loss_vision"] == pytest.approx(4 - 95.5 / 60, abs=1e-3)
    harmonic = STEPS / sum(1 / (1000 * step) for step in range(1, STEPS + 1))
    assert stored["tokens_per_s"] == pytest.approx(harmonic, rel=1e-3)
    assert stored["versions"].keys() >= {"python", "torch", "transformers", "unimega", "megatron-core"}
    assert stored["passed"] is True
    assert math.isfinite(stored["psnr_db"]) and stored["median_nearest_distance"] >= 0


class Outside(HTMLParser):
    """Whatever a page would load, and how many pictures it holds."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open, self.pictures, self.wrong = [], [], 0, 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loaded += [v for k, v in values.items() if k in ("src", "href", "srcset") and not v.startswith("data:")]
        self.loaded += [tag] if tag in ("script", "link", "iframe", "object") else []
        self.pictures += tag == "img"
        self.wrong += values.get("class") == "wrong"
        if tag not in ("img", "meta", "line", "path", "circle", "polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("line", "path", "circle", "polyline"):
            return
        assert self.open.pop() == tag


def test_report_html_is_one_self_contained_file(written):
    folder, figures = written
    text = (folder / "report.html").read_text(encoding="utf-8")
    parser = Outside()
    parser.feed(text)
    parser.close()
    assert parser.loaded == [] and parser.open == []
    assert not re.search(r"https?://|@import|url\(", text)
    misread = 360 - round(360 * figures["i2t_accuracy"])
    assert parser.pictures == 10 * 8 + 2 * (24 + misread) + 2 * 10 + 17
    assert text.count("<svg") == 3 and "prefers-color-scheme: dark" in text
    for value in (figures["t2i_accuracy"], figures["i2t_accuracy"]):
        assert f"{100 * value:.1f} %" in text
    assert "uniform over 32 codes" in text and "choice among the captions" in text


def test_wrong_drawings_are_framed(results, svm):
    pictures = report.choose(results, judge.judge(results.data, results.book, results.sampled, svm))
    rows = [
        (caption, [(scan, digit != row) for digit, (scan, _) in enumerate(ten)])
        for row, (caption, ten) in enumerate(pictures.drawn)
    ]
    assert page._grid(replace(pictures, drawn=rows)).count('<img class="wrong"') == 7


def test_wrong_captions_are_framed(results, svm):
    strip = page._strip(report.choose(results, judge.judge(results.data, results.book, results.sampled, svm)).held_out)
    assert strip.count("class=wrong") == 18 + 6  # the first 18 are wrong, the next 6 of the 24 name no digit
    assert "(nothing)" in strip


def test_pictures_for_the_readme(written):
    folder, _ = written
    for name in ("digits.png", "digits_curve.png"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and 5_000 < len(content) < 150_000


def test_the_grid_shows_the_first_drawings_of_each_caption(results, svm):
    verdict = judge.judge(results.data, results.book, results.sampled, svm)
    rows = report.choose(results, verdict).drawn
    assert [caption for caption, _ in rows] == [corpus.CAPTIONS[i] for i in (0, 0, 0, 1, 1, 2, 2)]
    assert np.array_equal(rows[1][1][4][0], verdict.drawings[34])  # second "a handwritten four": 30 to 39 are asked so
    assert all(len(ten) == 10 for _, ten in rows)


def test_the_gate(written, capsys, tmp_path):
    _, figures = written
    demo.conclude(figures, tmp_path)
    assert "report.html" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        demo.conclude(figures | {"passed": False, "i2t_accuracy": 0.8989}, tmp_path)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_low_accuracy_fails_the_gate(results, tmp_path):
    bad = replace(results, sampled=sampled(results.data, results.book, wrong=40))
    figures = report.write(bad, tmp_path)
    assert figures["passed"] is False and (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("top", [0.07, 1.0, 3.9, 100, 1500])
def test_ticks_are_few_and_round(top):
    found = charts.ticks(top)
    assert found[0] == 0 and found[-1] <= top + 1e-9 and 4 <= len(found) <= 8
    assert all(len(f"{value:g}") <= 5 for value in found)


def test_scans_as_text():
    scan = np.zeros((8, 8), dtype=np.float32)
    scan[2, 3] = 1
    lines = sample.as_text(scan).splitlines()
    assert len(lines) == 8 and lines[2] == " " * 6 + "@@" + " " * 8


def test_last_record_is_the_last_line_not_the_highest_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert curve.last_record(path) is None
    lines = [{"step": 5, "loss": 1.0}, {"step": 3, "loss": 2.0}, {"step": 3, "evaluation/x/loss_text": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert curve.last_record(path) == {"step": 3, "loss": 2.0}
    assert curve.read_evaluations(path) == {3: {"x/loss_text": 1.0}}
