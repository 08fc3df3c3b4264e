"""The stages of the digits demo in turn, each with a progress bar and each kept when it is done."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import judge
import numpy as np
import report
import sample
import torch
from corpus import CAPTIONS, CODES, ROOT, Numbers
from processes import Family, end_recorded, recorded
from sample import CAPTION_TOKENS, Sampler
from stages import Stages, Started, bar, read_json, redraw, write_json
from training import Run, check, train

from unimega.errors import UnimegaError

HERE = Path(__file__).parent
PREPROCESS, EXPORT = ROOT / "tools" / "preprocess_data.py", ROOT / "tools" / "export_hf.py"
DRAWINGS = 360
EVERY = 250  # steps between the exports that the accuracy curve is made of


class Demo:
    """One run of the demo in its folder."""

    def __init__(self, run: Run, split: int) -> None:
        self.run, self.split, self.folder = run, split, run.output
        self.stages = Stages(run.output)
        self.export = run.output / "export"

    def all(self) -> dict[str, Any]:
        """Every stage; returns the report's figures."""
        torch.set_num_threads(1)  # sums in one order: the same weights give the same drawings
        end_recorded(recorded(self.folder))
        check(self.run)
        stages, split = self.stages, {"split": self.split}
        own = [HERE / "corpus.py", HERE / "sample.py"]
        stages.run(
            "corpus",
            self._corpus,
            settings=split,
            code=[own[0], PREPROCESS],
            say=f"split {self.split}, codes, .bin/.idx",
        )
        stages.run(
            "train",
            lambda started: train(self.run, started),
            settings=self.run.settings(),
            say=f"{self.run.steps} steps on {self.run.ranks} ranks",
        )
        code = [EXPORT, *sorted((ROOT / "unimega" / "hf").glob("*.py"))]
        stages.run("export", self._export, settings={}, code=code, say="a folder for transformers")
        settings = {"scale": sample.GUIDANCE, "temperature": sample.TEMPERATURE} | split
        stages.run("draw", self._draw, settings=settings, code=own, say=f"{DRAWINGS} digits from captions")
        stages.run("caption", self._caption, settings=split, code=own, say=f"{corpus.HELD_OUT} held-out scans")
        stages.run(
            "history", self._history, settings=settings, code=[*own, HERE / "judge.py"], say="earlier checkpoints"
        )
        names = ("report", "page", "pictures", "charts", "judge", "curve")
        code = [*(HERE / f"{name}.py" for name in names), HERE / "page.css"]
        stages.run("report", self._report, settings={}, code=code, say=", ".join(report.FILES))
        figures = read_json(self.folder / "report.json")
        assert figures is not None
        return figures

    def _corpus(self, started: Started) -> Sequence[Path]:
        (self.folder / "corpus.json").unlink(missing_ok=True)
        with bar("corpus", corpus.TICKS, unit="part") as progress:
            corpus.build(self.folder, split=self.split, tick=progress.update)
        return corpus.files(self.folder)

    def _export(self, started: Started) -> Sequence[Path]:
        with bar("export", 1, unit="folder") as progress:
            export(self.run.checkpoints, self.export, tick=lambda: redraw(progress))
            progress.update()
        return sorted(self.export.iterdir())

    def _draw(self, started: Started) -> Sequence[Path]:
        with bar("draw", CODES, unit="code") as progress:
            sampler = Sampler(self.export)
            codes = draw(sampler, self.split, tick=progress.update)
        labels, templates = asked(self.split)
        content = {"digits": labels.tolist(), "captions": templates.tolist(), "codes": codes.tolist()}
        content["parameters"] = sum(weight.numel() for weight in sampler.model.parameters())
        return [_written(self.folder / "drawn.json", content)]

    def _caption(self, started: Started) -> Sequence[Path]:
        data, book = corpus.read_scans(self.folder)
        with bar("caption", CAPTION_TOKENS, unit="word") as progress:
            said = Sampler(self.export).describe(book.encode(data.scans[data.held_out]), tick=progress.update)
        return [_written(self.folder / "said.json", {"scans": data.held_out.tolist(), "captions": said})]

    def _history(self, started: Started) -> Sequence[Path]:
        """What the checkpoints before the last could do: exported, judged and thrown away, one after the other."""
        from unimega.hf.export import export_checkpoint  # what the tool calls; once imported it takes no second

        steps = [number for number in range(EVERY, self.run.steps, EVERY) if self._step(number).is_dir()]
        data, book = corpus.read_scans(self.folder)
        svm, path = judge.train_judge(data), self.folder / "history.json"
        found = (read_json(path) if started.again else None) or {}
        codes = book.encode(data.scans[data.held_out])
        target = self.folder / "export_earlier"
        with bar("history", len(steps), unit="export", done=len(found)) as progress:
            for step in (step for step in steps if str(step) not in found):
                shutil.rmtree(target, ignore_errors=True)
                export_checkpoint(self._step(step), target)
                sampler = Sampler(target)
                drawn = draw(sampler, self.split, tick=lambda: redraw(progress))
                labels, _ = asked(self.split)
                sampled = judge.Sampled(labels, drawn, sampler.describe(codes, tick=lambda: redraw(progress)))
                found[str(step)] = judge.accuracies(data, book, sampled, svm)
                write_json(path, found)
                progress.update()
        shutil.rmtree(target, ignore_errors=True)
        return [_written(path, found)]

    def _step(self, number: int) -> Path:
        return self.run.checkpoints / f"step-{number:08d}"

    def _report(self, started: Started) -> Sequence[Path]:
        data, book = corpus.read_scans(self.folder)
        drawn, said, history = (read_json(self.folder / f"{name}.json") for name in ("drawn", "said", "history"))
        assert drawn is not None and said is not None and history is not None
        labels, templates = (np.array(drawn[key], dtype=np.int64) for key in ("digits", "captions"))
        results = report.Results(
            split=self.split,
            data=data,
            book=book,
            sampled=judge.Sampled(labels, np.array(drawn["codes"], dtype=np.int64), said["captions"]),
            templates=templates,
            by_step={int(step): each for step, each in history.items()},
            run={"steps": self.run.steps, "ranks": self.run.ranks, "parameters": drawn["parameters"]},
            metrics=self.run.metrics,
            wall_s=self.stages.wall_s,
        )
        with bar("report", len(report.FILES), unit="file") as progress:
            report.write(results, self.folder, tick=progress.update)
        return [self.folder / name for name in report.FILES]


def asked(split: int) -> tuple[Numbers, Numbers]:
    """Digits 0 to 9 in turn and which caption asks for each, at random: [360] and [360]."""
    captions = np.random.default_rng((split, DRAWINGS)).integers(len(CAPTIONS), size=DRAWINGS)
    return np.arange(DRAWINGS) % 10, captions


def draw(sampler: Sampler, split: int, *, tick: corpus.Tick) -> Numbers:
    """Codes [360, 16] for the captions of ``asked``."""
    digits, captions = asked(split)
    words = [CAPTIONS[c].format(corpus.DIGITS[d]) for d, c in zip(digits, captions, strict=True)]
    return sampler.draw(words, seed=split, tick=tick)


def export(checkpoint: Path, target: Path, *, tick: corpus.Tick) -> None:
    """A Hugging Face folder by the tool that anyone would use."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, str(EXPORT), str(checkpoint), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    family = Family(process, target.parent)
    try:
        while True:
            tick()
            try:
                _, told = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        family.stop()
    if process.returncode:
        raise UnimegaError(f"the export ended with status {process.returncode}: {told.strip() or 'it said nothing.'}")


def _written(path: Path, content: dict[str, Any]) -> Path:
    write_json(path, content)
    return path
