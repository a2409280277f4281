#!/usr/bin/env python3
"""Judge public logs of the parameter-golf challenge by the rules of submit.py.

    python experiments/public_logs.py train_seed42.log train_seed314.log train_seed999.log
    python experiments/public_logs.py train_seed*.log --baseline pr1493 --packed train_gpt.py

The lines of three generations of entries are translated into the events of our own logs.  A log
with a score line of another spelling is rejected: its clock and headline would be incomplete.

    line        baseline, #1060                  #1493, #1858              #1530 to #2135
    settings    key:value key:value, seed:N      "  key: value"            the same
    shards      train_loader:dataset:X           train_shards: N           the same
                train_shards:N
    targets     val_loader:... tokens:N          val_tokens: N             the same
    step        step:N/N ... train_time:Nms      N/N ... train_time: N.Nm  the same
    averaged    DIAGNOSTIC post_ema              pre-quantization          diagnostic
                                                 post-ema                  pre-quantization post-ema
    quantized   final_int8_zlib_roundtrip        quantized                 diagnostic quantized
                final_int6_roundtrip
    sliding     final_int6_sliding_window[_s64]  quantized_sliding_window
    learning    legal_ttt, final_ttt_lora        quantized_ttt, legal_ttt  quantized_ttt_phased
    model       Serialized model int8+zlib:      ... quantized+brotli      ... quantized+pergroup
                N bytes (payload:...)
    code        Code size: N bytes               the same                  Code size (compressed): N

`NAME` has few digits and the time, `NAME_exact` all digits of the same pass.  `diagnostic` passes
do not lead to the score and are not on the evaluation clock, as in `total_eval_time`.

Exit code: 0 fine, 1 a rule fails, 2 bad input.  Nothing is written.
"""
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import console  # noqa: E402
import submit  # noqa: E402
from console import Failure  # noqa: E402
from submit import Broken, Case, Event, Log, Rule, Undecided, require  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Translation
# ------------------------------------------------------------------------------------------------

N, F = "[0-9]+", r"[0-9]+(?:\.[0-9]+)?"
METHOD = r"\w+\+\w+"
TRAIN_TIME = rf"train_time: ?(?:(?P<ms>{F})ms|(?P<minutes>{F})m)"
# Pattern of a whole line, event, values beside the named groups.
LINES = [(re.compile(pattern), name, values) for pattern, name, values in (
    (r"code_sha256: ?(?P<code_sha256>[0-9a-f]{64})", "run", {}),
    (rf"Code size(?: \(compressed\))?: (?P<code_bytes>{N}) bytes", "run", {}),
    (r"Running PyTorch (?P<torch>\S+)", "run", {}),
    (r".*(?P<device>NVIDIA [A-Z]+[0-9]+\w*(?: [\w-]+)*).*", "run", {}),
    (rf"(?:train_loader:dataset:\S+ )?train_shards: ?(?P<files>{N})", "data", dict(split="train")),
    (rf"(?:val_tokens: ?|val_loader:.* tokens:)(?P<targets>{N})", "validation", {}),
    (rf"(?:step:)?(?P<n>{N}/{N}) train_loss: ?(?P<train_loss>{F}) {TRAIN_TIME}.*", "step", {}),
    (rf"stopping_early: wallclock_cap {TRAIN_TIME} step: ?(?P<steps>{N})/{N}", "train_end", {}),
    (rf"GPTQ:collected {N} Hessians in (?P<seconds>{F})s", "hessians", {}),
    (rf"Serialized model {METHOD}: (?P<model_bytes>{N}) bytes.*", "artifact", {}),
    (rf"Total submission size {METHOD}: (?P<total_bytes>{N}) bytes.*", "artifact", {}),
    (rf"total_eval_time: ?(?P<seconds>{F})s.*", "eval_end", {}),
    (rf".*(?:mix_bpb\w*[:=]|\bppm\w* .*val_bpb:) ?(?P<bpb>{F}).*", "mixture", {}),
    (rf"\w+:done val_loss=(?P<loss>{F}) val_bpb=(?P<bpb>{F}).*", "note", {}),   # of the next line
)]
PASSES = {          # spelling: name of the pass, in rising order of what counts as the headline
    rf"(?:step:)?{N}/{N}": "raw",
    "(?:diagnostic )?pre-quantization post-ema|DIAGNOSTIC post_ema": "ema",
    "diagnostic quantized": "diagnostic",
    "quantized|final_int6_roundtrip|final_int8_roundtrip|final_int8_zlib_roundtrip": "quantized",
    "quantized_sliding_window|final_(?:int6_)?sliding_window(?:_s64)?": "sliding",
    "quantized_ttt(?:_phased|_lora)?|legal_ttt|final_(?:int8_)?ttt_lora": "ttt",
}
SCORES = [(re.compile(rf"(?P<label>{label})(?:_exact)? val_loss: ?(?P<val_loss>{F}) "
                      rf"val_bpb: ?(?P<val_bpb>{F})(?P<rest>.*)"), name)
          for label, name in PASSES.items()]
