#!/usr/bin/env python3
"""Judge runs by their logs, and write what a submission says about them: numbers, table, pictures.

    python submit.py logs/*.txt                    verdicts; submission.json, README table, pictures
    python submit.py logs/*.txt --check            write nothing; fail if one of these is stale
    python submit.py logs/*.txt --baseline pr1493  how the result stands against another one
    python submit.py logs/*.txt --folder MyRun     also make the record folder YYYY-MM-DD_MyRun

One log is one seed.  A verdict is PASS, FAIL or NOT DECIDED (the logs cannot tell), with the value
found and the rule's source.  Logs in the public format of the challenge's entries get verdicts too,
but nothing is written from them.  Exit code: 0 fine, 1 a rule fails or a file is out of date, 2 bad
input.  Every number that is written comes from the logs.

Sections: Logs, Public logs, Rules, Significance, Numbers, Pictures, Record folder, Command line.
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple


class SubmitError(Exception):
    """Bad input, told in one line; exit code 2."""


class Undecided(Exception):
    """The logs do not hold what a verdict or a number needs; the message says what is missing."""


class Broken(Exception):
    """A rule does not hold; the message has the value found."""


def require(holds: object, otherwise: str) -> None:
    """Raise Broken, with the sentence `otherwise`, unless `holds` is true."""
    if not holds:
        raise Broken(otherwise)


# ------------------------------------------------------------------------------------------------
# Logs: one event a line, `event key=value ...`, and a block of results at the end
# ------------------------------------------------------------------------------------------------

PAIR = re.compile(r'(\*?\w+)=("(?:[^"\\]|\\.)*"|[^\s"]+)')
LINE = re.compile(rf"(\w+)((?: {PAIR.pattern})+)")
RESULT = re.compile(r"([\w-]+): +(\S+)")
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
LARGEST = 1e15              # no figure of a run comes near; beyond it a line is damaged

# What an event must have to be believed; # marks a number, / a count of a total (3/20).
FIELDS = {
    "run": "torch device world# code_bytes# code_sha256 started",
    "packed": "code_bytes# code_sha256",
    "config": "group",
    "data": "split files# tokens# sha256",
    "group": "name params#",
    "step": "n/ train_loss# step_ms# elapsed_s#",
    "loop_on": "n# frac#",
    "train_end": "steps# elapsed_s# seen_tokens# reason",
    "data_closed": "elapsed_s#",
    "matrix": "name bits# mse# entropy_bytes#",
    "artifact": "file model_bytes# code_bytes# total_bytes# sha256",
    "validation": "targets# target_bytes#",
    "eval": "name val_loss# val_bpb# targets# bytes# seconds# clock_s#",
    "ledger": "name targets# scored_min# scored_max#",
    "score": "chunk/ first# last# bpb#",
    "update": "chunk/ first# last#",
    "result": "val_bpb# val_loss# score train_seconds# data_seconds# eval_seconds# steps# seed#",
}


def number(text: str) -> int | float:
    """Return the number that `text` spells; raises ValueError for anything else."""
    if not NUMBER.fullmatch(text) or not float(text) < LARGEST:
        raise ValueError(f"{text[:40]} is not a number of a run")
    return int(text) if text.isdigit() else float(text)


def count_of(text: str) -> tuple[int, int]:
    """Return both numbers of `3/20`; raises ValueError."""
    part, _, whole = text.partition("/")
    return int(number(part)), int(number(whole))


class Event(NamedTuple):
    """One line of a log; values are text."""
    name: str
    values: dict[str, str]
    line: int

    def text(self, key: str) -> str:
        """Return a value as written; raises Undecided if there is none."""
        if key not in self.values:
            raise Undecided(f"no {key} in the {self.name} line")
        return self.values[key]

    def number(self, key: str) -> int | float:
        """Return a value as a number; raises Undecided if there is none."""
        try:
            return number(self.text(key))
        except ValueError as error:
            raise SubmitError(f"line {self.line}, {self.name}: {key}: {error}") from None

    def integers(self, *keys: str) -> tuple[int, ...]:
        """Return several values as whole numbers."""
        return tuple(int(self.number(key)) for key in keys)

    def check(self) -> None:
        """Raise ValueError unless all that this event must have is there and well spelled."""
        for field in FIELDS.get(self.name, "").split():
            key = field.rstrip("#/")
            if key not in self.values:
                raise ValueError(f"{self.name} without {key}")
            if field != key:
                (number if field[-1] == "#" else count_of)(self.values[key])


@dataclass(frozen=True)
class Log:
    """What one log tells of one seed's run; `public` marks the format of public entries."""
    path: Path
    data: bytes
    events: tuple[Event, ...]
    public: bool = False

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.name

    def all(self, *names: str, **values: str) -> list[Event]:
        """Return the events of these names whose values include `values`, in order."""
        return [e for e in self.events if e.name in names and values.items() <= e.values.items()]

    def last(self, event: str, /, **values: str) -> Event:
        """Return the last such event; raises Undecided if there is none."""
        found = self.all(event, **values)
        if not found:
            raise Undecided(f"{self.name} has no {' '.join([event, *values.values()])} line")
        return found[-1]

    @cached_property
    def sessions(self) -> list[dict[str, str]]:
        """Settings of each process that wrote to this log: one, or one a stage."""
        starts = [e.line for e in self.all("run")]
        found = [{} for _ in starts]
        for event in self.all("config"):
            values = {k.lstrip("*"): v for k, v in event.values.items() if k != "group"}
            found[sum(line <= event.line for line in starts) - 1].update(values)
        return found

    @property
    def settings(self) -> dict[str, str]:
        """Settings of the last process."""
        return self.sessions[-1] if self.sessions else {}

    def setting(self, name: str) -> str:
        """Return one setting; raises Undecided if the log does not list it."""
        if name not in self.settings:
            raise Undecided(f"{self.name} lists no setting {name}")
        return self.settings[name]

    @property
    def seed(self) -> int:
        """The seed, a whole number."""
        text = self.setting("seed")
        if not re.fullmatch(r"[0-9]{1,15}", text):
            raise SubmitError(f"{self.path}: the seed {text[:40]} is not a whole number")
        return int(text)

    @property
    def dataset(self) -> str:
        """Name of the folder of shards."""
        return self.setting("dataset")

    @property
    def headline(self) -> Event:
        """The pass over the validation text whose score counts."""
        if self.public:
            return self.scored_passes[-1]
        return self.last("eval", name=self.last("result").text("score"))

    @property
    def scored_passes(self) -> list[Event]:
        """Passes of the quantized model, which the evaluation clock times."""
        found = [e for e in self.all("eval") if e.values["name"] not in DIAGNOSTIC]
        if not found:
            raise Undecided(f"{self.name} has no score of the quantized model")
        return found

    def limit(self, setting: str) -> float:
        """Return the seconds that a clock may show: the challenge's, or the run's own if fewer."""
        try:
            own = float(number(self.settings.get(setting, "0")))
        except ValueError as error:
            raise SubmitError(f"{self.path}: {setting}: {error}") from None
        return min(LIMIT_SECONDS, own or LIMIT_SECONDS)


DIAGNOSTIC = ("raw", "ema")         # passes of weights that are not submitted
LIMIT_SECONDS, LIMIT_BYTES = 600.0, 16_000_000


