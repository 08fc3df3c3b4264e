"""jsonl to corpus, end to end with a tokenizer made here."""

import errno
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import unimega.data.preprocess
from tests.unit.data_corpora import read
from unimega.data import format as layout
from unimega.data.preparing import work
from unimega.data.preparing.job import MAX_BAD_SHARE, Job, LimitsSection, SourceSpec, read_job
from unimega.data.preprocess import preprocess
from unimega.data.reader import IndexedCorpus
from unimega.data.tokenize import TextTokenizer
from unimega.data.writer import write_error
from unimega.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SPECIALS = ["<|endoftext|>", "<|pad|>", "<|vision_start|>", "<|vision_end|>", "<unconditional>"]
IMAGE = [3, 0, 31, 7]


def make_tokenizer(folder: Path, *, specials=SPECIALS, config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a red bus", "the red car and the blue bus", "draw the caption"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in (config or {}).items():
        (folder / name).write_text(json.dumps(values))
    return folder


def make_job(*paths, output, tokenizer, source=None, **values):
    sources = (SourceSpec(paths=tuple(map(str, paths)), **(source or {})),)
    return Job(sources=sources, output=str(output), tokenizer=str(tokenizer), **values)


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer")


def run(tmp_path, tokenizer, rows, **job):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    values = {"codebook": 32, "codes_per_image": (4,), "overwrite": True} | job
    sidecar = preprocess(make_job(path, output=tmp_path / "out", tokenizer=tokenizer, **values))
    return read(str(tmp_path / "out")), sidecar


def test_every_kind_of_row(tmp_path, tokenizer):
    def encode(text):
        return TextTokenizer(tokenizer).encode([text])[0].tolist()

    rows = [
        {"text": "a red bus"},
        {"caption": "a red bus", "codes": IMAGE},
        {"id": "x", "text": None, "caption": "the car", "vqcode_512": str(IMAGE), "vqcode_multi768": "no", "length": 9},
        {"text": "the car", "codes": IMAGE},
        {"input_ids": [7, 8, 9]},
        {"items": ["the ", {"text": "car"}, IMAGE, {"codes": str(IMAGE)}, "bus"]},
        {"text": "plain", "codes": None, "data_type": "text"},
        {"text": "caf\u00e9 \U0001f68c"},
    ]
    found, sidecar = run(tmp_path, tokenizer, rows)
    image = (layout.MODE_IMAGE, IMAGE)
    assert found == [
        [(0, encode("a red bus"))],
        [(0x10, encode("a red bus")), image],
        [(0x10, encode("the car")), image],
        [(0x10, encode("the car")), image],
        [(0, [7, 8, 9])],
        [(0, encode("the car")), image, image, (0, encode("bus"))],
        [(0, encode("plain"))],
        [(0, encode("caf\u00e9 \U0001f68c"))],
    ]
    assert sidecar["counts"]["images"] == 5 and sidecar["counts"]["tokens"]["vision"] == 20
    assert sidecar["vocabulary"] == {
        "text": sidecar["tokenizer"]["size"],
        "codebook": 32,
        "codes_per_image": 4,
        "grid": None,
    }
    assert sidecar["tokenizer"]["path"] == "tokenizer"
    (source,) = sidecar["sources"]
    assert (source["lines"], source["documents"], source["first_document"], source["direction"]) == (8, 8, 0, "both")


def test_special_ids_in_the_sidecar(tmp_path):
    full = run(tmp_path, make_tokenizer(tmp_path / "t"), [{"text": "a"}])[1]["tokenizer"]
    start = {"eos": 0, "pad": 1, "vision_start": 2, "vision_end": 3, "unconditional": [4]}
    assert full["special"] == start | {"vision_pad": None}
    assert full["eos"] == 0 and full["sha256"] == TextTokenizer(tmp_path / "t").sha256
    named = make_tokenizer(
        tmp_path / "u",
        specials=["<|endoftext|>", "<|im_end|>"],
        config={"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}, "config.json": {"vocab_size": 500}},
    )
    special = TextTokenizer(named).special
    assert (special.eos, special.pad, special.vision_start) == (1, 1, None) and len(special.unconditional) > 3
    assert run(tmp_path, named, [{"text": "a"}])[1]["vocabulary"]["text"] == 500


def test_corpus_text_never_yields_a_special_id(tmp_path, tokenizer):
    ((ids,),), _ = run(tmp_path, tokenizer, [{"text": "a <|vision_start|> b <|endoftext|><unconditional>"}])
    assert min(ids[1]) >= len(SPECIALS)


def test_padding_and_truncation_do_not_change_the_fingerprint(tmp_path, tokenizer):
    before = TextTokenizer(tokenizer)
    path = tokenizer / "tokenizer.json"
    content = Tokenizer.from_file(str(path))
    content.enable_truncation(2)
    content.enable_padding(length=9)
    content.save(str(path))
    after = TextTokenizer(tokenizer)
    assert after.sha256 == before.sha256
    assert [a.tolist() for a in after.encode(["a red bus"])] == [b.tolist() for b in before.encode(["a red bus"])]


def test_direction_follows_data_type(tmp_path, tokenizer):
    kinds = ["t2i", "t2i", "i2t", None, "image_text"]
    rows = [{"caption": "a", "codes": IMAGE, "data_type": kind} for kind in kinds]
    sources = run(tmp_path, tokenizer, [*rows, {"text": "b"}])[1]["sources"]
    assert [(s["first_document"], s["documents"], s["direction"]) for s in sources] == [
        (0, 2, "t2i"),
        (2, 1, "i2t"),
        (3, 3, "both"),
    ]
    assert sum(source["lines"] for source in sources) == 6


def test_many_rows_of_several_files(tmp_path, tokenizer):
    paths = []
    for name, count in (("a", 1500), ("b", 0), ("c", 700)):
        paths.append(str(tmp_path / f"{name}.jsonl"))
        lines = [json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)]
        Path(paths[-1]).write_text("\n".join(lines))  # with empty lines between
    seen = []
    job = make_job(*paths, output=tmp_path / "new" / "out", tokenizer=tokenizer)
    sidecar = preprocess(job, seen.append)
    assert [(s["first_document"], s["documents"]) for s in sidecar["sources"]] == [(0, 1500), (1500, 0), (1500, 700)]
    assert seen[-1].done_bytes == seen[-1].total_bytes and seen[-1].documents == 2200
    corpus = IndexedCorpus(job.output)
    assert corpus.sequence(1500).tolist() == TextTokenizer(tokenizer).encode(["c 0"])[0].tolist()


BAD = {
    "not JSON": (b"{", "not JSON"),
    "a list": (b"[1]", "a JSON list, an object is needed"),
    "deep": (b"[" * 100_000, "not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', r"not UTF-8 \(byte 10 of the line\)"),
    "half a pair": (b'{"text": "\\ud800"}', "text holds half a surrogate pair at character 0"),
    "nothing known": ({"body": "a"}, "none of the fields text, .* found: body"),
    "empty text": ({"text": ""}, "text is empty or missing"),
    "no caption": ({"codes": IMAGE}, "caption is empty or missing"),
    "number for a string": ({"text": 3}, "text is a int, a string is needed"),
    "three codes": ({"caption": "a", "vqcode_512": "[1, 2, 3]"}, "vqcode_512 has 3 codes, codes_per_image is 4"),
    "code too large": (
        {"caption": "a", "codes": [1, 2, 3, 32]},
        "code 32 at position 3 is outside the codebook of 32. Wrong --codebook, or was",
    ),
    "code below 0": ({"caption": "a", "codes": [1, 2, 3, -1]}, "code -1 at position 3 is outside"),
    "huge code": ({"caption": "a", "codes": [1, 2, 3, 2**64]}, "codes is not a flat list of integers"),
    "uint64 code": ({"caption": "a", "codes": [1, 2, 3, 2**63 + 5]}, "codes is not a flat list|outside the codebook"),
    "ragged": ({"caption": "a", "codes": [[1], [2, 3]]}, "codes is not a flat list of integers"),
    "nested": ({"caption": "a", "codes": [[1, 2, 3, 4]]}, "codes is not a flat list of integers"),
    "float codes": ({"caption": "a", "codes": [1, 2, 3, 4.5]}, "codes is not a flat list of integers"),
    "codes of text": ({"caption": "a", "codes": "none"}, "codes is not a list of codes"),
    "two fields": (
        {"caption": "a", "codes": IMAGE, "vqcode_512": IMAGE},
        "codes in more than one field: codes, vqcode_512",
    ),
    "ids too large": ({"input_ids": [1, 10**6]}, "id 1000000 at position 1 of input_ids is outside the vocabulary of"),
    "no ids": ({"input_ids": []}, "input_ids is empty"),
    "items of numbers": ({"items": [3]}, r"items\[0\] is a int"),
    "items empty": ({"items": []}, "items is not a list"),
    "known later": ({"conversations": [], "data_type": "speech"}, "data_type='speech' is not supported; known"),
    "pair without codes": ({"caption": "a", "data_type": "t2i"}, "data_type='t2i', but no field codes or vqcode"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_ends_the_job_with_its_line(tmp_path, tokenizer, case):
    row, line = BAD[case]
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{line}") as caught:
        run(tmp_path, tokenizer, [{"text": "good"}, b"", row, {"text": "good"}], max_bad_share=0.01)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.quarantine.jsonl", "rows.jsonl", "tokenizer"]
    (entry,) = map(json.loads, (tmp_path / "out.quarantine.jsonl").read_text().splitlines())
    assert entry["file"].endswith("rows.jsonl") and entry["line"] == 3 and entry["byte"] == 18 and entry["reason"]


def test_other_mistakes(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: codes holds codes, but no codebook is given. Pass --codebook"):
        run(tmp_path, tokenizer, [{"caption": "a", "codes": IMAGE}], codebook=None, codes_per_image=())
    with pytest.raises(DataError, match=r"no rows. A corpus needs at least one document"):
        run(tmp_path, tokenizer, [])
    with pytest.raises(DataError, match=r"rows.jsonl: all 2 rows are bad, see .*out.quarantine.jsonl. A corpus needs"):
        run(tmp_path, tokenizer, [{"text": ""}] * 2, max_bad_share=1)
    for codebook in (0, -3):
        with pytest.raises(DataError, match=rf"--codebook={codebook} is too small"):
            run(tmp_path, tokenizer, [{"text": "a"}], codebook=codebook)
    with pytest.raises(DataError, match=r"--output='corpus/' is a folder"):
        preprocess(make_job(tmp_path / "rows.jsonl", output="corpus/", tokenizer=tokenizer))
    with pytest.raises(DataError, match=r"input='nowhere.jsonl' is wrong"):
        preprocess(make_job("nowhere.jsonl", output=tmp_path / "o", tokenizer=tokenizer))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe' is no file that can be read twice. Write its content to a file"):
        preprocess(make_job(tmp_path / "pipe", output=tmp_path / "o", tokenizer=tokenizer))
    text_only = make_tokenizer(tmp_path / "text", specials=["<eos>"])
    with pytest.raises(DataError, match=r"no <\|vision_start\|> or no <\|vision_end\|>, and .*rows.jsonl holds images"):
        run(tmp_path, text_only, [{"caption": "a", "codes": IMAGE}])
    with pytest.raises(DataError, match=r"no end-of-text token"):
        TextTokenizer(make_tokenizer(tmp_path / "none", specials=["<pad>"]))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a row of 72 bytes, --max-row-mb allows 5e-05 MB"):
        run(tmp_path, tokenizer, [{"text": "a"}, {"text": "b" * 60}], row_mb=5e-5, max_bad_share=0)


def test_a_first_try_may_have_some_bad_rows(tmp_path, tokenizer):
    """Of few rows some may be bad if no share is given; one that is given holds for any number of rows."""
    good, bad = {"text": "a bus"}, {"text": ""}
    for number, rows in ((1, 20), (10, 20), (10, 100), (10, 1000)):
        sidecar = run(tmp_path, tokenizer, [bad] * number + [good] * (rows - number))[1]
        assert sidecar["counts"]["documents"] == rows - number
    for number, rows, allowed in ((1, 1, 0), (2, 3, 1), (11, 100, 10), (11, 1000, 10)):
        with pytest.raises(
            DataError, match=rf"{number} of {rows} rows .* 0.01 \(the default\) allows {allowed}: empty"
        ):
            run(tmp_path, tokenizer, [bad] * number + [good] * (rows - number))
    with pytest.raises(DataError, match=r"1 of 20 rows \(5.00 %\) are bad, --max-bad-share 0.01 allows 0: empty text"):
        run(tmp_path, tokenizer, [bad] + [good] * 19, max_bad_share=0.01)


def test_a_corpus_that_appears_meanwhile_is_not_replaced(tmp_path, tokenizer, monkeypatch):
    """Two runs of one prefix: the first ends between the second's first look and its taking of the folder."""
    make_plan = unimega.data.preprocess.make

    def make(job, tokenizer):
        plan = make_plan(job, tokenizer)
        (tmp_path / "out.idx").write_bytes(b"of another run")
        return plan

    monkeypatch.setattr(unimega.data.preprocess, "make", make)
    with pytest.raises(DataError, match=r"out.idx: exists already"):
        run(tmp_path, tokenizer, [{"text": "second"}], overwrite=False)
    assert (tmp_path / "out.idx").read_bytes() == b"of another run" and not (tmp_path / "out.work").exists()


def test_a_kill_after_the_last_rename(tmp_path, tokenizer, monkeypatch):
    """The corpus is whole, its parts are still there: the next run says so; one of another input refuses."""
    rows = [{"text": "a red bus"}]
    with monkeypatch.context() as patch:
        patch.setattr(work.Work, "remove", lambda self: None)
        sidecar = run(tmp_path, tokenizer, rows)[1]
        before = (tmp_path / "out.idx").stat()
    saved = shutil.copytree(tmp_path / "out.work", tmp_path / "saved")
    assert list(saved.glob("*.part"))
    with pytest.raises(DataError, match=r"out.idx: exists already"):
        run(tmp_path, tokenizer, [{"text": "the blue bus"}], overwrite=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]))
    settings = json.loads((saved / "job.json").read_text())
    os.utime(path, ns=(settings["inputs"][0][2],) * 2)

    def again():
        shutil.copytree(saved, tmp_path / "out.work", dirs_exist_ok=True)
        job = make_job(path, output=tmp_path / "out", tokenizer=tokenizer, codebook=32, codes_per_image=(4,))
        return preprocess(job)

    assert again() == sidecar and not (tmp_path / "out.work").exists()
    assert (tmp_path / "out.idx").stat().st_mtime_ns == before.st_mtime_ns
    os.utime(tmp_path / "out.idx", ns=(settings["inputs"][0][2],) * 2)  # older than the job: it was to be replaced
    with pytest.raises(DataError, match=r"out.idx: exists already"):
        again()


def test_a_lock_is_one_that_others_see(tmp_path, monkeypatch):
    """The folder, and the lock in it, may be removed and made anew between opening and locking."""
    folder, flock, taken = tmp_path / "out.work", fcntl.flock, []

    def removed_first(lock, how):
        if not taken:
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "lock").touch()
        taken.append(flock(lock, how))

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with work._locked(folder) as lock:
        assert len(taken) == 2 and os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat())
        with pytest.raises(DataError, match=r"another process writes this corpus"):
            work._locked(folder)


def test_what_cannot_be_written_says_why(tmp_path):
    """Only a full disk is told to be full."""
    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
        line = str(write_error(tmp_path / "out", OSError(number, os.strerror(number))))
        assert os.strerror(number) in line and "Choose another output" in line and "free" not in line
    line = str(write_error(tmp_path / "out", OSError(errno.ENOSPC, "No space"), wanted=7))
    assert re.search(r"out: 7 bytes cannot be written \(No space; .* MB are free\). Make room and run again", line)


def _tool(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )


def test_the_tool(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"caption": "a red bus", "codes": IMAGE}))
    common = ("--input", "rows.jsonl", "--output", "out", "--tokenizer", "tokenizer", "--codebook", 32)
    good = _tool(tmp_path, *common, "--codes-per-image", 4)
    assert good.returncode == 0 and "out: 1 documents, 1 images, " in good.stdout, good.stderr
    again = _tool(tmp_path, *common)
    assert again.returncode == 2 and again.stderr.startswith("unimega: out.idx: exists already.")
    bad = _tool(tmp_path, *common, "--codes-per-image", 5, "--overwrite")
    assert (
        bad.returncode == 2
        and "unimega: rows.jsonl:1: codes has 4 codes, codes_per_image is 5. 1 of 1 rows" in bad.stderr
    )
    assert len(read(str(tmp_path / "out"))) == 1 and not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def tool(tmp_path, tokenizer, monkeypatch, capsys):
    """The command in this process, from the folder of the rows: (what it printed, what it said)."""
    spec = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools" / "preprocess_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.log, "setup", lambda: None)  # it would take pytest's handler
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a red bus", "content": "the car"}\n')

    def call(*arguments):
        module.main([*map(str, arguments), "--workers", "1", "--overwrite"])
        return capsys.readouterr()

    return call


