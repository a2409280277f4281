#!/usr/bin/env python3
"""Judge runs by their logs, and write the files of a submission: numbers, table, pictures.

    python submit.py logs/*.txt                    verdicts; submission.json, README table, pictures
    python submit.py logs/*.txt --check            write nothing; fail if one of these is stale
    python submit.py logs/*.txt --baseline pr1493  also test the score against another system's
    python submit.py logs/*.txt --folder MyRun     also make the record folder YYYY-MM-DD_MyRun

One log is one seed.  Every rule gets PASS, FAIL or NOT DECIDED (the logs cannot tell), with the
value found and the source of the rule; every number that is written comes from the logs.  Exit
code: 0 fine, 1 a rule fails or a file is out of date, 2 bad input.  experiments/public_logs.py
judges public logs of the challenge.
"""
import console  # first: from here on Ctrl-C ends in one line
from console import Failure

import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import NamedTuple


class Undecided(Exception):
    """The logs lack what a verdict or a number needs; the message names it."""


class Broken(Exception):
    """A rule does not hold; the message has the value found."""


def require(holds: object, otherwise: str):
    """Raise Broken with the sentence `otherwise` unless `holds` is true."""
    if not holds:
        raise Broken(otherwise)


# ------------------------------------------------------------------------------------------------
# Logs: one event a line, `event key=value ...` (logfmt), and a block `key: value` at the end
# ------------------------------------------------------------------------------------------------

PAIR = re.compile(r'(\*?\w+)=("(?:[^"\\]|\\.)*"|[^\s"]+)')
LINE = re.compile(rf"(\w+)((?: {PAIR.pattern})+)")
RESULT = re.compile(r"([\w-]+): +(\S.*)")
LIMIT_SECONDS, LIMIT_BYTES = 600.0, 16_000_000


def number(text: str, where: object) -> int | float:
    """The number below 1e15 that `text` spells; raises Failure naming `where` for anything else."""
    if not re.fullmatch(r"(?!.{41})[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", text) or float(text) >= 1e15:
        raise Failure(f"{where}: {text[:40]!r} is not a number that a run can have")
    return int(text) if text.isdigit() else float(text)


class Event(NamedTuple):
    """One line of a log; values are text."""
    name: str
    values: dict[str, str]
    path: Path
    line: int

    def text(self, key: str) -> str:
        """A value as written; raises Undecided if there is none."""
        if key not in self.values:
            raise Undecided(f"{self.path.name} has no {key} in its {self.name} line")
        return self.values[key]

    def number(self, key: str) -> int | float:
        """A value as a number; raises Undecided if there is none."""
        return number(self.text(key), f"{self.path}, line {self.line}, {key}")

    def integers(self, *keys: str) -> tuple[int, ...]:
        """Several values as whole numbers."""
        return tuple(int(self.number(key)) for key in keys)


class Log(NamedTuple):
    """The events of one seed's run, and the bytes of the file."""
    path: Path
    data: bytes
    events: list[Event]

    def all(self, *names: str, **values: str) -> list[Event]:
        """Events of these names whose values include `values`, in order."""
        return [e for e in self.events if e.name in names and values.items() <= e.values.items()]

    def last(self, event: str, /, **values: str) -> Event:
        """The last such event; raises Undecided if there is none."""
        found = self.all(event, **values)
        if not found:
            raise Undecided(f"{self.path.name} has no {' '.join([event, *values.values()])} line")
        return found[-1]

    @property
    def sessions(self) -> list[Event]:
        """All settings of each process that wrote to this log: one process, or one a stage."""
        found = []
        for e in self.all("run", "config"):
            if e.name == "run":
                found.append(Event("config", {}, e.path, e.line))
            else:
                found[-1].values.update({k.lstrip("*"): v for k, v in e.values.items()})
        return found

    @property
    def settings(self) -> Event:
        """All settings of the last process."""
        return self.sessions[-1]

    @property
    def headline(self) -> Event:
        """The pass over the validation text whose score counts."""
        return self.last("eval", name=self.last("result").text("score"))

    @property
    def figures(self) -> dict[str, int | float]:
        """The numbers of this seed in submission.json; raises Undecided if one is missing."""
        head, end, artifact = self.headline, self.last("train_end"), self.last("artifact")
        steps, seconds = end.number("steps"), end.number("elapsed_s")
        return dict(
            val_loss=head.number("val_loss"), val_bpb=head.number("val_bpb"),
            artifact_bytes=artifact.number("total_bytes"),
            model_bytes=artifact.number("model_bytes"), code_bytes=artifact.number("code_bytes"),
            steps=steps, step_avg_ms=round(1000 * seconds / max(steps, 1), 2), train_time_s=seconds,
            data_time_s=self.last("data_closed").number("elapsed_s"),
            eval_time_s=head.number("clock_s"))

    def limit(self, stage: str) -> float:
        """Seconds that the clock of `max` (training) or `eval` may show; a run may have fewer."""
        setting = f"{stage}_wallclock_seconds"
        own = self.settings.number(setting) if setting in self.settings.values else 0
        return min(LIMIT_SECONDS, own or LIMIT_SECONDS)


def read_text(path: Path) -> tuple[bytes, str]:
    """A log's bytes, and its text without a byte-order mark; raises Failure."""
    data = console.read_file(path, 1 << 26)
    try:
        return data, data.decode("utf-8-sig")
    except ValueError:
        raise Failure(f"{path}: not UTF-8 text, so not a log") from None