SCORE = re.compile(rf"[^#]*\b(?:val_bpb|\w*mix_bpb\w*)[:=] ?{F}")
TIME = re.compile(rf"eval_time: ?({F})ms")
NO_SETTING = re.compile(r"(?:.*_)?(?:dir|dirs|path|paths|file|files|id|prefix|rank|logfile)")


def read_log(path: Path) -> Log:
    """Return a public log as a Log with our events; raises Failure naming the file and line."""
    data, text = submit.read_text(path)
    if re.match(r"run \w+=", text):
        raise Failure(f"{path}: a log of train_gpt.py; submit.py reads it")
    lines = [line.rstrip() for line in text.split("\n")]
    passes, found = [], []
    for at, line in enumerate(lines, 1):
        if score := read_score(line, path, at):
            add_pass(passes, score)
        elif event := read_line(line, path, at):
            found.append(event)
        elif SCORE.match(line):
            raise Failure(f"{path}, line {at}: an unknown score line, so an unknown kind of log: "
                          f"{line.strip()[:60]!r}")
    if not any(e.values["name"] not in ("raw", "ema") for e in passes):
        raise Failure(f"{path}: no score line of a known kind of public log")
    return Log(path, data, complete(found, passes, read_settings(lines), path))


def read_line(line: str, path: Path, at: int) -> Event | None:
    """Return the event of a line without a score of a pass, if it has one."""
    for pattern, name, fixed in LINES:
        if match := pattern.fullmatch(line):
            values = {k: v for k, v in match.groupdict().items() if v is not None}
            for unit, scale in dict(ms=1e-3, minutes=60.0).items():
                if unit in values:
                    text = values.pop(unit)
                    values["elapsed_s"] = f"{float(text) * scale:.10g}"
                    values["rounding_s"] = f"{half_digit(text) * scale:g}"
            if time := TIME.search(line):
                values["seconds"] = f"{float(time[1]) / 1000:.10g}"
            return Event(name, {**fixed, **values}, path, at)
    return None


