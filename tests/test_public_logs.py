"""Tests of experiments/public_logs.py: three generations of public logs, good and bad.

The logs are short ones of our own in the public formats; the figures are ours.
"""
import math
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import public_logs  # noqa: E402
import submit  # noqa: E402

SEEDS = (42, 314, 999)
CASEOPS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"


def score(label: str, loss: float, dataset: str, rest: str = "", digits: int = 8) -> str:
    """A score line whose figures are consistent for the whole validation set of `dataset`."""
    targets, size = list(submit.WHOLE[dataset].items())[-1]
    bpb = loss / math.log(2) * targets / size
    return f"{label} val_loss:{loss:.{digits}f} val_bpb:{bpb:.{digits}f}{rest}"


def first(seed: int) -> str:
    """A log of the first generation, with a learning pass after the sliding one."""
    data = "fineweb10B_sp1024"
    passes = [("final_int6_roundtrip", 2.0701, 6_000),
              ("final_int6_sliding_window", 2.0352, 80_000),
              ("legal_ttt", 2.0204 + seed * 1e-6, 410_000)]
    scores = [line for label, loss, ms in passes for line in (
        score(label, loss, data, f" eval_time:{ms}ms", digits=4),
        score(f"{label}_exact", loss, data))]
    again = scores[-1].replace("legal_ttt_exact", "final_int8_zlib_roundtrip_exact")
    return "\n".join([
        f"logs/{seed}.txt", "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./x.model",
        f"train_loader:dataset:{data} train_shards:80",
        f"val_loader:shards pattern=./data/datasets/{data}/fineweb_val_*.bin tokens:62021632",
        "model_params:17059912", "world_size:8 grad_accum_steps:1",
        "train_batch_tokens:524288 train_seq_len:1024 max_wallclock_seconds:600.000",
        f"seed:{seed}", "warmup_step:1/20",
        "step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.02ms",
        "step:1/20000 train_loss:6.9357 train_time:33ms step_avg:33.1ms",
        "step:9000/20000 train_loss:2.1 train_time:391000ms step_avg:43.5ms",
        "stopping_early: wallclock_cap train_time:600038ms step:13780/20000",
        score("DIAGNOSTIC post_ema", 2.0653, data, " eval_time:2000ms", digits=4),
        "Serialized model: 67224983 bytes", "Code size: 47642 bytes",
        "Total submission size: 67272625 bytes",
        f"Serialized model int6+lzma: {15800000 + seed} bytes (payload:17178912 raw:1)",
        f"Total submission size int6+lzma: {15847642 + seed} bytes", *scores, again]) + "\n"


def second(seed: int) -> str:
    """A log of the second generation."""
    data = "fineweb10B_sp8192"
    passes = [("quantized", 2.8391, 9_700), ("quantized_sliding_window", 2.79701, 91_000),
              ("quantized_ttt", 2.79182 + seed * 1e-6, 324_000)]
    return "\n".join([
        "Hyperparameters:", "  adam_eps: 1e-08", f"  artifact_dir: /runs/{seed}",
        f"  datasets_dir: ./data/datasets/{data}", "  etlb_enabled: False", "  etlb_lr: 0.05",
        "  eval_seq_len: 2048", f"  logfile: logs/{seed}.txt", "  max_wallclock_seconds: 600.0",
        "  ppm_enabled: False", "  ppm_order: 5", f"  run_id: ours-{seed}", f"  seed: {seed}",
        "  train_batch_tokens: 786432", "  world_size: 8", "train_shards: 80",
        "val_tokens: 40540160", "model_params:35944536", "gptq:reserving 12s, effective=588000ms",
        "warmup_step: 1/20", score("0/20000", 9.0081, data, digits=4).replace(":", ": ", 2),
        "1/20000 train_loss: 9.0081 train_time: 0.0m tok/s: 7600000",
        "500/20000 train_loss: 3.3312 train_time: 0.9m tok/s: 7612345",
        "layer_loop:enabled step:2010 frac:0.350 encoder:[0, 1, 2] decoder:[1, 2, 3]",
        "4540/20000 train_loss: 2.8000 train_time: 9.8m tok/s: 7612345",
        f"stopping_early: wallclock_cap train_time: {587200 + seed}ms step: 4541/20000",
        score("pre-quantization post-ema", 2.8065, data, " eval_time:7440ms"),
        "Code size: 16594 bytes", "GPTQ:collected 67 Hessians in 11.5s",
        f"Serialized model quantized+brotli: {15970000 + seed} bytes",
        f"Total submission size quantized+brotli: {15986594 + seed} bytes",
        *(score(label, loss, data, f" eval_time:{ms}ms") for label, loss, ms in passes[:2]),
        "ttt:start chunks=1238 ttt_lr=0.005 ttt_epochs=3",
        *(score(label, loss, data, f" eval_time:{ms}ms") for label, loss, ms in passes[2:]),
    ]) + "\n"