def read_log(path: Path) -> Log:
    """The log of train_gpt.py at `path`; raises Failure naming the file and the line."""
    data, text = read_text(path)
    if not re.match(r"run \w+=", text):
        raise Failure(f"{path}: not a log of train_gpt.py, whose first line is a run event; "
                      "experiments/public_logs.py reads public logs")
    events = []
    for at, line in enumerate(map(str.rstrip, text.split("\n")), 1):
        if line in ("", "---") or line.startswith("# "):
            continue
        where = f"{path}, line {at}"
        if match := LINE.fullmatch(line):
            pairs = [(key, console.load_json(value, where) if value[0] == '"' else value)
                     for key, value in PAIR.findall(match[2])]
            events.append(Event(match[1], dict(pairs), path, at))
        elif match := RESULT.fullmatch(line):
            if events[-1].name != "result":
                events.append(Event("result", {}, path, at))
            pairs = [*events[-1].values.items(), match.groups()]
            events[-1].values.update(pairs)
        else:
            raise Failure(f"{where}: neither an event nor a result: {line[:40]!r}")
        if len(dict(pairs)) < len(pairs) or not all(value.isprintable() for _, value in pairs):
            raise Failure(f"{where}: control characters, or a key that comes twice")
    return Log(path, data, events)


class Case(NamedTuple):
    """The logs in order of their seeds, and the submitted program, if it is at hand."""
    logs: list[Log]
    packed: Path
    code: bytes | None

    def all(self, *names: str, **values: str) -> list[Event]:
        """Events of these names and values in all logs."""
        return [e for log in self.logs for e in log.all(*names, **values)]


# ------------------------------------------------------------------------------------------------
# Rules: claims that logs can decide, each with its source
# ------------------------------------------------------------------------------------------------

class Rule(NamedTuple):
    """A claim; `decide` returns the finding of a PASS, or raises Broken (FAIL) or Undecided."""
    key: str
    title: str
    source: str
    decide: Callable[[Log | Case], str]
    per_log: bool = True


class Verdict(NamedTuple):
    """The state of a rule and the value found."""
    rule: Rule
    state: str
    finding: str

    def __str__(self) -> str:
        return f"{self.state:<12} {self.rule.title}: {self.finding} [{self.rule.source}]"


PASS, FAIL, NOT_DECIDED = "PASS", "FAIL", "NOT DECIDED"
WANTED = ("config", "data", "step", "train_end", "artifact", "validation", "eval")
WANTED_OURS = ("run", *WANTED, "data_closed", "model", "matrix", "ledger", "result")
DIAGNOSTIC = ("raw", "ema", "diagnostic")       # passes that do not lead to the score
FREE = ("group", "seed", "run_id", "logfile", "stages", "resume", "data_dir", "out_dir")
LEARNING = *"step train_end checkpoint gradients hessians compress matrix warm_up".split(),
WHOLE = {                       # dataset: targets and bytes of text of the whole validation set
    "fineweb10B_sp8192": {40_540_160: 151_078_222},
    "fineweb10B_sp1024": {62_021_632: 151_080_363},
    "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved":
        {47_851_520: 151_074_499, 47_853_343: 151_080_645},
    "openmix_sp8192": {1_048_576: 3_889_821},
}
FINEWEB_BYTES = 151_080_000     # of any lossless tokenizer, give or take a cut-off tail
TAIL = 1e-4                     # largest part of the targets that the last window may cut off
STOP_SLACK = 0.1                # seconds: the step under way when the clock runs out
SUM_SLACK = 1e-4                # relative: figures of six digits that must add up
NOT_IN_LOGS = ("Logs cannot decide causality, normalisation, the byte table, disjoint documents "
               "and network access; tests of the code and the data do.")
RULES: list[Rule] = []


def rule(source: str, per_log: bool = True) -> Callable:
    """Decorator that makes a Rule of a function: its name is the key, its docstring the title."""
    def add(decide: Callable) -> Callable:
        RULES.append(Rule(decide.__name__, decide.__doc__, source, decide, per_log))
        return decide
    return add


def judge(case: Case, rules: Iterable[Rule] = RULES) -> list[Verdict]:
    """The verdict of every rule; one log that fails, or else one that lacks evidence, decides."""
    verdicts = []
    for claim in rules:
        found = {FAIL: [], NOT_DECIDED: [], PASS: []}
        for part in case.logs if claim.per_log else [case]:
            try:
                found[PASS].append(claim.decide(part))
            except Broken as reason:
                found[FAIL].append(f"{part.path.name}: {reason}" if claim.per_log else str(reason))
            except Undecided as reason:
                found[NOT_DECIDED].append(str(reason))
        state = next(state for state, findings in found.items() if findings)
        verdicts.append(Verdict(claim, state, "; ".join(dict.fromkeys(found[state]))))
    return verdicts


def agree(events: list[Event], *keys: str) -> str:
    """The values that all events have in common; raises Broken naming a key whose values differ."""
    for key in keys:
        found = sorted({e.values[key] for e in events if key in e.values})
        require(len(found) < 2, f"{key} is {' and '.join(value[:80] for value in found)}")
    texts = [", ".join(f"{key} {e.text(key)}" for key in keys) for e in events]
    return texts[0] if texts else "none"


def within(event: Event, key: str, limit: float, slack: float = 0.0) -> str:
    """A reading of a clock and its limit; raises Broken if the reading is beyond it."""
    finding = f"{event.number(key):,} s of {limit:g} s"
    require(event.number(key) <= limit + slack, finding)
    return finding


def bits_per_byte(loss: float, targets: int, size: int) -> float:
    """Bits per byte of a mean loss in nats per target; raises Undecided if there is no text."""
    if not targets or not size:
        raise Undecided(f"{targets} targets of {size} bytes have no score")
    return loss / math.log(2) * targets / size