def read_log(path: Path) -> Log:
    """Return the log at `path`, of either format; raises SubmitError naming the file and line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise SubmitError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise SubmitError(f"{path}: not a text in UTF-8") from None
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if re.match(r"run \w+=", text):
        return Log(path, data, tuple(parse_lines(path, lines)))
    return Log(path, data, tuple(translate(path, lines)), public=True)


def parse_lines(path: Path, lines: list[str]) -> list[Event]:
    """Return the events of a log of train_gpt.py; raises SubmitError at the first damaged line."""
    events = []
    for at, line in enumerate(lines, 1):
        try:
            if pair := RESULT.fullmatch(line):
                if not events or events[-1].name != "result":
                    events.append(Event("result", {}, at))
                events[-1].values[pair[1]] = pair[2]
            elif line != "---" and line[:2] != "# " and (line or at < len(lines)):
                events.append(parse_line(line, at))
        except ValueError as error:
            raise SubmitError(f"{path}, line {at}: {error}") from None
    check_events(path, events)
    return events


def parse_line(line: str, at: int) -> Event:
    """Return the event on one line; raises ValueError if it is none."""
    match = LINE.fullmatch(line)
    if not match:
        raise ValueError(f"not a line of a log: {line[:40]!r}")
    pairs = [(k, json.loads(v) if v[0] == '"' else v) for k, v in PAIR.findall(match[2])]
    if not all(v.isprintable() for _, v in pairs) or len(dict(pairs)) < len(pairs):
        raise ValueError("control characters, or a key twice")
    return Event(match[1], dict(pairs), at)


def check_events(path: Path, events: list[Event]) -> None:
    """Raise SubmitError at the first event that lacks something or spells it wrong."""
    for event in events:
        try:
            event.check()
            started = event.values.get("started", "2000-01-01T")
            if event.name == "run" and not re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T", started):
                raise ValueError(f"started={started[:40]} is not a date and time")
        except ValueError as error:
            raise SubmitError(f"{path}, line {event.line}: {error}") from None


# ------------------------------------------------------------------------------------------------
# Public logs: the lines that the challenge's entries print, told as the same events
# ------------------------------------------------------------------------------------------------
# Spellings of #1493 (quantized+brotli), #1060 (int6+lzma) and the baseline (int8+zlib).

N, F = r"[0-9]+", r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
METHOD = r"(?:quantized|int6|int8)\+\w+"
SCORES = (rf" val_loss: ?(?P<val_loss>{F}) val_bpb: ?(?P<val_bpb>{F})"
          rf"(?: eval_time: ?(?P<seconds_ms>{F})ms)?")
PASSES = {
    "pre-quantization post-ema": "ema",
    "quantized": "quantized",
    "quantized_sliding_window": "sliding",
    "quantized_ttt": "ttt",
    "final_int6_roundtrip_exact": "quantized",
    "final_int6_sliding_window_exact": "sliding",
    "final_int8_zlib_roundtrip_exact": "quantized",
}
# Pattern, event, values beside the named groups.  A group ending in _ms or _min becomes seconds.
PUBLIC = [(re.compile(pattern), name, values) for pattern, name, values in (
    (r"code_sha256: ?(?P<code_sha256>[0-9a-f]{64})", "run", {}),
    (rf"Code size: (?P<code_bytes>{N}) bytes", "run", {}),
    (r"Running PyTorch (?P<torch>\S+)", "run", {}),
    (r".*(?P<device>NVIDIA [A-Z]+[0-9]+\w*(?: [\w-]+)*).*", "run", {}),
    (rf"train_shards: ?(?P<files>{N})", "data", dict(split="train")),
    (rf"val_tokens: ?(?P<targets>{N})", "validation", {}),
    (rf"(?:step:)?(?P<n>{N}/{N}) train_loss: ?(?P<train_loss>{F}) "
     rf"train_time: ?(?:(?P<elapsed_s_ms>{F})ms|(?P<elapsed_s_min>{F})m) .*", "step", {}),
    (rf"layer_loop:enabled step:(?P<n>{N}) frac:(?P<frac>{F}) .*", "loop_on", {}),
    (rf"stopping_early: wallclock_cap train_time: ?(?P<elapsed_s_ms>{F})ms "
     rf"step: ?(?P<steps>{N})/{N}", "train_end", {}),
    (rf"GPTQ:collected (?P<count>{N}) Hessians in (?P<seconds>{F})s", "hessians", {}),
    (rf"Serialized model {METHOD}: (?P<model_bytes>{N}) bytes", "artifact", {}),
    (rf"Total submission size {METHOD}: (?P<total_bytes>{N}) bytes", "artifact", {}),
    *((re.escape(prefix) + SCORES, "eval", dict(name=name)) for prefix, name in PASSES.items()),
)]
TO_SECONDS = {"ms": 1e-3, "min": 60.0}


def translate(path: Path, lines: list[str]) -> list[Event]:
    """Return the events of a public log; raises SubmitError if it is none or damaged."""
    found = []
    for at, line in enumerate(lines, 1):
        try:
            found += translate_line(line.rstrip(), at)
        except ValueError as error:
            raise SubmitError(f"{path}, line {at}: {error}") from None
    if not any(e.name == "eval" for e in found):
        raise SubmitError(f"{path}: neither a log of train_gpt.py nor a public one with scores")
    settings = read_dump(lines)
    run, artifact = merge(found, "run"), merge(found, "artifact")
    if NUMBER.fullmatch(settings.get("world_size", "")):
        run.values["world"] = settings["world_size"]
    artifact.values.update({k: v for k, v in run.values.items() if k == "code_bytes"})
    events = [e for e in found if e.name not in ("run", "artifact")]
    complete(events)
    return [run, Event("config", settings, run.line), *events, artifact]


def translate_line(line: str, at: int) -> list[Event]:
    """Return the event that a public line tells of, if any; raises ValueError if damaged."""
    for pattern, name, fixed in PUBLIC:
        match = pattern.fullmatch(line)
        if match:
            found = {k: v for k, v in match.groupdict().items() if v is not None}
            return [Event(name, dict([*fixed.items(), *map(in_seconds, found.items())]), at)]
    return []


def in_seconds(item: tuple[str, str]) -> tuple[str, str]:
    """Return a (key, value) with times in seconds, their unit gone from the key."""
    key, value = item
    for part in value.split("/"):
        if NUMBER.fullmatch(part):
            number(part)
    name, _, unit = key.rpartition("_")
    return (name, str(number(value) * TO_SECONDS[unit])) if unit in TO_SECONDS else item


def read_dump(lines: list[str]) -> dict[str, str]:
    """Return the settings that a public log lists first: unbroken lines of `  key: value`."""
    settings = {}
    for line in lines:
        match = re.fullmatch(r"  (\w+): (.*?)\s*", line)
        if match:
            settings[match[1]] = match[2]
        elif len(settings) > 1:
            break
    names = re.findall(r"fineweb10B_\w+", " ".join(settings.values()))
    if names:
        settings["dataset"] = names[0]
    for key in ("train_seq_len", "eval_seq_len"):
        settings["seq_len"] = settings.get(key, settings.get("seq_len", ""))
    return settings


def merge(events: list[Event], name: str) -> Event:
    """Return one event with the values of all events of this name, the first of each key."""
    parts = [e for e in events if e.name == name]
    values = {k: v for e in reversed(parts) for k, v in e.values.items()}
    return Event(name, values, parts[-1].line if parts else 0)


def complete(events: list[Event]) -> None:
    """Give public events what follows from others: targets of a pass, and the clocks' readings."""
    last = {e.name: e for e in events}
    if "train_end" in last and "hessians" in last:
        spent = last["train_end"].number("elapsed_s") + last["hessians"].number("seconds")
        events.append(Event("data_closed", dict(elapsed_s=str(spent)), last["hessians"].line))
    clock = 0.0
    for event in (e for e in events if e.name == "eval"):
        if "validation" in last:
            event.values["targets"] = last["validation"].text("targets")
        if event.values["name"] not in DIAGNOSTIC:
            clock += event.number("seconds") if "seconds" in event.values else math.nan
            event.values.update({} if math.isnan(clock) else dict(clock_s=str(clock)))


# ------------------------------------------------------------------------------------------------
# Rules: a table of claims, each with its source and the function that decides it
# ------------------------------------------------------------------------------------------------
# A function returns the sentence of a PASS, or raises Broken (FAIL) or Undecided with its sentence.

class Case(NamedTuple):
    """What is judged: logs in order of their seeds, and the file that is submitted, if at hand."""
    logs: list[Log]
    packed: Path
    code: bytes | None

    @property
    def public(self) -> bool:
        """Whether any log is of the public format."""
        return any(log.public for log in self.logs)


WANTED = ("config", "data", "step", "train_end", "artifact", "validation", "eval", "data_closed")
WANTED_OURS = ("run", *WANTED, "model", "matrix", "ledger", "result")
FREE = ("seed", "run_id", "logfile", "stages", "resume")        # may differ from log to log
CANONICAL = {       # (dataset, context): targets and bytes of text of the whole validation set
    ("fineweb10B_sp8192", "2048"): (40_540_160, 151_078_222),
    ("fineweb10B_sp1024", "2048"): (62_021_632, 151_080_363),
    ("openmix_sp8192", "2048"): (1_048_576, 3_889_821),
}
FINEWEB_BYTES = 151_080_000     # of any lossless tokenizer, give or take a cut-off tail
LEAST_SEEDS = 3
STOP_SLACK = 0.1                # seconds: the step under way when the clock runs out
SUM_SLACK = 1e-4                # relative: figures of six digits that must add up


def log_complete(case: Case) -> str:
    """Every log holds each kind of line, and ours ends with the final block."""
    for log in case.logs:
        wanted = WANTED if log.public else WANTED_OURS
        missing = [name for name in wanted if not any(e.values for e in log.all(name))]
        require(not missing, f"{log.name} has no {', '.join(missing)} line")
        ends = log.public or log.events[-1].name == "result"
        require(ends, f"{log.name} does not end with the final block")
    return f"{len(case.logs)} logs hold every kind of line from the settings to the final score"


def same_code(case: Case) -> str:
    """All logs name one program by size and hash."""
    runs = [e for log in case.logs for e in log.all("run")]
    sizes = sorted({int(e.number("code_bytes")) for e in runs})
    require(len(sizes) == 1, f"programs of {listed(sizes)} bytes")
    hashes = sorted({e.text("code_sha256") for e in runs})
    require(len(hashes) == 1, f"{len(hashes)} programs, sha256 {', '.join(h[:12] for h in hashes)}")
    return f"{sizes[0]:,} bytes, sha256 {hashes[0][:12]} in every log"