def half_digit(text: str) -> float:
    """Return half a unit of the last printed digit of a number."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def read_score(line: str, path: Path, at: int) -> Event | None:
    """Return the eval event of a line with the score of a pass, if it is one."""
    for pattern, name in SCORES:
        if match := pattern.fullmatch(line):
            label, loss, bpb, rest = match.groups()
            values = dict(name=name, label=label, val_loss=loss, val_bpb=bpb)
            if time := TIME.search(rest):
                values["seconds"] = f"{float(time[1]) / 1000:.10g}"
            return Event("eval", values, path, at)
    return None


def add_pass(passes: list[Event], score: Event):
    """Append a pass, or merge it with an earlier line of the same pass that has fewer digits.

    A line without a time that repeats the score of a pass is of that pass, whatever its label:
    some programs print their headline once more under the baseline's label.
    """
    for old in passes:
        same = old.values["label"] == score.values["label"] or "seconds" not in score.values
        keys = ("val_loss", "val_bpb")
        digits = {key: max(half_digit(e.values[key]) for e in (old, score)) for key in keys}
        near = all(abs(old.number(k) - score.number(k)) <= 1.001 * digits[k] for k in keys)
        if same and near and old.values["name"] != "raw":
            longer = {k: max(old.values[k], score.values[k], key=len) for k in keys}
            old.values.update(score.values | old.values | longer)
            return
    passes.append(score)


def read_settings(lines: list[str]) -> dict[str, str]:
    """Return the settings that a log lists before training, without paths and names of runs."""
    settings = {}
    for line in lines:
        if re.match(rf"warmup_step|(?:step:)?{N}/{N} ", line):
            break
        if match := re.fullmatch(r"  (\w+): (.*)", line):
            settings[match[1]] = match[2]
        elif re.fullmatch(r"(?:\w+:[^\s:]+(?: |$))+", line):
            settings.update(pair.split(":") for pair in line.split())
        elif match := re.match(r"(train_loader:dataset|val_loader).*?(fineweb10B_\w+)", line):
            settings["data_path"] = match[2]
    datasets = [name for key, value in settings.items() if NO_SETTING.fullmatch(key)
                for name in re.findall(r"fineweb10B_\w+", value)[-1:]]
    kept = {k: v for k, v in settings.items() if not NO_SETTING.fullmatch(k)}
    return {**kept, "dataset": datasets[0]} if datasets else kept


def complete(found: list[Event], passes: list[Event], settings: dict[str, str],
             path: Path) -> list[Event]:
    """Return all events, with one run and one artifact and the figures that follow from others."""
    run, artifact = ({k: v for e in found if e.name == name for k, v in e.values.items()}
                     for name in ("run", "artifact"))
    if "world_size" in settings:
        run["world"] = settings["world_size"]
    if "code_bytes" in run and artifact:
        artifact["code_bytes"] = run["code_bytes"]
    last = {e.name: e for e in found}
    events = [Event("run", run, path, 0), Event("config", settings, path, 0),
              *(e for e in found if e.name not in ("run", "artifact")), *passes,
              Event("artifact", artifact, path, len(found))]
    if end := last.get("train_end"):
        spent = end.number("elapsed_s")
        if "hessians" in last:
            spent += last["hessians"].number("seconds")
        if "hessians" in last or not re.search("gptq|calibrat", " ".join(settings)):
            events.append(Event("data_closed", dict(elapsed_s=f"{spent:.10g}"), path, end.line))
    targets = last["validation"].number("targets") if "validation" in last else 0
    for event in passes:
        loss, bpb = event.number("val_loss"), event.number("val_bpb")
        if targets and bpb:
            size = submit.bits_per_byte(loss, targets, bpb)     # solved for it
            event.values.update(targets=str(targets), bytes=str(round(size)),
                                rounding=f"{submit.digits_slack(event) + 1 / max(size, 1):g}")
    headline = max(passes, key=lambda e: list(PASSES.values()).index(e.values["name"]))
    if headline.values["name"] == "diagnostic":         # then it leads to the score after all
        headline.values["name"] = "quantized"
    read_clock([e for e in passes if e.values["name"] not in submit.DIAGNOSTIC], found)
    return [*events, Event("result", dict(score=headline.values["name"]), path, headline.line)]


def read_clock(scored: list[Event], found: list[Event]):
    """Give every scored pass the reading of the evaluation clock after it, if all have a time."""
    clock = 0.0
    for event in scored:
        if "seconds" not in event.values:
            return
        clock += event.number("seconds")
        event.values["clock_s"] = f"{clock:.10g}"
    mixtures = [e.number("seconds") for e in found if e.name == "mixture" and "seconds" in e.values]
    clock += max(mixtures, default=0.0)             # the longest has the others in it
    totals = [e.number("seconds") for e in found if e.name == "eval_end"]
    scored[-1].values["clock_s"] = f"{max([clock, *totals]):.10g}"


# ------------------------------------------------------------------------------------------------
# Rules: those of submit.py that public logs can decide, and those about what others have done
# ------------------------------------------------------------------------------------------------

OFF = ("0", "0.0", "false", "none", "")
LEAKED_SHARDS = (1499, 1502)
UNTOLD = {
    "scored_once": "public logs have no count of how often each target was scored",
    "score_first_ttt": "public logs do not say which tokens were learnt from when",
}


def undecided(reason: str, log: Log) -> str:
    """Raise Undecided with a reason that holds for all public logs."""
    raise Undecided(reason)


def constant_ratio(case: Case) -> str:
    """val_loss / val_bpb is a constant of the data: equal in all scored passes of all logs."""
    kinds: dict[str, list[tuple[float, float, float, str]]] = {}
    for event in (e for log in case.logs for e in log.all("eval")):
        name, bpb = event.text("name"), event.number("val_bpb")
        where = f"{event.path.name}, {event.text('label')}"
        require(bpb, f"{where}: val_bpb is 0")
        ratio, slack = event.number("val_loss") / bpb, submit.digits_slack(event)
        group = kinds.setdefault(name if name in submit.DIAGNOSTIC else "scored", [])
        group.append((ratio * (1 - slack), ratio * (1 + slack), ratio, where))
    for group in kinds.values():
        ends = min(group, key=lambda bounds: bounds[1]), max(group)
        require(ends[1][0] <= ends[0][1], "it is " + " and ".join(
            f"{ratio:.5f} ({where})" for _, _, ratio, where in ends))
    return f"{kinds['scored'][-1][2]:.5f} nats per token for a bit per byte, in every scored pass"


def no_leak(log: Log) -> str:
    """The number of train shards is not that of a preparation that leaks validation documents."""
    files = log.last("data", split="train").number("files")
    require(files not in LEAKED_SHARDS, f"{files:,} train shards, the fingerprint of a preparation "
            "that puts validation documents into the training shards")
    return f"{files:,} train shards"


def switches_on(log: Log, word: str) -> list[str]:
    """Return the settings with this word that are on; an `enabled` switch outweighs the others."""
    if not log.settings.values:
        raise Undecided(f"{log.path.name} lists no settings")
    named = {k: v for k, v in log.settings.values.items() if word in k}
    switches = {k: v for k, v in named.items() if "enabled" in k} or named
    return [f"{k}={v}" for k, v in switches.items() if v.lower() not in OFF]


def switched_off(word: str, log: Log) -> str:
    """No setting with this word is on."""
    on = switches_on(log, word)
    if word == "ngram" and [text.partition("=")[0] for text in on] == ["ngram_tilt_enabled"]:
        raise Undecided(f"{log.path.name} has {on[0]}: a tilt by token n-grams was accepted "
                        "(#2135), a cache was not; the log does not say which it is")
    require(not on, ", ".join(on)[:80])
    return f"no setting named {word} is on"


def no_mixture(log: Log) -> str:
    """The score is not of a mixture over bytes, which is not normalised over tokens."""
    for event in log.all("mixture"):
        raise Broken(f"line {event.line}: a score of a byte mixture, {event.text('bpb')}")
    return switched_off("ppm", log)


def no_pre_quant(log: Log) -> str:
    """No setting says that weights learn from validation text before they are quantized."""
    for word in ("prequant", "pre_quant"):
        switched_off(word, log)
    raise Undecided("public logs do not name the order of artifact and validation data")


RULES = [rule._replace(decide=partial(undecided, UNTOLD[rule.key])) if rule.key in UNTOLD else rule
         for rule in submit.RULES
         if rule.key not in ("log_complete", "no_pre_quant_ttt", "arithmetic")]     # of our format
RULES += [
    Rule("log_complete", "Logs are complete", "README 6; #1728, #2071, #2103",
         partial(submit.log_complete, wanted=submit.WANTED)),
    Rule("no_pre_quant_ttt", "Nothing learnt from validation before quantization",
         "#1376, #677, #728", no_pre_quant),
    Rule("constant_ratio", "val_loss / val_bpb is the data's constant", "#1017 V; #2101",
         constant_ratio, per_log=False),
    Rule("no_leak", "No fingerprint of the validation leak", "#2127; #1967", no_leak),
    Rule("no_byte_mixture", "No byte mixture", "#1872, #1902; #1858", no_mixture),
    Rule("no_slot", "No SLOT", "#1240, #1336", partial(switched_off, "slot")),
    Rule("no_etlb", "No ETLB", "#1420", partial(switched_off, "etlb")),
    Rule("no_ngram_cache", "No n-gram cache", "#677, #779", partial(switched_off, "ngram")),
]


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def run(argv: list[str] | None) -> int:
    """Judge the logs of the command line and compare them; return the exit code."""
    args = submit.common_parser("public_logs.py", __doc__).parse_args(argv)
    baseline = submit.parse_baseline(args)
    case = submit.read_case(args, read_log, Path("the submitted program"))
    code = submit.report(case, submit.judge(case, RULES))
    try:
        if baseline:
            print(*submit.comparison_lines(submit.comparison(case.logs, baseline)), sep="\n")
    except Undecided as reason:
        print(f"no comparison: {reason}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Run; 0 fine, 1 a rule fails, 2 bad input."""
    return console.run("public_logs", lambda: run(argv), OverflowError)


if __name__ == "__main__":
    sys.exit(main())