def digits_slack(event: Event) -> float:
    """How far, relatively, the printed digits of loss and bits per byte may mislead."""
    places = {key: len(event.text(key).partition(".")[2]) for key in ("val_loss", "val_bpb")}
    return sum(0.6 * 10.0 ** -n / max(event.number(key), 1e-9) for key, n in places.items())


def read_optional(path: Path) -> bytes | None:
    """Bytes of a regular file, or None if there is nothing; raises Failure."""
    return console.read_file(path) if os.path.lexists(path) else None


@rule("README 6; #1728, #2071, #2103")
def log_complete(log: Log, wanted: Iterable[str] = WANTED_OURS) -> str:
    """Logs are complete"""
    missing = [name for name in wanted if not any(e.values for e in log.all(name))]
    require(not missing, f"no {', '.join(missing)} line")
    require(log.events[-1].name == "result", "the log goes on after its final block")
    return "every kind of line from the settings to the score"


@rule("README 1, 6; #86, #1493, #1835, #1855, #1858", per_log=False)
def same_code(case: Case) -> str:
    """One program made all logs, and it is the file submitted"""
    own = [] if case.code is None else [Event("run", dict(
        code_bytes=str(len(case.code)), code_sha256=sha256(case.code).hexdigest()), case.packed, 1)]
    finding = agree([*case.all("run"), *own], "code_bytes", "code_sha256")
    if not own:
        raise Undecided(f"{finding}; {case.packed} is not here, --packed names another file")
    return finding


@rule("#1851, #1925, #2124", per_log=False)
def same_settings(case: Case) -> str:
    """Settings differ in the seed only"""
    sessions = [s for log in case.logs for s in log.sessions if s.text("seed")]
    names = sorted({name for s in sessions for name in s.values} - set(FREE))
    missing = dict.fromkeys(names, "(not listed)")
    agree([s._replace(values=missing | s.values) for s in sessions], *names)
    return f"{len(names)} settings agree in all logs"


@rule("README 4; #1114, #1876", per_log=False)
def three_seeds(case: Case) -> str:
    """Three seeds or more"""
    seeds = [" or ".join(sorted({s.text("seed") for s in log.sessions})) for log in case.logs]
    text = ", ".join(seeds)
    require(all(map(str.isdigit, seeds)), f"a log mixes seeds: {text}")
    require(len(set(seeds)) == len(seeds), f"a seed comes twice in {text}")
    models = {(e.values["sha256"], e.path) for e in case.all("artifact") if "sha256" in e.values}
    require(len(dict(models)) == len(models), f"two of the seeds {text} have the same artifact")
    require(len(seeds) >= 3, f"{len(seeds)} of 3 seeds: {text}")
    return f"seeds {text}"


@rule("#86, #2127", per_log=False)
def same_data(case: Case) -> str:
    """The same data in all logs"""
    found = [f"{split} {agree(case.all('data', split=split), 'files', 'sha256')}"
             for split in ("train", "val")]
    # Until 2026-11 logs had no manifest, and a digest of the shards' names and sizes only.
    manifests = {e.text("manifest") for e in [*case.all("data"), case.logs[0].last("data")]}
    return f"{', '.join(found)}, manifest {' and '.join(sorted(manifests))}"


RULES += [
    Rule("hardware_named", "Hardware is named, the same in all logs", "README 2; #1728, #2103",
         lambda case: agree(case.all("run"), "world", "device"), per_log=False),
    Rule("train_under_600s", "Training clock", "README 2; #1908",
         lambda log: within(log.last("train_end"), "elapsed_s", log.limit("max"), STOP_SLACK)),
    Rule("data_under_600s", "Training-data clock, with calibration", "#677; #593, #634, #1868",
         lambda log: within(log.last("data_closed"), "elapsed_s", log.limit("max"),
                            0.0 if log.all("hessians") else STOP_SLACK)),
    Rule("eval_under_600s", "Evaluation clock, with all passes", "README 3; #1858, #1972",
         lambda log: within(log.last("eval"), "clock_s", log.limit("eval"))),
]


@rule("#1858, #2135")
def clocks_add_up(log: Log) -> str:
    """Clocks run forward and hold every pass over the quantized model"""
    times, clock = log.all("step", "train_end", "data_closed"), 0.0
    for one, two in zip(times, times[1:]):
        slack = sum(float(e.values.get("rounding_s", 0)) for e in (one, two))   # public logs only
        require(one.number("elapsed_s") <= two.number("elapsed_s") + slack,
                f"line {two.line}: the training clock runs backwards")
    for e in log.all("eval"):
        if e.text("name") not in DIAGNOSTIC:
            clock, reading = clock + e.number("seconds"), e.number("clock_s")
            require(reading >= clock * (1 - SUM_SLACK),
                    f"the clock reads {reading:g} s after {clock:g} s of scoring")
            clock = reading
    return f"{len(times)} readings and {clock:g} s of scoring"


@rule("README 1; #1776, #1809, #1835, #1858, #1978; #1060, #1864")
def artifact_under_16mb(log: Log) -> str:
    """Model and the very program that ran fit in 16,000,000 bytes"""
    for e in log.all("artifact"):
        total = e.number("total_bytes")
        require(total <= LIMIT_BYTES, f"{total:,} bytes of {LIMIT_BYTES:,}")
        model, code = e.integers("model_bytes", "code_bytes")
        ran = log.last("run").number("code_bytes")
        require(total == model + code and code == ran,
                f"{total:,} bytes are not {model:,} of model and {ran:,} of code")
    e = log.last("artifact")
    data = read_optional(Path(e.values["file"])) if "file" in e.values else None
    require(data is None or (len(data), sha256(data).hexdigest()) == (model, e.text("sha256")),
            f"{e.values.get('file')} is here, but is not the artifact of the log")
    return f"{total:,} bytes, the model {'not ' if data is None else ''}at hand"