def shipped_code(case: Case) -> str:
    """The program in the logs is the file that is submitted."""
    if case.code is None:
        raise Undecided("--packed must name it" if case.public else f"{case.packed} is not here")
    for log in case.logs:
        if log.all("packed"):
            raise Broken(f"{log.name} is of the readable program; run {case.packed}")
        for run in log.all("run"):
            size = run.number("code_bytes")
            require(size == len(case.code),
                    f"{log.name} ran {size:,} bytes, {case.packed} has {len(case.code):,}")
            same = run.text("code_sha256") == hashlib.sha256(case.code).hexdigest()
            require(same, f"{log.name} ran another program than {case.packed}; run that one")
    return f"{case.packed}, {len(case.code):,} bytes, is what ran"


def same_settings(case: Case) -> str:
    """All processes of all logs ran with the same settings, but for the seed and names."""
    sessions = [s for log in case.logs for s in log.sessions]
    if not all(sessions):
        raise Undecided("a log lists no settings")
    names = sorted({name for s in sessions for name in s} - set(FREE))
    for name in names:
        found = sorted({s.get(name, "(not listed)") for s in sessions})
        require(len(found) == 1, f"{name} is {' and '.join(found)[:80]}")
    return f"{len(names)} settings agree in all logs"


def three_seeds(case: Case) -> str:
    """There are three seeds or more, each once."""
    seeds = [log.seed for log in case.logs]
    for log in case.logs:
        own = {s.get("seed") for s in log.sessions}
        require(len(own) == 1, f"{log.name} mixes {len(own)} seeds")
    require(len(set(seeds)) == len(seeds), f"a seed comes twice in {listed(seeds)}")
    models = {last_text(log, "artifact", "sha256") or log.name for log in case.logs}
    require(len(models) == len(seeds), f"{len(models)} artifacts of seeds {listed(seeds)}")
    require(len(seeds) >= LEAST_SEEDS, f"{len(seeds)} of {LEAST_SEEDS} seeds: {listed(seeds)}")
    return f"seeds {listed(seeds)}"


def same_data(case: Case) -> str:
    """All logs read the same shards."""
    for split in ("train", "val"):
        events = [e for log in case.logs for e in log.all("data", split=split)]
        files = sorted({int(e.number("files")) for e in events})
        require(len(files) < 2, f"{listed(files)} {split} shards")
        found = {e.text("sha256") for e in events}
        require(len(found) < 2, f"{len(found)} sets of {split} shards")
    files = case.logs[0].last("data", split="train").number("files")
    return f"{case.logs[0].dataset}, train shards: {files}"


def hardware_named(case: Case) -> str:
    """Every process names its devices, the same everywhere."""
    names = sorted({machine(e) for log in case.logs for e in log.all("run")})
    require(len(names) == 1, f"runs of {' and '.join(names)}")
    ours = on_challenge_hardware(case.logs[0])
    return f"{names[0]}, {'' if ours else 'not '}the challenge's 8 x H100"


def machine(run: Event) -> str:
    """Return `8 x NVIDIA H100 80GB HBM3`."""
    return f"{run.number('world')} x {run.text('device')}"


def on_challenge_hardware(log: Log) -> bool:
    """Tell whether a log is of 8 x H100."""
    run = log.last("run")
    return run.number("world") == 8 and "H100" in run.text("device")


def within(case: Case, readings: list[float], setting: str, what: str, slack: float = 0.0) -> str:
    """Hold one clock's reading in every log to the limit; `setting` names the run's own limit."""
    found = [(spent - log.limit(setting), spent, log) for spent, log in zip(readings, case.logs)]
    over, worst, log = max(found, key=lambda item: item[0])
    sentence = f"{worst:g} s of {log.limit(setting):g} s in {log.name}"
    require(over <= slack, f"{what} took {sentence}")
    return f"{what} took at most {sentence}"


def train_clock(case: Case) -> str:
    """Training ends within its budget."""
    readings = [log.last("train_end").number("elapsed_s") for log in case.logs]
    return within(case, readings, "max_wallclock_seconds", "training", STOP_SLACK)


def data_clock(case: Case) -> str:
    """Training data, calibration included, is closed within the budget and stays closed."""
    for log in case.logs:
        closed = log.last("data_closed").line
        late = [e for e in log.all("data", split="train") if e.line > closed]
        require(not late, f"{log.name} opens training data after closing it")
    readings = [log.last("data_closed").number("elapsed_s") for log in case.logs]
    return within(case, readings, "max_wallclock_seconds", "training and calibration")


def eval_clock(case: Case) -> str:
    """All scoring passes together stay within the budget."""
    readings = [log.scored_passes[-1].number("clock_s") for log in case.logs]
    return within(case, readings, "eval_wallclock_seconds", "scoring")


def scored_once(case: Case) -> str:
    """Each pass scores each target once, runs once, and the last one is the headline."""
    for log in case.logs:
        passes = log.all("eval")
        names = [e.text("name") for e in passes]
        require(len(set(names)) == len(names), f"{log.name} scores {names} more than once")
        require(log.headline == passes[-1], f"the score of {log.name} is not of its last pass")
        for event in passes:
            check_pass(log, event)
    targets = log.last("validation").number("targets")
    return f"each pass scores its {targets:,} targets exactly once"


def check_pass(log: Log, event: Event) -> None:
    """Hold the targets and bytes of one pass, and its ledger, to those of the validation data."""
    name, validation = event.text("name"), log.last("validation")
    targets, ledger = validation.number("targets"), log.last("ledger", name=name)
    counts = ledger.integers("targets", "scored_min", "scored_max")
    require(counts == (targets, 1, 1) and event.number("targets") == targets,
            f"{log.name}, {name}: {counts[0]:,} of {targets:,} targets, "
            f"scored {counts[1]} to {counts[2]} times")
    size, whole = event.number("bytes"), validation.number("target_bytes")
    require(size == whole, f"{log.name}, {name}: {size:,} of {whole:,} bytes of text")


def text_bytes(log: Log, event: Event) -> float:
    """Return the bytes of text of a pass: as logged, or as a public log's score implies."""
    if not log.public:
        return event.number("bytes")
    loss, bpb, targets = (event.number(k) for k in ("val_loss", "val_bpb", "targets"))
    if not bpb:
        raise Undecided(f"{log.name} has a score of 0")
    return loss / math.log(2) * targets / bpb


def totals(case: Case) -> str:
    """Targets and bytes are those of the whole validation set of the named data."""
    for log in case.logs:
        key = log.dataset, log.setting("seq_len")
        targets, size = log.headline.number("targets"), text_bytes(log, log.headline)
        found = f"{targets:,} targets, {size:,.0f} bytes"
        slack = size * tolerance(log.headline) if log.public else 0.0
        if key in CANONICAL:
            wanted = CANONICAL[key]
            exact = targets == wanted[0] and abs(size - wanted[1]) <= slack
            require(exact, f"{log.name} scores {found}; {key[0]} has {wanted[0]:,}, {wanted[1]:,}")
        elif not log.dataset.startswith("fineweb"):
            raise Undecided(f"{found}; no totals of {log.dataset} at context {key[1]} are known")
        require(key in CANONICAL or abs(size / FINEWEB_BYTES - 1) < 1e-3,
                f"{log.name} scores {found}; FineWeb's text has about {FINEWEB_BYTES:,} bytes")
    return f"{found}: the whole validation set of {log.dataset}"


def tolerance(event: Event) -> float:
    """Return how far, relatively, the printed digits of loss and bits per byte may mislead."""
    total = 0.0
    for key in ("val_loss", "val_bpb"):
        digits = len(event.text(key).partition(".")[2])
        total += 0.6 * 10.0 ** -digits / max(event.number(key), 1e-9)
    return total


def arithmetic(case: Case) -> str:
    """Bits per byte follow from loss, targets and bytes; tokens seen from steps and batch."""
    count = 0
    for log in case.logs:
        for event in log.all("eval"):
            whole = text_bytes(log, log.headline if log.public else event)
            require(whole > 0, f"{log.name}: {event.text('name')} scores no text")
            bpb = event.number("val_loss") / math.log(2) * event.number("targets") / whole
            slack = 2 * tolerance(event) if log.public else tolerance(event)
            require(abs(bpb - event.number("val_bpb")) <= slack * event.number("val_bpb"),
                    f"{log.name}, {event.text('name')}: val_bpb is {event.text('val_bpb')}, "
                    f"loss and counts give {bpb:.8f}")
            count += 1
        check_tokens(log)
    return f"{count} scores follow from loss, targets and bytes"


def check_tokens(log: Log) -> None:
    """Hold the tokens seen in training to steps times batch."""
    if log.public:
        return
    end = log.last("train_end")
    steps, seen = end.integers("steps", "seen_tokens")
    batch = log.setting("train_batch_tokens")
    require(NUMBER.fullmatch(batch) and seen == steps * float(batch),
            f"{log.name}: {seen:,} tokens seen are not {steps:,} steps of {batch[:40]}")


def score_first(case: Case) -> str:
    """Weights learn from a chunk only right after it has been scored, never from the last."""
    chunks = [walk_chunks(log) for log in case.logs]
    if not any(chunks):
        return "the weights are fixed while scoring: no update line"
    return f"{max(chunks)} chunks, each scored before the one update on it, none after the last"