def third(seed: int) -> str:
    """A log of the third generation."""
    drift = [(2.3211, "diagnostic pre-quantization post-ema"), (2.3411, "diagnostic quantized")]
    return second(seed).split("500/20000")[0].replace("fineweb10B_sp8192", CASEOPS).replace(
        "40540160", "47853343") + "\n".join([
            "4700/20000 train_loss: 2.8000 train_time: 10.0m tok/s: 7612345",
            "stopping_early: wallclock_cap train_time: 597172ms step: 4703/20000",
            "Code size (uncompressed): 154501 bytes", "Code size (compressed): 31815 bytes",
            "GPTQ:collected 67 Hessians in 2.1s",
            f"Serialized model quantized+pergroup: {15950000 + seed} bytes",
            f"Total submission size quantized+pergroup: {15981815 + seed} bytes",
            *(score(label, loss * 1.0001, CASEOPS, " eval_time:61000ms") for loss, label in drift),
            "ttt_phased: total_docs:50000 prefix_docs:2400 num_phases:1 target_tokens:47853343",
            score("quantized_ttt_phased", 2.3154 + seed * 1e-6, CASEOPS, " eval_time:551446ms"),
            "total_eval_time:551.4s"]) + "\n"


GENERATIONS = dict(first=first, second=second, third=third)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def judged(texts: list[str], code: bytes | None = None) -> dict[str, submit.Verdict]:
    """The verdicts on logs of these texts, by rule."""
    for i, text in enumerate(texts):
        Path(f"log{i}.txt").write_text(text)
    logs = [public_logs.read_log(Path(f"log{i}.txt")) for i in range(len(texts))]
    case = submit.Case(logs, Path("train_gpt.py"), code)
    return {v.rule.key: v for v in submit.judge(case, public_logs.RULES)}


PASSES = {"log_complete", "same_settings", "three_seeds", "train_under_600s",
          "data_under_600s", "eval_under_600s", "clocks_add_up", "canonical_totals",
          "artifact_under_16mb", "constant_ratio", "no_leak", "no_byte_mixture",
          "no_slot", "no_etlb", "no_ngram_cache"}
OPEN = {        # rules that no public log decides, with the reason
    "scored_once": "how often", "score_first_ttt": "learnt from when",
    "no_pre_quant_ttt": "order", "same_code": "no code_sha256", "same_data": "no sha256",
    "hardware_named": "no device"}


@pytest.mark.parametrize("name", GENERATIONS)
def test_good_logs_fail_no_rule(name):
    """A good log of each generation passes; a rule that its format cannot decide says why."""
    found = judged([GENERATIONS[name](seed) for seed in SEEDS])
    assert {k for k, v in found.items() if v.state == "PASS"} == PASSES, found
    assert set(found) == PASSES | set(OPEN)
    for key, reason in OPEN.items():
        assert found[key].state == "NOT DECIDED" and reason in found[key].finding, found[key]


CLOCKS = {"first": 6 + 80 + 410, "second": 9.7 + 91 + 324, "third": 551.446}
HEADLINES = {"first": 2.0204 + 42e-6, "second": 2.79182 + 42e-6, "third": 2.3154 + 42e-6}


@pytest.mark.parametrize("name", GENERATIONS)
def test_headline_and_clock(name):
    """The headline is the learning pass, and the clock holds every pass that leads to it."""
    Path("x.log").write_text(GENERATIONS[name](42))
    log = public_logs.read_log(Path("x.log"))
    assert log.headline.text("label").endswith("ttt_phased" if name == "third" else "ttt")
    assert log.headline.number("val_loss") == pytest.approx(HEADLINES[name], abs=1e-8)
    assert log.headline.number("clock_s") == pytest.approx(CLOCKS[name])