@rule("#1017 C4; #568, #846, #1060")
def scored_once(log: Log) -> str:
    """Every target is scored once, and the last pass is the score"""
    names = [e.text("name") for e in log.all("eval")]
    require(len(set(names)) == len(names), f"a pass comes more than once in {', '.join(names)}")
    require(log.headline == log.last("eval"), "the score is not that of the last pass")
    validation = log.last("validation")
    key = "target_bytes" if "target_bytes" in validation.values else "text_bytes"   # until 2026-11
    targets, whole = validation.integers("targets", key)
    for name, e in zip(names, log.all("eval")):
        found = *e.integers("targets", "bytes"), *log.last("ledger", name=name).integers(
            "targets", "scored_min", "scored_max")
        require(found == (targets, whole, targets, 1, 1), f"{name}: {found[0]:,} of {targets:,} "
                f"targets, {found[1]:,} of {whole:,} bytes; by its ledger {found[2]:,} targets, "
                f"scored {found[3]} to {found[4]} times")
    return f"each pass scores its {targets:,} targets exactly once"


@rule("#1017 V; #1545, #1785, #2138")
def canonical_totals(log: Log) -> str:
    """Targets and bytes are those of the whole validation set"""
    head, dataset = log.headline, log.settings.text("dataset")
    known, (targets, size) = WHOLE.get(dataset, {}), head.integers("targets", "bytes")
    finding = f"{targets:,} targets and {size:,} bytes of {dataset}"
    if not known and not dataset.startswith("fineweb"):
        raise Undecided(f"{finding}, whose totals are not known")
    near = min(known or [targets], key=lambda count: abs(count - targets))
    whole, slack = known.get(near, FINEWEB_BYTES), 10 * TAIL * FINEWEB_BYTES
    if targets in known:                                # else another context has another tail
        slack = size * float(head.values.get("rounding", 0))    # public logs: bytes by the score
    require(abs(targets - near) <= TAIL * near and abs(size - whole) <= slack,
            f"{finding}, whose whole text has {near:,} and {whole:,}")
    return finding


@rule("README 5; #1017 V; #86")
def arithmetic(log: Log) -> str:
    """Scores follow from losses and counts, tokens from steps, the final block from its lines"""
    for e in log.all("eval"):
        bpb = bits_per_byte(e.number("val_loss"), *e.integers("targets", "bytes"))
        require(abs(bpb - e.number("val_bpb")) <= digits_slack(e) * bpb,
                f"{e.text('name')}: val_bpb is {e.text('val_bpb')}, not {bpb:.8f} as by the loss")
    steps, seen = log.last("train_end").integers("steps", "seen_tokens")
    batch = log.settings.number("train_batch_tokens")
    require(seen == steps * batch, f"{seen:,} tokens seen are not {steps:,} steps of {batch:,}")
    block, lines = log.last("result"), log.figures | dict(seed=log.settings.number("seed"))
    for key in block.values:
        value = lines.get(key.replace("_seconds", "_time_s"))
        slack = SUM_SLACK if key.endswith("_seconds") else 0.0
        require(value is None or math.isclose(block.number(key), value, rel_tol=slack),
                f"the final block's {key} is {block.text(key)}, its line says {value}")
    counts = block.values.get("counts", "1")
    require(counts[0] == "1", f"the run does not count, by its final block: {counts}")
    return f"{len(log.all('eval'))} scores, {seen:,} tokens, {len(block.values)} lines of the block"


@rule("#1017 C3; #136, #402, #672")
def score_first_ttt(log: Log) -> str:
    """Chunks are scored before they are learnt from"""
    scores, updates, final = log.all("score"), log.all("update"), log.headline
    if not scores + updates:
        require(final.text("name") != "ttt", "a ttt score but no score lines")
        return "the weights are fixed while scoring: no update line"
    at = 0
    for i, e in enumerate(scores, 1):
        first, last = e.integers("first", "last")
        require(e.text("chunk") == f"{i}/{len(scores)}" and first == at < last,
                f"line {e.line}: score of {first}..{last} is not chunk {i}, which begins at {at}")
        at = last
    require(len(updates) < len(scores), "an update after the last chunk")
    for e, scored, following in zip(updates, scores, scores[1:]):
        same = all(e.text(key) == scored.text(key) for key in ("chunk", "first", "last"))
        require(same and scored.line < e.line < following.line, f"line {e.line}: update of "
                f"{e.text('first')}..{e.text('last')} is not right after the score of that chunk")
    batches = [e for e in scores if "documents" in e.values]
    require(not batches or (not updates and len(batches) == len(scores)),
            "update lines among those of documents, which count their updates")
    for e in batches:
        first, last, documents, steps = e.integers("first", "last", "documents", "updates")
        least = steps * int(log.settings.number("ttt_chunk_tokens")) + documents
        require(documents > 0 and last - first >= least, f"line {e.line}: {steps} updates on "
                f"scored chunks, and a last chunk of each document, take {least} targets")
    bpb, end = final.number("val_bpb"), scores[-1]
    require(at == final.number("targets"), f"the last chunk ends at {at}, not at the last target")
    require(abs(end.number("bpb") - bpb) < 1e-7 and end.line < final.line,
            f"the chunks come to {end.text('bpb')}, the score is {bpb}")
    if batches:
        return (f"{len(scores)} batches of documents; each chunk of one is scored before the "
                "update on it, none after its last")
    return f"{len(scores)} chunks, each scored before the one update on it, none after the last"