def walk_chunks(log: Log) -> int:
    """Follow the score and update lines of a log and return the number of chunks."""
    if log.public:
        raise Undecided(f"the format of {log.name} does not say which tokens were learnt from when")
    at, count, fresh, lines = 0, 0, None, log.all("score", "update")
    for event in lines:
        span = event.integers("first", "last")
        where = f"{log.name}, line {event.line}: {event.name} of {span[0]}..{span[1]}"
        if event.name == "update":
            scored = "{}..{}".format(*fresh) if fresh else "no chunk"
            require(span == fresh, f"{where}, but {scored} has just been scored")
            fresh = None
        else:
            require(span[0] == at < span[1], f"{where}, but the next unscored target is {at}")
            at, count, fresh = span[1], count + 1, span
        require(count_of(event.text("chunk"))[0] == count, f"{where} is not chunk {count}")
    check_last_chunk(log, lines, count)
    return count


def check_last_chunk(log: Log, lines: list[Event], count: int) -> None:
    """Hold the end of the chunks to the targets, the score, and the rule against late updates."""
    if not lines:
        ttt = log.headline.text("name") == "ttt"
        require(not ttt, f"{log.name} has a ttt score but no score lines")
        return
    end, final = lines[-1], log.last("eval", name="ttt")
    require(end.name == "score", f"{log.name}, line {end.line}: an update after the last chunk")
    chunks = count_of(end.text("chunk"))[1]
    require(end.number("last") == final.number("targets") and chunks == count,
            f"{log.name}: {count} of {chunks} chunks, the last ends at {end.text('last')}")
    equal = abs(end.number("bpb") - final.number("val_bpb")) < 1e-7 and end.line < final.line
    require(equal, f"{log.name}: the chunks come to {end.text('bpb')} bits per byte, the ttt score "
            f"is {final.text('val_bpb')}")


def artifact_first(case: Case) -> str:
    """The artifact's hash is logged before validation data is opened; nothing is learnt after."""
    for log in case.logs:
        if log.public:
            raise Undecided(f"the format of {log.name} has no hash of the artifact")
        shown = [e.line for e in log.all("data", "validation", "eval") if is_validation(e)]
        if not shown:
            raise Undecided(f"{log.name} opens no validation data")
        opened = shown[0]
        before = [e.text("sha256") for e in log.all("artifact") if e.line < opened]
        require(before, f"{log.name} opens validation data before the artifact is frozen")
        late = [e for e in log.all(*LEARNING) if e.line > opened]
        require(not late, f"{log.name} has a {late[0].name if late else ''} line after that")
        frozen = log.last("artifact").text("sha256")
        require(frozen == before[-1], f"{log.name} makes a new artifact after that")
    return f"artifact {frozen[:12]} precedes line {opened} of {log.name}, and likewise in all"


def is_validation(event: Event) -> bool:
    """Tell whether a line shows that validation data is open."""
    return event.name != "data" or event.values.get("split") == "val"


LEARNING = ("step", "train_end", "checkpoint", "hessians", "compress", "matrix")


def warm_up_first(case: Case) -> str:
    """Graphs are compiled before validation data is opened."""
    for log in case.logs:
        if log.public:
            raise Undecided(f"the format of {log.name} does not tell which tokens warm up scoring")
        opened = log.last("validation").line
        late = [e for e in log.all("warm_up") if e.line > opened]
        require(not late, f"{log.name} warms up after opening validation data")
    return "no warm-up after validation data is opened"


def size_cap(case: Case) -> str:
    """Code and model of the worst seed stay within 16,000,000 bytes."""
    total, name = max((log.last("artifact").number("total_bytes"), log.name) for log in case.logs)
    require(total <= LIMIT_BYTES, f"{total:,} bytes of {LIMIT_BYTES:,} in {name}")
    return f"{total:,} bytes of {LIMIT_BYTES:,} in the largest, {name}"


def size_sum(case: Case) -> str:
    """The total counts the model and the very program that ran."""
    for log in case.logs:
        for event in log.all("artifact"):
            model, code, total = event.integers("model_bytes", "code_bytes", "total_bytes")
            ran = log.last("run").number("code_bytes")
            require(total == model + code and code == ran,
                    f"{log.name}: {total:,} bytes are not {model:,} of model and {ran:,} of code")
    return "model and code add up to the total in every log"


def artifact_file(case: Case) -> str:
    """Artifacts at hand have the size and hash of their logs."""
    absent = []
    for log in case.logs:
        event = log.last("artifact")
        path = Path(event.text("file"))
        data = read_regular(path, int(event.number("model_bytes")) + 1)
        if data is None:
            absent.append(str(path))
            continue
        size, digest = event.number("model_bytes"), event.text("sha256")
        require(len(data) == size, f"{path} is not of {size:,} bytes, as {log.name} says")
        same = hashlib.sha256(data).hexdigest() == digest
        require(same, f"{path} has another sha256 than {log.name} says")
    if absent:
        raise Undecided(f"{', '.join(absent)[:80]} not here")
    return f"{len(case.logs)} files have the size and sha256 of their logs"


def read_regular(path: Path, most: int) -> bytes | None:
    """Return up to `most` bytes of a regular file, or None if there is none."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return None


def block_matches(case: Case) -> str:
    """The final block repeats the lines that it sums up."""
    for log in case.logs:
        result = log.last("result")
        lines = dict(headline=log.headline, train_end=log.last("train_end"),
                     data_closed=log.last("data_closed"), artifact=log.last("artifact"))
        require(result.number("seed") == log.seed, f"{log.name}: seed is {result.text('seed')}")
        for key, (name, source) in REPEATED.items():
            value = lines[name].number(source)
            found = result.number(key) if key in result.values else value
            slack = SUM_SLACK if key.endswith("_seconds") else 0.0
            same = math.isclose(found, value, rel_tol=slack)
            require(same, f"{log.name}: {key} is {found}, its line says {value}")
    return "every figure of the final blocks is that of its line"


REPEATED = dict(
    val_bpb=("headline", "val_bpb"), val_loss=("headline", "val_loss"),
    eval_seconds=("headline", "clock_s"), train_seconds=("train_end", "elapsed_s"),
    steps=("train_end", "steps"), data_seconds=("data_closed", "elapsed_s"),
    artifact_bytes=("artifact", "total_bytes"), model_bytes=("artifact", "model_bytes"),
    code_bytes=("artifact", "code_bytes"))


def clocks_add_up(case: Case) -> str:
    """Clocks only run forward, and the scoring clock holds every pass of the submitted weights."""
    for log in case.logs:
        elapsed = [e.number("elapsed_s") for e in log.all("step", "train_end", "data_closed")]
        require(elapsed == sorted(elapsed), f"the training clock of {log.name} runs backwards")
        clock = 0.0
        for event in log.scored_passes:
            clock += event.number("seconds")
            reading = event.number("clock_s")
            require(reading >= clock * (1 - SUM_SLACK),
                    f"{log.name}: the clock reads {reading:g} s after {clock:g} s of scoring")
            clock = reading
    return "step and scoring times fit the clocks"


def absent(word: str) -> Callable[[Case], str]:
    """Return the rule that no setting with this word in its name is on."""
    def check(case: Case) -> str:
        """No such setting is on."""
        for log in case.logs:
            if not log.settings:
                raise Undecided(f"{log.name} lists no settings")
            on = [f"{k}={v}" for k, v in log.settings.items() if word in k and v.lower() not in OFF]
            require(not on, f"{log.name} has {', '.join(on)[:80]}")
        return f"no setting named {word} is on"
    return check


OFF = ("0", "0.0", "false", "none", "")


class Rule(NamedTuple):
    """A claim that logs can decide; `key` names it in submission.json."""
    key: str
    title: str
    source: str
    decide: Callable[[Case], str]


RULES = (
    Rule("log_complete", "logs are complete", "README 6; #1728, #2071, #2103", log_complete),
    Rule("same_code", "one program made all logs", "README 6; #86, #1493", same_code),
    Rule("shipped_code", "it is the file submitted", "README 1; #1835, #1855, #1858", shipped_code),
    Rule("same_settings", "settings differ in the seed only", "#1851, #1925, #2124", same_settings),
    Rule("three_seeds", "three seeds or more", "README 4; #1114, #1876", three_seeds),
    Rule("same_data", "the same data in all logs", "#86, #2127", same_data),
    Rule("hardware_named", "hardware is named", "README 2; #1728, #2103", hardware_named),
    Rule("train_under_600s", "training clock", "README 2; #1908", train_clock),
    Rule("data_under_600s", "training-data clock", "#677; #593, #634, #1868", data_clock),
    Rule("eval_under_600s", "evaluation clock", "README 3; #1858, #1972", eval_clock),
    Rule("clocks_add_up", "clocks add up", "#1858, #2135", clocks_add_up),
    Rule("scored_once", "every target scored once", "#1017 C4; #568, #846, #1060", scored_once),
    Rule("canonical_totals", "the whole validation set", "#1017 V; #1545, #1785, #2138", totals),
    Rule("arithmetic", "bits per byte are computed right", "README 5; #1017 V", arithmetic),
    Rule("score_first_ttt", "scored before learnt from", "#1017 C3; #136, #402, #672", score_first),
    Rule("no_pre_quant_ttt", "nothing learnt from validation", "#1376, #677, #728", artifact_first),
    Rule("warm_up_first", "warm-up sees no validation text", "#1530", warm_up_first),
    Rule("artifact_under_16mb", "largest artifact", "README 1; #1809, #1978", size_cap),
    Rule("bytes_add_up", "bytes add up", "#1776, #1835, #1858", size_sum),
    Rule("artifact_matches", "artifacts are those of the logs", "#1060, #1864", artifact_file),
    Rule("block_matches", "final block repeats its lines", "#86", block_matches),
    Rule("no_slot", "no SLOT", "#1240, #1336", absent("slot")),
    Rule("no_etlb", "no ETLB", "#1420", absent("etlb")),
    Rule("no_ngram_cache", "no n-gram cache", "#677, #779", absent("ngram")),
)
UNRECORDED = ("artifact_matches",)      # depends on files beside the logs that are not published
NOT_IN_LOGS = ("Not for logs to decide: causality, normalisation, byte table, disjoint documents, "
               "network; these are for tests of the code and the data.")
PASS, FAIL, NOT_DECIDED = "PASS", "FAIL", "NOT DECIDED"


class Verdict(NamedTuple):
    """What became of a rule: its state and one sentence with the value found."""
    rule: Rule
    state: str
    sentence: str

    @property
    def line(self) -> str:
        """The verdict as printed."""
        return f"{self.state:<12} {self.rule.title}: {self.sentence}  [{self.rule.source}]"


def judge(case: Case) -> list[Verdict]:
    """Return the verdict of every rule."""
    return [verdict(rule, case) for rule in RULES]


def verdict(rule: Rule, case: Case) -> Verdict:
    """Return the verdict of one rule."""
    try:
        return Verdict(rule, PASS, rule.decide(case))
    except Broken as reason:
        return Verdict(rule, FAIL, str(reason))
    except Undecided as reason:
        return Verdict(rule, NOT_DECIDED, str(reason))


def listed(values: list) -> str:
    """Return values as `1, 2 and 3`."""
    return " and ".join(filter(None, [", ".join(map(str, values[:-1])), *map(str, values[-1:])]))


# ------------------------------------------------------------------------------------------------
# Significance: Welch's test, one-sided, in bits per byte; the margin is given in nats per token
# ------------------------------------------------------------------------------------------------

MARGIN_NATS = 0.005         # a record must beat the one before by this much per token
LEADERBOARD = "fineweb10B_sp8192"
PRESETS = {                 # val_bpb a seed; one number: a published mean, tested as a constant
    "pr1060": (1.11183590, 1.11271417, 1.11212378),
    "pr1493": (1.08079352, 1.08103103, 1.08118408),
    "pr1855": (1.06108,),
    "pr1858": (1.08061893, 1.08103354, 1.08135172),
    "pr1876": (1.07907, 1.08075, 1.08043),
}
FRACTION_TERMS = 300


class Baseline(NamedTuple):
    """Scores of another system, one a seed, and the data they were measured on."""
    name: str
    data: str
    scores: tuple[float, ...]


class Test(NamedTuple):
    """A one-sided t-test: statistic, degrees of freedom, chance of it if there were no gain."""
    t: float
    df: float
    p: float


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), by its continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):                   # the fraction converges below this point
        return 1 - incomplete_beta(b, a, 1 - x)
    value = 1.0
    for m in range(FRACTION_TERMS, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1 + even / (1 + odd / value)
    value = 1 - (a + b) * x / (a + 1) / value
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / (a * value)


def student_tail(t: float, df: float) -> float:
    """Return the chance that Student's t with `df` degrees of freedom is above `t`."""
    half = 0.5 * incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return half if t > 0 else 1 - half