def change(name: str, pattern: str, new: str, logs: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """Logs of a generation in which every match of `pattern` in some logs became `new`."""
    texts = [GENERATIONS[name](seed) for seed in SEEDS]
    for i in logs:
        edited = re.sub(pattern, new, texts[i], flags=re.M)
        assert edited != texts[i], f"{pattern} changes nothing"
        texts[i] = edited
    return texts


BAD = [     # rule, generation, pattern, replacement, logs, reason
    ("log_complete", "first", "^(Total sub|Serialized model int|Code).*\n", "", (0,), "artifact"),
    ("log_complete", "second", "^stopping_early.*\n", "", (2,), "log2.txt: no train_end"),
    ("same_code", "third", r"\(compressed\): 31815", "(compressed): 31816", (1,), "31815 and"),
    ("same_settings", "second", "adam_eps: 1e-08", "adam_eps: 1", (1,), "adam_eps is 1 and 1e-08"),
    ("same_settings", "first", "train_seq_len:1024", "train_seq_len:2048", (1,), "train_seq_len"),
    ("three_seeds", "first", "seed:314", "seed:42", (1,), "twice"),
    ("same_data", "third", "train_shards: 80", "train_shards: 79", (0,), "79 and 80"),
    ("train_under_600s", "second", "587242ms", "601153ms", (0,), "601.153 s of 600 s"),
    ("data_under_600s", "second", r"in 11\.5s", "in 12.8s", (2,), "log2.txt: 600.999 s"),
    ("eval_under_600s", "first", "(legal_ttt .*):410000ms", r"\1:520000ms", (0,), "606 s"),
    ("eval_under_600s", "third", "^total_eval_time.*", "total_eval_time:601.5s", (1,), "601.5 s"),
    ("clocks_add_up", "second", "0.9m tok", "19.9m tok", (0,), "backwards"),
    ("canonical_totals", "second", "^val_tokens: .*", "val_tokens: 9662464", (0,), "9,662,464"),
    ("canonical_totals", "second", "^(quantized_ttt .*val_bpb:)1.0", r"\g<1>0.9", (0,), "bytes"),
    ("constant_ratio", "second", r"^(quantized_sliding.*val_bpb:1\.\d\d)\d", r"\g<1>0", (0,),
     "log0.txt, quantized_sliding_window"),
    ("constant_ratio", "third", r"^(quantized_ttt.*val_loss:2\.31)\d", r"\g<1>9", (1,), "log1.txt"),
    ("constant_ratio", "third", r"^(diagnostic quant.*val_loss:2\.34)\d", r"\g<1>9", (2,),
     "log2.txt, diagnostic quantized"),
    ("artifact_under_16mb", "third", "^(Total.*): 159", r"\1: 160", (1,), "log1.txt: 16,08"),
    ("artifact_under_16mb", "first", "^(Total.*lzma: 158)4", r"\g<1>3", (0,), "are not"),
    ("no_leak", "third", "train_shards: 80", "train_shards: 1499", (0, 1, 2), "1,499 train shards"),
    ("no_leak", "third", "train_shards: 80", "train_shards: 1502", (0, 1, 2), "1,502 train shards"),
    ("no_byte_mixture", "second", "ppm_enabled: False", "ppm_enabled: True", (0,), "ppm_enabled"),
    ("no_byte_mixture", "second", "^ttt:start", "ppm_mix bytes=29365687 mix_bpb=0.994872 nn=1\n"
     "ttt:start", (0,), "0.994872"),
    ("no_byte_mixture", "third", r"\Z", "ppm_sliding val_loss:2.36 val_bpb:0.94182660 "
     "eval_time:507652ms\n", (0,), "0.94182660"),
    ("no_slot", "second", "  seed:", "  slot_steps: 24\n  seed:", (0, 1, 2), "slot_steps=24"),
    ("no_etlb", "second", "etlb_enabled: False", "etlb_enabled: True", (0,), "etlb_enabled=True"),
    ("no_ngram_cache", "second", "  seed:", "  ngram_order: 5\n  seed:", (0,), "ngram_order=5"),
    ("no_pre_quant_ttt", "second", "  seed:", "  prequant_ttt_enabled: True\n  seed:", (0,),
     "prequant_ttt_enabled=True"),
]


@pytest.mark.parametrize("key, name, pattern, new, logs, reason", BAD)
def test_a_broken_rule_fails(key, name, pattern, new, logs, reason):
    """Each rule that public logs can break fails on logs that break it, with the reason."""
    found = judged(change(name, pattern, new, logs))[key]
    assert found.state == "FAIL" and reason in found.finding, found


def test_every_decidable_rule_has_a_failing_example():
    """No rule is left without a log that breaks it, but for those that the format leaves open."""
    rules = {rule.key for rule in public_logs.RULES}
    assert rules - {bad[0] for bad in BAD} == {*public_logs.UNTOLD, "hardware_named"}


@pytest.mark.parametrize("pattern, new, key, state, reason", [
    ("in 2.1s", "in 2.9s", "data_under_600s", "FAIL", "600.072 s"),
    ("  seed:", "  ngram_tilt_enabled: True\n  seed:", "no_ngram_cache", "NOT DECIDED", "#2135"),
    (" eval_time:551446ms", "", "eval_under_600s", "NOT DECIDED", "no clock_s"),
    ("  world_size", "  x: NVIDIA H100 80GB\n  world_size", "hardware_named", "PASS", "world 8"),
    ("^quantized_ttt_phased.*\n", "", "eval_under_600s", "PASS", "551.4 s"),
    ("^val_tokens: .*", "val_tokens: 0", "canonical_totals", "NOT DECIDED", "no targets"),
])
def test_verdicts_on_the_third_generation(pattern, new, key, state, reason):
    """Accepted and doubtful variants get the verdict that the log supports."""
    found = judged(change("third", pattern, new))[key]
    assert found.state == state and reason in found.finding, found


def test_the_submitted_program():
    """Another size than the log's fails; an equal size is no proof."""
    texts = [second(seed) for seed in SEEDS]
    found = judged(texts, b"x" * 10)["same_code"]
    assert found.state == "FAIL" and "16594" in found.finding
    assert judged(texts, b"x" * 16594)["same_code"].state == "NOT DECIDED"


@pytest.mark.parametrize("text, reason", [
    (first(42).replace("legal_ttt", "final_knn"), "line 24: an unknown score line"),
    (second(42).replace("quantized_ttt val", "requant diagnostic val"), "unknown score line"),
    (third(42) + "slot_eval:done steps=24 val_bpb=0.8\n", "unknown score line"),
    (second(42).split("Code size")[0], "no score line of a known kind"),
    ("", "no score line"), ("hello\n", "no score line"), ("\ufeffrun a=1\n", "submit.py reads it"),
    (second(42).replace("val_bpb:1", "val_bpb:" + "9" * 5000), "not a number"),
    (second(42).replace("val_bpb:1", "val_bpb:" + "0" * 5000 + "1"), "not a number"),
], ids=range(9))
def test_other_logs_are_rejected_in_one_line(text, reason, capsys):
    """A score line of an unknown spelling, no score, or our own format: one line, exit code 2."""
    Path("x.log").write_text(text)
    assert public_logs.main(["x.log"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("public_logs: x.log") and err.count("\n") == 1 and reason in err


def test_comparison_with_a_baseline(capsys):
    """Verdicts and the t-test are printed, the exit code tells of a failure, nothing is written."""
    names = [f"{seed}.log" for seed in SEEDS]
    for seed, name in zip(SEEDS, names):
        Path(name).write_text("\ufeff" + second(seed).replace("\n", "\r\n"))
    before = sorted(Path().iterdir())
    assert public_logs.main([*names, "--baseline", "pr1493"]) == 0
    out = capsys.readouterr().out
    assert "PASS         No ETLB: no setting named etlb is on" in out and "Welch t-test" in out
    assert "1.08098 ± 0.00019 bits per byte over 3 logs" in out
    assert public_logs.main([names[0], "--baseline", "pr1493"]) == 1
    assert "no comparison: a t-test needs two seeds" in capsys.readouterr().out
    assert sorted(Path().iterdir()) == before