@rule("#1376, #677, #728; #1530")
def no_pre_quant_ttt(log: Log) -> str:
    """Training data is closed, the artifact frozen, only then validation data opened"""
    frozen, closed = log.last("artifact"), log.last("data_closed")
    opened = min(e.line for e in [*log.all("data", split="val"), log.last("validation"),
                                  *log.all("eval")])
    for e in log.all("data", split="train"):
        require(e.line < closed.line, "training data is opened after it was closed")
    require(frozen.line < opened, "validation data is opened before the artifact is frozen")
    for e in log.all(*LEARNING):
        require(e.line < opened, f"a line {e.name} after validation data was opened")
    return f"artifact {frozen.text('sha256')[:12]} precedes validation data, line {opened}"


# ------------------------------------------------------------------------------------------------
# Significance: a one-sided t-test in bits per byte; the margin is given in nats per token
# ------------------------------------------------------------------------------------------------

MARGIN_NATS = 0.005         # a record must beat the one before by this much per token
LEADERBOARD = "fineweb10B_sp8192"
PRESETS = {                 # val_bpb a seed; one number: a published mean, tested as a constant
    "pr1060": [1.11183590, 1.11271417, 1.11212378],
    "pr1493": [1.08079352, 1.08103103, 1.08118408],
    "pr1855": [1.06108],
    "pr1858": [1.08061893, 1.08103354, 1.08135172],
    "pr1876": [1.07907, 1.08075, 1.08043],
}


def compare(ours: list[float], theirs: list[float], margin: float = 0.0) -> dict[str, float]:
    """t, degrees of freedom and p of Welch's test that our mean is lower by more than `margin`.

    A single score of theirs is a constant.  Raises Undecided for one seed and for equal scores.
    """
    from scipy import stats
    shifted = [score + margin for score in ours]
    if len(ours) < 2:
        raise Undecided("a t-test needs two seeds or more")
    if max(pstdev(ours), pstdev(theirs)) < 1e-12:
        raise Undecided("a t-test needs scores that differ from seed to seed")
    if len(theirs) > 1:
        test = stats.ttest_ind(shifted, theirs, equal_var=False, alternative="less")
    else:
        test = stats.ttest_1samp(shifted, theirs[0], alternative="less")
    found = dict(t=test.statistic, df=test.df, p=test.pvalue)
    return {key: round(float(value), 8) for key, value in found.items()}


def comparison(logs: list[Log], baseline: dict) -> dict:
    """`baseline` and our difference to it, for submission.json; raises Failure for other text."""
    name, data, theirs = baseline.values()
    dataset = logs[0].settings.text("dataset")
    if dataset != data and not (dataset.startswith("fineweb") and data.startswith("fineweb")):
        raise Failure(f"baseline {name} is of {data}, the logs of {dataset}: bits per byte of "
                      "different text do not compare; --baseline-data names the baseline's")
    ours = [log.headline.number("val_bpb") for log in logs]
    margin = bits_per_byte(MARGIN_NATS, *logs[0].headline.integers("targets", "bytes"))
    delta = mean(ours) - mean(theirs)
    return baseline | dict(
        delta_bpb=round(delta, 8), delta_nats_per_token=round(delta * MARGIN_NATS / margin, 8),
        margin_bpb=round(margin, 8),
        test=f"{'Welch t-test' if len(theirs) > 1 else 't-test against a constant'}, one-sided",
        plain=compare(ours, theirs), margin=compare(ours, theirs, margin))


def comparison_lines(found: dict) -> list[str]:
    """A comparison as sentences."""
    theirs = found["baseline_val_bpb"]
    lines = [f"Against {found['baseline']} (n = {len(theirs)}, mean {mean(theirs):.5f} "
             f"on {found['baseline_data']}): {found['delta_bpb']:+.5f} bits per byte, "
             f"{found['delta_nats_per_token']:+.5f} nats per token."]
    margin = f"{MARGIN_NATS} nats per token = {found['margin_bpb']:.6f} bits per byte"
    for name, claim in dict(plain="better at all", margin=f"better by more than {margin}").items():
        t, df, p = found[name].values()
        lines.append(f"{found['test']}, {claim}: t = {t:.2f}, df = {df:.2f}, p = {p:.2g}: "
                     f"{'' if p < 0.01 else 'not '}significant at 0.01.")
    return lines


# ------------------------------------------------------------------------------------------------
# Numbers: submission.json and the table of results, from the logs alone
# ------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ATTRIBUTION = dict(base_system="#1876, #1493", gptq="arXiv:2210.17323", documents="#1530",
                   coprime_loader="#726, #1060", score_first_ttt="#549, #1413")
COLUMNS = dict(     # figure of a seed, or pass over the validation text: decimals
    val_bpb=5, val_loss=5, ema=5, quantized=5, sliding=5, artifact_bytes=0, steps=0, train_time_s=1,
    eval_time_s=1)
STATISTICS = dict(  # key of other submissions: statistic of a figure over seeds, decimals
    val_bpb=(mean, "val_bpb", 8), val_bpb_std=(stdev, "val_bpb", 8),
    val_loss=(mean, "val_loss", 8), val_loss_std=(stdev, "val_loss", 8),
    bytes_total=(max, "artifact_bytes", 0), artifact_bytes_max=(max, "artifact_bytes", 0),
    artifact_bytes_mean=(mean, "artifact_bytes", None), train_steps_mean=(mean, "steps", 1),
    step_avg_ms_mean=(mean, "step_avg_ms", 2), wallclock_seconds=(max, "train_time_s", 8),
    eval_time_seconds=(max, "eval_time_s", 8))