def compare(ours: list[float], theirs: tuple[float, ...], margin: float = 0.0) -> Test:
    """Test that our mean is below theirs by more than `margin`; one number is a constant."""
    if len(ours) < 2:
        raise Undecided("a test needs two seeds or more")
    gap = statistics.mean(ours) - statistics.mean(theirs) + margin
    parts = [(statistics.variance(s) / len(s), len(s) - 1) for s in (ours, theirs) if len(s) > 1]
    spread = sum(part for part, _ in parts)
    if not spread:
        sign = (gap > 0) - (gap < 0)
        return Test(sign * math.inf if sign else 0.0, 1.0, (1 + sign) / 2)
    df = 1 / sum((part / spread) ** 2 / n for part, n in parts)
    t = gap / math.sqrt(spread)
    return Test(t, df, student_tail(-t, df))


def margin_bpb(log: Log) -> float:
    """Return the margin of a record in bits per byte, by the tokens and bytes of a log's text."""
    size = text_bytes(log, log.headline)
    if not size:
        raise Undecided(f"{log.name} scores no text")
    return MARGIN_NATS / math.log(2) * log.headline.number("targets") / size


def check_comparable(baseline: Baseline, logs: list[Log]) -> None:
    """Raise SubmitError unless baseline and logs are of the same text."""
    for log in logs:
        both = log.dataset, baseline.data
        if len(set(both)) > 1 and not all(name.startswith("fineweb") for name in both):
            raise SubmitError(f"baseline {baseline.name} is of {baseline.data}, {log.name} of "
                              f"{log.dataset}: bits per byte of different text do not compare "
                              "(--baseline-data names the baseline's)")


def comparison(logs: list[Log], baseline: Baseline) -> dict:
    """Return what separates the logs from a baseline, as it stands in submission.json."""
    check_comparable(baseline, logs)
    ours, margin = scores(logs), margin_bpb(logs[0])
    delta = statistics.mean(ours) - statistics.mean(baseline.scores)
    found = dict(
        baseline=baseline.name, baseline_data=baseline.data, baseline_val_bpb=list(baseline.scores),
        delta_bpb=round(delta, 8), delta_nats_per_token=round(delta * MARGIN_NATS / margin, 8),
        margin_bpb=round(margin, 8), test="t-test against a constant, one-sided")
    if len(baseline.scores) > 1:
        found["test"] = "Welch t-test, one-sided"
    for name, shift in dict(plain=0.0, margin=margin).items():
        test = compare(ours, baseline.scores, shift)._asdict()
        found[name] = {k: round(v, 8) if math.isfinite(v) else None for k, v in test.items()}
    return found


def comparison_lines(found: dict) -> list[str]:
    """Return the lines that tell of a comparison."""
    theirs, nats = found["baseline_val_bpb"], found["delta_nats_per_token"]
    lines = [f"Against {found['baseline']} ({seeds_of(theirs)}, {statistics.mean(theirs):.5f} on "
             f"{found['baseline_data']}): {found['delta_bpb']:+.5f} bits per byte, "
             f"{nats:+.5f} nats per token."]
    margin = f"{MARGIN_NATS} nats per token = {found['margin_bpb']:.6f} bits per byte"
    for name, claim in dict(plain="better at all", margin=f"better by more than {margin}").items():
        test = found[name]
        t = "infinite" if test["t"] is None else f"{test['t']:.2f}"
        sure = "significant" if test["p"] < 0.01 else "not significant"
        lines.append(f"{found['test']}, {claim}: t = {t}, df = {test['df']:.2f}, "
                     f"p = {test['p']:.2g}: {sure} at 0.01.")
    return lines


def seeds_of(values: list) -> str:
    """Return `3 seeds`, or what a single number is."""
    return f"{len(values)} seeds" if len(values) > 1 else "a published mean"


# ------------------------------------------------------------------------------------------------
# Numbers: submission.json and the table of results, from the logs alone
# ------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ATTRIBUTION = dict(base_system="#1876, #1493", gptq_with_sdclip="#1394",
                   coprime_loader="#726, #1060", score_first_ttt="#549, #1413")


class Given(NamedTuple):
    """What a person says about a submission; kept in submission.json from call to call."""
    name: str
    author: str
    github_id: str
    baseline: Baseline | None


def scores(logs: list[Log]) -> list[float]:
    """Return the headline bits per byte of every log."""
    return [log.headline.number("val_bpb") for log in logs]


def deviation(values: list) -> float | None:
    """Return the sample standard deviation, or None of a single value."""
    return round(statistics.stdev(values), 8) if len(values) > 1 else None


def seed_numbers(log: Log) -> dict:
    """Return the figures of one seed."""
    headline, end, artifact = log.headline, log.last("train_end"), log.last("artifact")
    steps, closed = end.number("steps"), log.last("data_closed")
    return dict(
        val_loss=headline.number("val_loss"), val_bpb=headline.number("val_bpb"),
        artifact_bytes=artifact.number("total_bytes"), model_bytes=artifact.number("model_bytes"),
        steps=steps, step_avg_ms=round(1000 * end.number("elapsed_s") / max(steps, 1), 2),
        train_time_s=end.number("elapsed_s"), data_time_s=closed.number("elapsed_s"),
        eval_time_s=headline.number("clock_s"),
        stages_val_bpb={e.text("name"): e.number("val_bpb") for e in log.all("eval")},
        log_sha256=hashlib.sha256(log.data).hexdigest())