ONE = ("--input", "rows.jsonl", "--output", "out", "--tokenizer", "tokenizer")


def test_the_flags_of_megatron(tmp_path, tokenizer, tool):
    known = ("--input", "rows.jsonl", "--output-prefix", "out", "--tokenizer-model", "tokenizer", "--append-eod")
    printed, said = tool(*known, "--tokenizer-type", "HuggingFaceTokenizer", "--json-keys", "content")
    assert "--append-eod changes nothing: the loader ends every document with eos" in said
    assert "--tokenizer-type changes nothing" in said and "out: 1 documents" in printed
    assert read(str(tmp_path / "out")) == [[(0, TextTokenizer(tokenizer).encode(["the car"])[0].tolist())]]
    for flags, line in (
        (("--json-keys", "text", "content"), "--json-keys=text content: Megatron-LM writes one corpus per key"),
        (("--vocab-file", "x"), "--vocab-file is not read. Name a folder with tokenizer.json"),
    ):
        with pytest.raises(ConfigError, match=line):
            tool(*ONE, *flags)


def test_what_the_command_line_refuses(tmp_path, tool):
    (tmp_path / "job.toml").write_text("[output]\nprefix = 'out'\n[tokenizer]\npath = 'tokenizer'\n")
    for arguments, line in (
        (ONE[2:], "--input is missing. Give a JOB.toml, or --input, --output and --tokenizer"),
        (("job.toml", "--codebook", 3), "--codebook does not go with job.toml. Set it in the file"),
        ((*ONE, "--fields", "content"), "--fields=content is wrong. Write FIELD=NAME"),
        ((*ONE, "--image-tokenizer", "digits"), "--image-tokenizer=digits is wrong. Write NAME:PATH"),
        ((*ONE, "--image-tokenizer", "dalle:x"), "image tokenizer 'dalle' is not known. There are chameleon, digits"),
        ((*ONE, "--kind", "poem"), "argument --kind: invalid choice: 'poem'"),
        ((*ONE, "--colour"), "unrecognized arguments: --colour. --help shows"),
        (("gone.toml",), "gone.toml: cannot be read"),
        (("rows.jsonl",), "rows.jsonl: not valid TOML"),
    ):
        with pytest.raises(ConfigError, match=line):
            tool(*arguments)
    for flags, line in (
        (("--fields", "body=x"), "fields: unknown field 'body'. Known: text"),
        (("--max-bad-share", 2), "--max-bad-share=2.0 is wrong"),
        (("--codebook", 2**31), "--codebook=2147483648 is too large. It is at most 1073741824"),
        (("--task-mb", 0), "--task-mb=0.0 is wrong"),
        (("--max-row-mb", "nan"), "--max-row-mb=nan is wrong"),
    ):
        with pytest.raises(DataError, match=line):
            tool(*ONE, *flags)


def test_help_teaches_by_an_example(tool, capsys, tmp_path, tokenizer):
    """The job of --help can be read as it stands."""
    with pytest.raises(SystemExit):
        tool("--help")
    text = capsys.readouterr().out
    lines = text[text.index("    [output]") :].splitlines()
    example = "\n".join(line for line in lines if line.startswith("    ") or not line)
    (tmp_path / "example.toml").write_text(example)
    job = read_job(str(tmp_path / "example.toml"))
    assert [source.name for source in job.source] == ["web", "pairs"] and job.vision.codebook == 8192
    assert job.limits == LimitsSection() and job.output.max_bad_share == MAX_BAD_SHARE