def submission(case: Case, verdicts: list[Verdict], given: dict[str, str]) -> dict:
    """submission.json but for the comparison; raises Undecided if a log lacks a figure."""
    head, run = case.logs[0], case.logs[0].last("run")
    seeds = [int(log.settings.number("seed")) for log in case.logs]
    if len(set(seeds)) < len(seeds):
        raise Undecided(f"a seed comes twice in {', '.join(map(str, seeds))}")
    results = {str(seed): log.figures | dict(
        stages_val_bpb={e.text("name"): e.number("val_bpb") for e in log.all("eval")},
        log_sha256=sha256(log.data).hexdigest()) for seed, log in zip(seeds, case.logs)}
    before = [figures["stages_val_bpb"].get("ema") for figures in results.values()]
    date = max(log.last("run").text("started") for log in case.logs)
    if not re.match("[0-9]{4}-[0-9]{2}-[0-9]{2}T", date):
        raise Failure(f"{head.path}: started={date[:40]} is not a date and time")
    text, hardware = head.settings.text("dataset"), f"{run.number('world')} x {run.text('device')}"
    blurb, track = f"{text}, {hardware}, {head.limit('max'):g} s of training.", "non_record"
    if not text.startswith("fineweb"):
        blurb += " Not the challenge's text: no score on it compares with the leaderboard."
    elif not re.match("8 x .*H100", hardware):
        blurb += " Not the challenge's hardware."
    else:
        track = "10min_16mb"
    return dict(
        **given, blurb=blurb, date=date, track=track,
        **{key: round(statistic([figures[name] for figures in results.values()]), digits)
           for key, (statistic, name, digits) in STATISTICS.items()
           if statistic is not stdev or len(seeds) > 1},
        pre_quant_val_bpb=None if None in before else round(mean(before), 8),
        seeds=seeds, seed_results=results, bytes_code=run.number("code_bytes"),
        code_sha256=run.text("code_sha256"), dataset=text, hardware=hardware,
        pytorch_version=run.text("torch"), python_version=run.values.get("python"),
        technique_summary=f"recipe {head.settings.text('recipe')}", attribution=ATTRIBUTION,
        compliance={v.rule.key: {PASS: True, FAIL: False}.get(v.state) for v in verdicts})


def mean_std(values: list, digits: int) -> str:
    """`mean ± std` with so many decimals, or a single value as it is."""
    around = f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):,.{digits}f}{around}"


def result_block(found: dict) -> str:
    """The lines between the markers of a README: seeds, mean and deviation, baseline."""
    figures = {s: {**row, **row["stages_val_bpb"]} for s, row in found["seed_results"].items()}
    columns = {k: n for k, n in COLUMNS.items() if all(k in row for row in figures.values())}
    rows = [["seed", *columns], ["--:"] * (len(columns) + 1)]
    rows += [[s, *(f"{row[k]:,.{n}f}" for k, n in columns.items())] for s, row in figures.items()]
    bpb, *rest = (mean_std([row[k] for row in figures.values()], n) for k, n in columns.items())
    rows.append(["mean ± std", f"**{bpb}**", *rest])
    against, sentences = found.get("comparison"), []
    if against:
        theirs = against["baseline_val_bpb"]
        name = f"{against['baseline']} (n = {len(theirs)})"
        rows.append([name, mean_std(theirs, 5), *[""] * len(rest)])
        sentences = ["", *comparison_lines(against)]
    return "\n".join([found["blurb"], "", *(f"| {' | '.join(row)} |" for row in rows), *sentences])


def with_block(path: Path, data: bytes, block: str) -> bytes:
    """A README with `block` between its markers; raises Failure without them."""
    text = data.decode("utf-8", "surrogateescape")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise Failure(f"{path}: needs {BEGIN} and {END}, once each and in this order")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{head}{BEGIN}\n{block}\n{END}{tail}".encode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------------
# Pictures: two SVG files from the logs, the same bytes for the same logs, readable in grey
# ------------------------------------------------------------------------------------------------

STYLE = {
    "svg.hashsalt": "golf", "text.parse_math": False, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.prop_cycle": "cycler(color=['0.1', '0.4', '0.65'], marker=['o', 's', '^'])",
    "lines.linewidth": 1, "lines.markersize": 4,
}