def on_challenge_data(log: Log) -> bool:
    """Tell whether a log is of the challenge's text."""
    return log.dataset.startswith("fineweb")


def track(case: Case) -> str:
    """Return the track that the logs belong to."""
    ours = all(on_challenge_data(log) and on_challenge_hardware(log) for log in case.logs)
    return "10min_16mb" if ours else "non_record"


def technique(log: Log) -> str:
    """Return what was run, in one line of a run's own settings."""
    s = log.setting
    parts = [f"{s('num_layers')} layers of width {s('model_dim')}, vocabulary {s('vocab_size')}"]
    if s("num_loops") != "0":
        parts.append(f"layers {s('loop_start')} to {s('loop_end')} run {s('num_loops')} times more")
    parts += [f"{s('loader')} loader", "Muon", f"int{s('matrix_bits')} GPTQ",
              f"int{s('embed_bits')} embedding"]
    if log.headline.text("name") == "ttt":
        parts.append(f"score-first test-time training, {s('ttt_epochs')} epochs a chunk")
    return ", ".join(parts)


def submission(case: Case, verdicts: list[Verdict], given: Given) -> dict:
    """Return the contents of submission.json; raises Undecided for what the logs lack."""
    logs = case.logs
    seeds = [log.seed for log in logs]
    if len(set(seeds)) < len(seeds):
        raise Undecided(f"a seed comes twice in {listed(seeds)}")
    numbers = [seed_numbers(log) for log in logs]
    head, run = logs[0], logs[0].last("run")
    states = {PASS: True, FAIL: False}
    found = dict(
        author=given.author, github_id=given.github_id, name=given.name, blurb=describe(case),
        date=max(log.last("run").text("started") for log in logs), track=track(case),
        **averages(numbers), seeds=seeds, seed_results=dict(zip(map(str, seeds), numbers)),
        bytes_code=run.number("code_bytes"), code_sha256=run.text("code_sha256"),
        dataset=head.dataset, hardware=machine(run), pytorch_version=run.text("torch"),
        python_version=run.values.get("python"), attention=last_text(head, "attention", "backend"),
        technique_summary=technique(head), attribution=ATTRIBUTION,
        compliance={v.rule.key: states.get(v.state) for v in verdicts
                    if v.rule.key not in UNRECORDED})
    if given.baseline:
        found["comparison"] = comparison(logs, given.baseline)
    return found


def last_text(log: Log, event: str, key: str) -> str | None:
    """Return a value of the last such event, or None."""
    found = log.all(event)
    return found[-1].values.get(key) if found else None


def averages(numbers: list[dict]) -> dict:
    """Return means, deviations and worst cases over seeds, under the names that others use."""
    column = {key: [n[key] for n in numbers] for key in numbers[0]}
    mean = {key: round(statistics.mean(values), 8) for key, values in column.items()
            if isinstance(values[0], (int, float))}
    before = [n["stages_val_bpb"].get("ema") for n in numbers]
    return dict(
        val_bpb=mean["val_bpb"], val_bpb_std=deviation(column["val_bpb"]),
        val_loss=mean["val_loss"], val_loss_std=deviation(column["val_loss"]),
        pre_quant_val_bpb=None if None in before else round(statistics.mean(before), 8),
        bytes_total=max(column["artifact_bytes"]), artifact_bytes_max=max(column["artifact_bytes"]),
        artifact_bytes_mean=round(mean["artifact_bytes"]),
        train_steps_mean=round(mean["steps"], 1), step_avg_ms_mean=round(mean["step_avg_ms"], 2),
        wallclock_seconds=max(column["train_time_s"]), eval_time_seconds=max(column["eval_time_s"]))


def describe(case: Case) -> str:
    """Say in one line what data and machine the logs are of, and what that means."""
    log = case.logs[0]
    seconds = f"{log.limit('max_wallclock_seconds'):g} s of training"
    line = f"{log.dataset}, {machine(log.last('run'))}, {seconds}."
    if not on_challenge_data(log):
        return f"{line} Not the challenge's text: no score on it compares with the leaderboard."
    return line if on_challenge_hardware(log) else f"{line} Not the challenge's hardware."


COLUMNS = {         # figure of a seed: heading and decimals
    "val_bpb": ("val_bpb", 5), "val_loss": ("val_loss", 5), "artifact_bytes": ("artifact bytes", 0),
    "steps": ("steps", 0), "train_time_s": ("train s", 1), "eval_time_s": ("eval s", 1),
}


def result_table(found: dict) -> list[str]:
    """Return the table of results of a submission.json: seeds, mean and deviation, baseline."""
    results = found["seed_results"]
    rows = [f"| seed | {' | '.join(heading for heading, _ in COLUMNS.values())} |",
            "|--:" * (1 + len(COLUMNS)) + "|"]
    for seed, figures in results.items():
        cells = [f"{figures[key]:,.{digits}f}" for key, (_, digits) in COLUMNS.items()]
        rows.append(f"| {seed} | {' | '.join(cells)} |")
    bpb, *rest = [mean_std([figures[key] for figures in results.values()], digits)
                  for key, (_, digits) in COLUMNS.items()]
    rows.append(f"| mean ± std | **{bpb}** | {' | '.join(rest)} |")
    if "comparison" in found:
        theirs, name = found["comparison"]["baseline_val_bpb"], found["comparison"]["baseline"]
        rows.append(f"| {name}, {seeds_of(theirs)} | {mean_std(theirs, 5)}" + " |" * len(COLUMNS))
    return rows


def mean_std(values: list, digits: int) -> str:
    """Return `mean ± std` with so many decimals, or a single value as it is."""
    text, around = f"{statistics.mean(values):,.{digits}f}", deviation(values)
    return text if around is None else f"{text} ± {around:,.{digits}f}"


def result_block(found: dict) -> str:
    """Return what stands between the markers of a README."""
    told = comparison_lines(found["comparison"]) if "comparison" in found else []
    return "\n".join([found["blurb"], "", *result_table(found), *([""] if told else []), *told])


def with_block(path: Path, text: str, block: str) -> str:
    """Return a README's text with `block` between its markers; raises SubmitError without them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SubmitError(f"{path}: needs {BEGIN} and {END}, once each and in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


# ------------------------------------------------------------------------------------------------
# Pictures: two SVG files from the logs, the same bytes for the same logs, readable in grey
# ------------------------------------------------------------------------------------------------

STYLE = {
    "svg.hashsalt": "golf", "svg.fonttype": "path", "text.parse_math": False, "font.size": 9,
    "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
}
DARK, BAND = "#1b3a4b", "#b9cdd8"
STAGES = dict(raw="last\nweights", ema="averaged", quantized="quantized",
              sliding="sliding\nwindows", ttt="test-time\ntraining")
LABEL = dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none", alpha=0.85)
GRID_POINTS = 400
FREE_PART = "free"


def figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """Return an empty figure; raises SubmitError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SubmitError("pictures need matplotlib; install it or pass --no-plots") from None
    return Figure((width, height), layout="constrained")


def draw(painter: Callable[[list[Log]], object], logs: list[Log], form: str = "svg") -> bytes:
    """Return the picture that `painter` makes of the logs, in the style of this file."""
    figure(1, 1)
    import matplotlib
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        out, metadata = io.BytesIO(), {"Date": None, "Creator": None} if form == "svg" else {}
        painter(logs).savefig(out, format=form, metadata=metadata, dpi=110, facecolor="white")
    return out.getvalue()


def curve_picture(logs: list[Log]) -> "matplotlib.figure.Figure":
    """Draw the training loss over time, and the score from stage to stage."""
    picture = figure(9, 3.3)
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    draw_curve(left, logs)
    draw_stages(right, logs)
    return picture