def draw(panel: Callable, logs: list[Log]) -> bytes:
    """An SVG file that `panel`, a function (axes, logs), fills; no settings of the user count."""
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    with contextlib.chdir(os.sep):                  # a matplotlibrc of this folder would come first
        import matplotlib.figure
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        figure, out = matplotlib.figure.Figure((9, 3.5), layout="constrained"), io.BytesIO()
        panel(figure.subplots(), logs)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def draw_losses(axes, logs: list[Log]):
    """Draw every seed's training loss over time, and when recurrence begins."""
    shown = []
    for log in logs:
        times, losses = ([e.number(key) for e in log.all("step")]
                         for key in ("elapsed_s", "train_loss"))
        if len(losses) < 2:
            raise Undecided(f"{log.path.name} has too few step lines to draw")
        every = len(losses) // 10 or 1      # as a share of the picture, a loss of 1e14 is too far
        axes.plot(times, losses, markevery=every, label=f"seed {log.settings.text('seed')}")
        shown += losses[1 + len(losses) // 20:]         # the first fall is far above the rest
        held_out = [(e.number("elapsed_s"), e.number("loss")) for e in log.all("held_out")]
        if held_out:
            axes.plot(*zip(*held_out), linestyle=":", marker="x", label="... held out")
    axes.set_ylim(min(shown) - 0.05, max(shown) + 0.05)
    for e in logs[0].all("loop_on"):
        axes.axvline(e.number("elapsed_s"), color="black", linestyle="--")
        axes.text(e.number("elapsed_s"), max(shown), " recurrence on", va="top")
    axes.set(xlabel="seconds of training", ylabel="nats per token", title="training loss")
    axes.legend()


def byte_parts(log: Log) -> dict[str, tuple]:
    """Bytes by part: free, code, rest and kinds of matrices, these with bits a weight by layer."""
    code, model = log.last("artifact").integers("code_bytes", "model_bytes")
    kinds = {}
    for e in sorted(log.all("matrix"), key=lambda e: (len(e.text("name")), e.text("name"))):
        kind = re.sub(r"^\w+\.[0-9]+\.|\.weight$", "", e.text("name"))     # attn.c_q, for example
        size, *bits = kinds.get(kind, (0,))
        bits += [e.number(key) for key in e.values if key == "bits_per_weight"]
        kinds[kind] = size + e.number("entropy_bytes"), *bits
    rest = model - sum(size for size, *_ in kinds.values())
    return {"free": (LIMIT_BYTES - code - model,), "code": (code,),
            "vectors, scales, coding loss": (rest,),
            **dict(sorted(kinds.items(), key=lambda part: part[1]))}


def draw_bytes(axes, logs: list[Log]):
    """Draw the parts of the largest artifact as bars."""
    log = max(logs, key=lambda log: log.last("artifact").number("total_bytes"))
    names, parts = zip(*byte_parts(log).items())
    bars = axes.barh(names, [p[0] for p in parts], color=["0.8", *["0.3"] * (len(names) - 1)])
    axes.bar_label(bars, ["  ".join([f"{p[0]:,.0f}", *map("{:.1f}".format, p[1:])]) for p in parts],
                   padding=3)
    axes.margins(0.15, 0.02)
    name = console.one_line(log.path.name)
    axes.set(xticks=[], title=f"{LIMIT_BYTES:,} bytes by part, bits a weight by layer; {name}")


# ------------------------------------------------------------------------------------------------
# Record folder: exactly the files that a submission may hold, made whole or not at all
# ------------------------------------------------------------------------------------------------

SUBMISSION, README, PACKED = Path("submission.json"), Path("README.md"), Path("packed/train_gpt.py")
KEPT_SECTIONS = ("how it works", "what each part buys", "why it is legal", "credits")


def kept_sections(path: Path) -> list[str]:
    """Sections of the project's README that explain the system, without pictures."""
    text, found = console.read_file(path).decode("utf-8", "replace"), []
    for part in re.split(r"(?m)^(?=## )", text)[1:]:
        title, *lines = part.rstrip().split("\n")
        if any(words in title.lower() for words in KEPT_SECTIONS):
            found += ["", title, *(line for line in lines if not line.startswith("!["))]
    if not any(line.startswith("## ") and "credits" in line.lower() for line in found):
        raise Failure(f"{path}: no section with credits in its title; a record folder needs one")
    return found


def folder_readme(case: Case, verdicts: list[Verdict], found: dict, names: list[str]) -> str:
    """The README of a record folder; a non-record submission says so in its first line."""
    non_record = [f"**Non-record submission.** {found['blurb']}", ""]
    rules, commands = "\n".join(f"* {v}" for v in verdicts), ["    pip install -r requirements.txt"]
    for seed, log in zip(found["seeds"], case.logs):
        rules = rules.replace(log.path.name, f"train_seed{seed}.log")
        chosen = {k: v for e in log.all("config") for k, v in e.values.items() if k[0] == "*"}
        settings = " ".join(f"{k[1:].upper()}={shlex.quote(v)}" for k, v in chosen.items())
        world = log.last("run").number("world")
        start = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
        commands.append(f"    {settings} {start} train_gpt.py")
    return "\n".join([
        *(non_record if found["track"] == "non_record" else []),
        f"# {found['name']}: {found['val_bpb']:.5f} bits per byte", "",
        f"{found['technique_summary']}.", "", "## Results", "", result_block(found), "",
        "## Rules", "", rules, "", NOT_IN_LOGS, "",
        "## Reproducing", "", *commands, "",
        "## Files", "", *(f"* `{name}`" for name in names), *kept_sections(README)]) + "\n"


def record(case: Case, verdicts: list[Verdict], found: dict, summary: bytes) -> dict[str, bytes]:
    """The record folder's files by name; raises Failure if one cannot be made."""
    if case.code is None:
        raise Failure(f"{case.packed} is not here; a record folder needs it, pack.py makes it")
    files = {"submission.json": summary, "train_gpt.py": case.code,
             "requirements.txt": console.read_file(Path("requirements.txt")),
             **{f"train_seed{seed}.log": log.data for seed, log in zip(found["seeds"], case.logs)}}
    licence = read_optional(Path("LICENSE"))
    files |= {} if licence is None else {"LICENSE": licence}
    readme = folder_readme(case, verdicts, found, sorted([*files, "README.md"]))
    return {"README.md": readme.encode("utf-8", "backslashreplace"), **files}


def make_folder(path: Path, files: dict[str, bytes]):
    """Make the folder at `path` with these files, or raise Failure and leave nothing."""
    half = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        half.mkdir(parents=True)
        for name, data in files.items():
            (half / name).write_bytes(data)
        half.rename(path)
    except OSError as error:
        shutil.rmtree(half, ignore_errors=True)
        raise Failure(f"{path}: cannot be made ({error.strerror})") from None


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

PICTURES = {Path("logs/curve.svg"): draw_losses, Path("logs/bytes.svg"): draw_bytes}


def common_parser(prog: str, description: str) -> console.Parser:
    """A parser with the arguments that experiments/public_logs.py has too."""
    parser = console.Parser(prog=prog, description=description)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="logs, one a seed, in any order")
    add("--baseline", nargs="+", metavar="BPB", help="scores to compare with, one a seed, or "
        f"{', '.join(PRESETS)}, or none")
    add("--baseline-data", metavar="NAME", type=console.utf8, default=LEADERBOARD,
        help="dataset of the baseline's scores (%(default)s)")
    add("--packed", type=Path, help=f"the submitted program ({PACKED})")
    return parser


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; raises Failure."""
    parser = common_parser("submit.py", __doc__)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--name", type=console.utf8, help="name of the submission")
    add("--author", type=console.utf8, help="author, as submission.json shows it")
    add("--github-id", type=console.utf8, help="the author's GitHub name")
    either("--folder", metavar="NAME", type=Path, help="make the record folder YYYY-MM-DD_NAME")
    either("--check", action="store_true", help="write nothing; fail if a file is out of date")
    add("--no-plots", action="store_true", help="leave pictures alone")
    args = parser.parse_args(argv)
    if args.folder and not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", args.folder.name):
        parser.error(f"--folder {args.folder}: letters, digits, _ and - only")
    return args


def read_case(args: argparse.Namespace, read: Callable[[Path], Log], packed: Path) -> Case:
    """Read all logs by `read`, and the program --packed, or else `packed`; raises Failure."""
    logs = [read(path) for path in args.logs]
    logs.sort(key=lambda log: (log.settings.values.get("seed", "").zfill(20), log.path.name))
    code = console.read_file(args.packed) if args.packed else read_optional(packed)
    return Case(logs, args.packed or packed, code)


def parse_baseline(args: argparse.Namespace) -> dict | None:
    """The baseline of the command line, as submission.json shows it; raises Failure."""
    first, *more = args.baseline or ["none"]
    if first == "none" and not more:
        return None
    if first in PRESETS and not more:
        return dict(baseline=first, baseline_data=LEADERBOARD, baseline_val_bpb=PRESETS[first])
    where = f"--baseline, which takes scores or one of {', '.join(PRESETS)}, after the logs"
    return dict(baseline="baseline", baseline_data=args.baseline_data,
                baseline_val_bpb=[number(text, where) for text in args.baseline])


def read_given(args: argparse.Namespace) -> tuple[dict[str, str], dict | None]:
    """Author, github_id, name and the baseline: arguments, or else from submission.json."""
    before = console.load_json(read_optional(SUBMISSION) or b"{}", SUBMISSION)
    try:
        given = {key: console.utf8(str(before.get(key, default))) for key, default in
                 dict(author="", github_id="", name="parameter golf, done right").items()}
        if baseline := before.get("comparison"):
            first, *more = baseline["baseline_val_bpb"]
            baseline = dict(
                {key: console.utf8(str(baseline[key])) for key in ("baseline", "baseline_data")},
                baseline_val_bpb=[number(str(score), SUBMISSION) for score in [first, *more]])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Failure(f"{SUBMISSION}: not as submit.py writes it; remove it") from None
    given |= {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    return given, parse_baseline(args) if args.baseline else baseline


def report(case: Case, verdicts: list[Verdict]) -> int:
    """Print all verdicts, their count and the score; return 1 if a rule fails."""
    print(*verdicts, "", sep="\n")
    counts = {state: sum(v.state == state for v in verdicts) for state in (PASS, FAIL, NOT_DECIDED)}
    print(f"{len(verdicts)} rules: {', '.join(f'{n} {state}' for state, n in counts.items())}")
    print(NOT_IN_LOGS)
    try:
        found = [log.headline.number("val_bpb") for log in case.logs]
        print(f"{mean_std(found, 5)} bits per byte over {len(found)} logs.")
    except Undecided as reason:
        print(f"No score: {reason}.")
    return int(counts[FAIL] > 0)


def run(args: argparse.Namespace) -> int:
    """Do the work of the command line; return the exit code."""
    case = read_case(args, read_log, PACKED)
    given, baseline = read_given(args)
    verdicts = judge(case)
    failed = report(case, verdicts)
    try:
        found = submission(case, verdicts, given)
        found |= dict(comparison=comparison(case.logs, baseline)) if baseline else {}
        files = {SUBMISSION: (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()}
        if (readme := read_optional(README)) is not None:
            files[README] = with_block(README, readme, result_block(found))
        for path, panel in PICTURES.items() if not args.no_plots else ():
            files[path] = draw(panel, case.logs)
    except Undecided as reason:
        print(f"nothing {'compared' if args.check else 'written'}: {reason}")
        return 1
    print(found["blurb"], *(comparison_lines(found["comparison"]) if baseline else []), sep="\n")
    if args.check:
        stale = [str(path) for path, wanted in files.items() if read_optional(path) != wanted]
        print(f"missing or out of date: {', '.join(stale)}" if stale else "all up to date")
        return max(failed, bool(stale))
    folder = args.folder and args.folder.with_name(f"{found['date'][:10]}_{args.folder.name}")
    if folder and os.path.lexists(folder):
        raise Failure(f"{folder} exists; remove it or choose another name")
    contents = folder and not failed and record(case, verdicts, found, files[SUBMISSION])
    for path, data in files.items():
        console.write_atomic(path, [data])
    print(f"wrote {', '.join(map(str, files))}")
    if contents:
        make_folder(folder, contents)
    if folder:
        print(f"made {folder}" if contents else f"no {folder}: a rule fails")
    return failed


def main(argv: list[str] | None = None) -> int:
    """Run; 0 fine, 1 a rule fails or a file is out of date, 2 bad input."""
    return console.run("submit", lambda: run(arguments(argv)), ImportError)


if __name__ == "__main__":
    sys.exit(main())