def draw_curve(axes, logs: list[Log]) -> None:
    """Draw the mean training loss of all seeds, their range as a band, and the loop switch."""
    import numpy as np
    curves = [[(e.number("elapsed_s"), e.number("train_loss")) for e in log.all("step")]
              for log in logs]
    if not all(len(curve) > 1 for curve in curves):
        raise Undecided("a log has too few step lines to draw")
    start, end = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    grid = np.linspace(start, end, GRID_POINTS)
    losses = np.array([np.interp(grid, *zip(*curve)) for curve in curves])      # (seeds, points)
    mean = losses.mean(0)
    axes.fill_between(grid, losses.min(0), losses.max(0), color=BAND, linewidth=0)
    axes.plot(grid, mean, color=DARK, linewidth=1.3)
    low, high = losses.min(), losses[:, GRID_POINTS // 25].max()
    axes.set_ylim(low - 0.06 * (high - low), high + 0.04 * (high - low) + 1e-6)
    axes.set(xlabel="seconds of training", ylabel="nats per token",
             title=f"training loss, {seeds_text(logs)}")
    switches = [second_of(log) for log in logs if log.all("loop_on")]
    if switches:
        at = statistics.mean(switches)
        axes.axvline(at, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(" recurrence on", (at, 0.95), xycoords=("data", "axes fraction"), va="top")


def second_of(log: Log) -> float:
    """Return the training second at which recurrence came on, by the steps logged around it."""
    import numpy as np
    steps = [(count_of(e.text("n"))[0], e.number("elapsed_s")) for e in log.all("step")]
    return float(np.interp(log.last("loop_on").number("n"), *zip(*steps)))


def seeds_text(logs: list[Log]) -> str:
    """Return what a picture of these logs shows."""
    return f"mean and range of {len(logs)} seeds" if len(logs) > 1 else f"seed {logs[0].seed}"


def draw_stages(axes, logs: list[Log]) -> None:
    """Draw the bits per byte of every stage that all logs have: mean, and range over seeds."""
    table = [{e.text("name"): e.number("val_bpb") for e in log.all("eval")} for log in logs]
    names = [name for name in STAGES if all(name in row for row in table)]
    if not names:
        raise Undecided("no pass over the validation text is in all logs")
    means, ranges = means_and_ranges([[row[name] for row in table] for name in names])
    axes.errorbar(range(len(names)), means, ranges, color=DARK, marker="o", markersize=5,
                  linewidth=1, capsize=4)
    for i, (mean, above) in enumerate(zip(means, ranges[1])):
        axes.annotate(f"{mean:.4f}", (i, mean + above), (0, 5), textcoords="offset points",
                      ha="center", bbox=LABEL)
    axes.set_xticks(range(len(names)), [STAGES[name] for name in names], fontsize=8)
    axes.margins(0.12, 0.25)
    axes.set(ylabel="bits per byte", title="score from stage to stage")


def means_and_ranges(columns: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Return the mean of each column, and how far below and above it values go."""
    means = [statistics.mean(values) for values in columns]
    return means, [[abs(pick(values) - mean) for values, mean in zip(columns, means)]
                   for pick in (min, max)]


def bytes_picture(logs: list[Log]) -> "matplotlib.figure.Figure":
    """Draw where the bytes of the largest artifact go, and what rounding did to each matrix."""
    picture = figure(9, 3.6)
    left, right = picture.subplots(1, 2, width_ratios=(1, 1))
    draw_budget(left, max(logs, key=lambda log: log.last("artifact").number("total_bytes")))
    draw_rounding(right, logs)
    return picture


def kind_of(name: str) -> tuple[str, int | None]:
    """Return (`attn.c_q`, 3) for layers.3.attn.c_q.weight, and (name, None) without a layer."""
    match = re.fullmatch(r"[A-Za-z_]+\.([0-9]{1,4})\.(.*?)(?:\.weight)?", name)
    return (match[2], int(match[1])) if match else (name.removesuffix(".weight"), None)


def byte_parts(log: Log) -> dict[str, float]:
    """Return bytes by part: code, vectors (2 bytes each), matrices by kind, and what is left free.

    The entropies of the matrices are scaled to the bytes that the file really has for them: row
    scales, header and the compressor's loss are spread over all matrices alike.
    """
    code, model, total = log.last("artifact").integers("code_bytes", "model_bytes", "total_bytes")
    vectors = sum(2 * e.number("params") for e in log.all("group", name="vectors"))
    kinds = {}
    for event in log.all("matrix"):
        kind = kind_of(event.text("name"))[0]
        kinds[kind] = kinds.get(kind, 0) + event.number("entropy_bytes")
    ideal = sum(kinds.values())
    if not ideal or vectors >= model:
        raise Undecided(f"{log.name} does not tell where its bytes go")
    real = {kind: size * (model - vectors) / ideal for kind, size in kinds.items()}
    return {"code": code, "vectors": vectors, **real, FREE_PART: LIMIT_BYTES - total}


def draw_budget(axes, log: Log) -> None:
    """Draw the parts of one artifact as bars, largest first, and above them what is free."""
    parts = byte_parts(log)
    names = sorted((name for name in parts if name != FREE_PART), key=parts.get)
    widest = parts[names[-1]]
    names.append(FREE_PART)
    shown = [min(max(parts[name], 0), 1.25 * widest) for name in names]     # free may be far more
    axes.barh(names, shown, color=[DARK] * (len(names) - 1) + [BAND], height=0.7)
    for name, size in zip(names, shown):
        at = 0 if size > widest else size
        axes.annotate(f" {parts[name]:,.0f}", (at, name), va="center")
    axes.set_xlim(0, 1.25 * widest)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set(title=f"where {LIMIT_BYTES:,} bytes go, seed {log.seed}")


def draw_rounding(axes, logs: list[Log]) -> None:
    """Draw each matrix's rounding error by layer, a marker a kind, a bar the range over seeds."""
    errors = {}
    for event in (e for log in logs for e in log.all("matrix")):
        errors.setdefault(kind_of(event.text("name")), []).append(event.number("mse"))
    kinds = list(dict.fromkeys(kind for kind, _ in errors))
    last = max((layer for _, layer in errors if layer is not None), default=0)
    for kind, marker, shade in zip(kinds, "osD^vPX*<>" * len(kinds), shades(len(kinds))):
        points = sorted((last + 1 if layer is None else layer, values)
                        for (name, layer), values in errors.items() if name == kind)
        means, ranges = means_and_ranges([values for _, values in points])
        axes.errorbar([at for at, _ in points], means, ranges, label=kind, marker=marker,
                      color=shade, markersize=4.5, linewidth=0.8)
    ticks = range(0, last + 1, 1 + last // 12)
    axes.set_xticks([*ticks, last + 1], [*ticks, "none"])
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    axes.set(xlabel="layer", ylabel="mean squared error / variance",
             title=f"rounding error, {seeds_text(logs)}")
    axes.legend(fontsize=8, ncols=3, loc="upper left")


def shades(count: int) -> list[str]:
    """Return `count` greys from dark to mid."""
    return [f"{0.62 * i / max(count - 1, 1):.3f}" for i in range(count)]


# ------------------------------------------------------------------------------------------------
# Record folder: exactly the files that a submission may hold, made whole or not at all
# ------------------------------------------------------------------------------------------------

KEPT_SECTIONS = ("How it works", "What each part buys", "Why it is legal", "Credits")


def folder_files(case: Case, verdicts: list[Verdict], found: dict) -> dict[str, bytes]:
    """Return the record folder's files by name."""
    requirements = read_regular(Path("requirements.txt"), 1 << 20)
    if requirements is None:
        raise SubmitError("requirements.txt is not here; a record folder needs it")
    if case.code is None:
        raise SubmitError(f"{case.packed} is not here; a record folder needs it, pack.py makes it")
    logs = {f"train_seed{log.seed}.log": log.data for log in case.logs}
    files = {"submission.json": to_json(found), "train_gpt.py": case.code,
             "requirements.txt": requirements, **logs}
    readme = folder_readme(case, verdicts, found, sorted([*files, "README.md"]))
    return {"README.md": readme.encode(), **files}


def folder_readme(case: Case, verdicts: list[Verdict], found: dict, names: list[str]) -> str:
    """Return the README of a record folder; what is no record says so in its first line."""
    title = f"# {found['name']}: {found['val_bpb']:.5f} bits per byte"
    if found["track"] == "non_record":
        title = f"**Non-record submission.** {found['blurb']}\n\n{title}"
    lines = [title, "", f"{found['technique_summary']}.", "",
             "## Results", "", result_block(found), "",
             "## From stage to stage, bits per byte", "", *stage_table(found), "", "## Rules", ""]
    lines += [f"* {v.state}: {v.rule.title}: {folder_names(case, v.sentence)} [{v.rule.source}]"
              for v in verdicts]
    lines += ["", NOT_IN_LOGS, "", "## Reproducing", "", *commands(case), "", "## Files", ""]
    lines += [f"* `{name}`" for name in names]
    return "\n".join(lines + kept_sections(Path("README.md"))) + "\n"


def folder_names(case: Case, text: str) -> str:
    """Return a sentence with the names that logs have in the record folder."""
    for log in case.logs:
        text = text.replace(log.name, f"train_seed{log.seed}.log")
    return text


def stage_table(found: dict) -> list[str]:
    """Return a table of every stage's score, a row a seed."""
    results = found["seed_results"]
    names = list(dict.fromkeys(name for n in results.values() for name in n["stages_val_bpb"]))
    rows = [f"| seed | {' | '.join(names)} |", "|--:" * (len(names) + 1) + "|"]
    for seed, n in results.items():
        stages = n["stages_val_bpb"]
        cells = [f"{stages[name]:.5f}" if name in stages else "" for name in names]
        rows.append(f"| {seed} | {' | '.join(cells)} |")
    return rows


def commands(case: Case) -> list[str]:
    """Return what to install and the commands of the logs, as they are given inside the folder."""
    found = ["    pip install -r requirements.txt"]
    for event in (e for log in case.logs for e in log.all("run")):
        world = event.number("world")
        torchrun = f"torchrun --standalone --nproc_per_node={world}"
        start = f"{torchrun if world > 1 else 'python'} train_gpt.py"
        told = event.values.get("command", start)
        found.append("    " + re.sub(r"python \S*train_gpt\.py", start, told))
    return list(dict.fromkeys(found))


def kept_sections(path: Path) -> list[str]:
    """Return the sections of the project's README that explain the system, without pictures."""
    text = (read_regular(path, 1 << 20) or b"").decode("utf-8", "replace")
    found = []
    for part in re.split(r"(?m)^(?=## )", text)[1:]:
        title, *lines = part.rstrip().split("\n")
        if title[3:].strip() in KEPT_SECTIONS:
            found += ["", title, *(line for line in lines if not line.startswith("!["))]
    return found


def make_folder(path: Path, files: dict[str, bytes]) -> None:
    """Make the folder at `path` with these files, or raise SubmitError and leave nothing."""
    if os.path.lexists(path):
        raise SubmitError(f"{path} exists; remove it or choose another name")
    half = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        half.mkdir(parents=True)
        for name, data in files.items():
            (half / name).write_bytes(data)
        half.rename(path)
    except OSError as error:
        shutil.rmtree(half, ignore_errors=True)
        raise SubmitError(f"cannot make {path}: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

SUBMISSION, README, PACKED = Path("submission.json"), Path("README.md"), Path("packed/train_gpt.py")
PICTURES = {Path("logs/curve.svg"): curve_picture, Path("logs/bytes.svg"): bytes_picture}


class Parser(argparse.ArgumentParser):
    """A parser that tells a wrong command line like any other bad input."""

    def error(self, message: str):
        """Raise SubmitError."""
        raise SubmitError(f"{message}; see --help")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; raises SubmitError."""
    parser = Parser(prog="submit.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="logs, one a seed, in any order")
    add("--name", help="name of the submission")
    add("--author", help="author, as submission.json shows it")
    add("--github-id", help="the author's GitHub name")
    add("--baseline", nargs="+", metavar="BPB", help="scores to compare with, one a seed, or "
        f"{', '.join(PRESETS)}, or none")
    add("--baseline-data", metavar="NAME", help=f"dataset of the baseline's scores ({LEADERBOARD})")
    add("--folder", metavar="NAME", type=Path, help="make the record folder YYYY-MM-DD_NAME")
    add("--check", action="store_true", help="write nothing; fail if a file differs from the logs")
    add("--packed", type=Path, help=f"the program that is submitted ({PACKED})")
    add("--no-plots", action="store_true", help="leave pictures alone")
    args = parser.parse_args(argv)
    if args.folder and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", args.folder.name):
        parser.error(f"--folder {args.folder}: letters, digits, _ and - only")
    if args.folder and args.check:
        parser.error("--folder and --check exclude each other")
    return args


def read_case(args: argparse.Namespace) -> Case:
    """Read all logs and the packed program; raises SubmitError."""
    logs = [read_log(path) for path in args.logs]
    logs.sort(key=lambda log: (log.settings.get("seed", "").zfill(20), log.name))
    packed = args.packed or PACKED
    code = None
    if args.packed or not any(log.public for log in logs):
        code = read_regular(packed, LIMIT_BYTES + 1)
    if args.packed and code is None:
        raise SubmitError(f"{packed}: cannot be read")
    return Case(logs, packed, code)


def read_given(args: argparse.Namespace) -> Given:
    """Return what a person says, from the command line or else from the submission.json at hand."""
    try:
        before = json.loads(read_regular(SUBMISSION, 1 << 24) or b"{}")
        said = {key: str(before.get(key, default)) for key, default in
                dict(name="parameter golf, done right", author="", github_id="").items()}
        old = before.get("comparison")
        baseline = old and Baseline(str(old["baseline"]), str(old["baseline_data"]),
                                    tuple(map(float, old["baseline_val_bpb"])))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SubmitError(f"{SUBMISSION} is damaged; remove it to have it made anew") from None
    said.update({key: getattr(args, key) for key in said if getattr(args, key) is not None})
    return Given(**said, baseline=parse_baseline(args) if args.baseline else baseline)


def parse_baseline(args: argparse.Namespace) -> Baseline | None:
    """Return the baseline that the command line names; raises SubmitError."""
    first, data = args.baseline[0], args.baseline_data or LEADERBOARD
    if args.baseline == ["none"]:
        return None
    if len(args.baseline) == 1 and first in PRESETS:
        return Baseline(first, LEADERBOARD, PRESETS[first])
    for text in args.baseline:
        if not NUMBER.fullmatch(text) or not 0 < float(text) < 100:
            raise SubmitError(f"--baseline {text}: neither bits per byte nor one of "
                              f"{', '.join(PRESETS)}; logs go before it")
    return Baseline("baseline", data, tuple(map(float, args.baseline)))


def to_json(found: dict) -> bytes:
    """Return the bytes of submission.json."""
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


def outputs(case: Case, found: dict, plots: bool) -> dict[Path, bytes]:
    """Return every file that follows from the logs."""
    files = {SUBMISSION: to_json(found)}
    text = read_regular(README, 1 << 24)
    if text is not None:
        files[README] = with_block(README, text.decode("utf-8", "surrogateescape"),
                                   result_block(found)).encode("utf-8", "surrogateescape")
    for path, painter in PICTURES.items() if plots else ():
        files[path] = draw(painter, case.logs)
    return files


def out_of_date(files: dict[Path, bytes]) -> list[str]:
    """Return a line for each file that is not what the logs say."""
    lines = [] if README in files else [f"{README} is missing, and its table with it"]
    for path, wanted in files.items():
        found = read_regular(path, len(wanted) + 1)
        if found is None:
            lines.append(f"{path} is missing")
        elif found != wanted:
            lines.append(f"{path} differs from the logs" + first_difference(path, found, wanted))
    return lines


def first_difference(path: Path, found: bytes, wanted: bytes) -> str:
    """Return where two texts part, as `: line 3 is ..., not ...`; nothing for pictures."""
    if path in PICTURES:
        return ""
    old_lines, new_lines = (text.decode("utf-8", "replace").split("\n") for text in (found, wanted))
    for at, (old, new) in enumerate(zip(old_lines, new_lines), 1):
        if old != new:
            return f": line {at} is {old.strip()[:60]!r}, should be {new.strip()[:60]!r}"
    return ": it ends elsewhere"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before."""
    half = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(data)
        os.replace(half, path)
    except OSError as error:
        raise SubmitError(f"cannot write {path}: {error.strerror}") from None


def report(case: Case, verdicts: list[Verdict]) -> int:
    """Print all verdicts, their count and the score; return how many rules fail."""
    for found in verdicts:
        print(found.line)
    counts = {state: sum(v.state == state for v in verdicts) for state in (PASS, FAIL, NOT_DECIDED)}
    print(f"\n{len(verdicts)} rules: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    print(NOT_IN_LOGS)
    try:
        print(f"{mean_std(scores(case.logs), 5)} bits per byte over {len(case.logs)} logs. "
              f"{describe(case)}")
    except Undecided as reason:
        print(f"No score: {reason}.")
    return counts[FAIL]


def publish(case: Case, verdicts: list[Verdict], given: Given, args: argparse.Namespace) -> int:
    """Write, or with --check compare, all that follows from the logs; return the exit code."""
    try:
        found = submission(case, verdicts, given)
        files = outputs(case, found, not args.no_plots)
    except Undecided as reason:
        print(f"nothing {'compared' if args.check else 'written'}: {reason}")
        return 1
    for line in comparison_lines(found["comparison"]) if given.baseline else ():
        print(line)
    if args.check:
        lines = out_of_date(files)
        print("\n".join(lines) or f"{', '.join(map(str, files))}: as the logs say")
        return int(bool(lines))
    for path, data in files.items():
        write_whole(path, data)
    missing = "" if README in files else f"; no {README} here"
    print(f"wrote {', '.join(map(str, files))}{missing}")
    return add_folder(case, verdicts, found, args.folder) if args.folder else 0


def add_folder(case: Case, verdicts: list[Verdict], found: dict, name: Path) -> int:
    """Make the record folder, unless a rule fails; return the exit code."""
    failed = [v.rule.title for v in verdicts if v.state == FAIL]
    if failed:
        print(f"no folder: {', '.join(failed)}")
        return 1
    path = name.with_name(f"{found['date'][:10]}_{name.name}")
    make_folder(path, folder_files(case, verdicts, found))
    print(f"made {path}")
    return 0


def compare_public(case: Case, args: argparse.Namespace) -> None:
    """Print how public logs stand against the baseline of the command line, if there is one."""
    baseline = parse_baseline(args) if args.baseline else None
    try:
        for line in comparison_lines(comparison(case.logs, baseline)) if baseline else ():
            print(line)
    except Undecided as reason:
        print(f"no comparison: {reason}")


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks; return the exit code."""
    case = read_case(args)
    if case.public and (args.check or args.folder):
        raise SubmitError("--check and --folder need logs of train_gpt.py, not public ones")
    given = None if case.public else read_given(args)
    if given and given.baseline:
        check_comparable(given.baseline, [log for log in case.logs if "dataset" in log.settings])
    verdicts = judge(case)
    failed = report(case, verdicts)
    if case.public:
        compare_public(case, args)
        return int(bool(failed))
    return max(publish(case, verdicts, given, args), int(bool(failed)))


def main(argv: list[str] | None = None) -> int:
    """Run; 0 fine, 1 a rule fails or a file is out of date, 2 bad input."""
    try:
        return run(arguments(argv))
    except SubmitError as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                                 # the reader, say `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
