"""Tests of submit.py: every verdict both ways, damaged logs, files, pictures, the statistics."""
import functools
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import submit

CODE = b"import base64,linecache,lzma,sys,traceback\nprint('stands for the packed program')\n"
SEEDS = (42, 314, 999)
DATA = dict(fineweb10B_sp8192=(40_540_160, 151_078_222), openmix_sp8192=(1_048_576, 3_889_821),
            fineweb10B_sp1024=(62_021_632, 151_080_363))
KINDS = dict(c_q=196_000, c_k=98_000, c_v=98_000, proj=196_000)
README = (f"# A title\n\nText before.\n\n{submit.BEGIN}\nold\n{submit.END}\n\n"
          "## How it works\n\n![a picture](x.svg)\nWell.\n\n## Libraries, CREDITS\n\nThanks.\n")


# ------------------------------------------------------------------------------------------------
# Sample logs
# ------------------------------------------------------------------------------------------------

def model_bytes(seed: int) -> bytes:
    """Return what stands for a seed's artifact."""
    return random.Random(seed).randbytes(1000 + seed % 100)


def scores(seed: int, name: str, dataset: str) -> str:
    """Return the figures of a pass over the validation text, consistent as the program's are."""
    targets, size = DATA[dataset]
    base = dict(raw=2.81, ema=2.805, quantized=2.84, sliding=2.797, ttt=2.792)[name]
    loss = round(base + seed % 7 * 2e-4, 8)
    bpb = loss / math.log(2) * targets / size
    return f"val_loss={loss:.8f} val_bpb={bpb:.8f} targets={targets} bytes={size}"


def passes(seed: int, dataset: str) -> list[str]:
    """Return the lines of the evaluation stage."""
    targets, clock, lines = DATA[dataset][0], 0.5, []
    for name, seconds in dict(raw=9.0, ema=9.0, quantized=20.0, sliding=100.0, ttt=300.0).items():
        clock += seconds if name not in ("raw", "ema") else 0
        told = scores(seed, name, dataset)
        if name == "ttt":
            lines += chunks(targets, re.search(r"val_bpb=(\S+)", told)[1])
        lines += [f"eval name={name} {told} seconds={seconds:g} clock_s={clock:g}",
                  f"ledger name={name} targets={targets} scored_min=1 scored_max=1"]
    return lines


def chunks(targets: int, bpb: str) -> list[str]:
    """Return score and update lines of four chunks."""
    ends = [0, *(targets // 4096 * i // 4 * 4096 for i in (1, 2, 3)), targets]
    lines = []
    for i in range(4):
        span = f"chunk={i + 1}/4 first={ends[i]} last={ends[i + 1]}"
        lines.append(f"score {span} bpb={bpb if i == 3 else '1.2'}")
        if i < 3:
            lines.append(f"update {span} lr=0.005")
    return lines


@functools.cache
def own_log(seed: int, dataset: str = "fineweb10B_sp8192", device: str = "NVIDIA H100 80GB HBM3",
            world: int = 8, code: bytes = CODE) -> str:
    """Return a good log of train_gpt.py."""
    model, digest = model_bytes(seed), hashlib.sha256(code).hexdigest()
    steps = 4550 + seed % 10
    size = f"model_bytes={len(model)} code_bytes={len(code)} total_bytes={len(model) + len(code)}"
    final = dict(re.findall(r"(val_\w+)=(\S+)", scores(seed, "ttt", dataset)))
    matrices = [f"matrix name=layers.{i}.attn.{kind}.weight "
                f"mse={0.001 * (i + 1) + seed % 7 * 1e-5:g} bits_per_weight={3 + i / 10:g} "
                f"entropy_bytes={size}"
                for i in range(4) for kind, size in KINDS.items()]
    curve = [f"step n={n}/20000 train_loss={2.7 + 6 / (1 + n / 40) + seed % 7 * 0.01:.8f} "
             f"lr_scale=1 step_ms=130 tokens_per_s=6000000 elapsed_s={0.13 * n:g}"
             for n in (1, *range(50, steps, 50), steps)]
    curve.insert(33, f"loop_on n={1601 + seed % 5} frac=0.35 elapsed_s=208.13 encoder=0,1,2 "
                 "decoder=1,2,3")
    return "\n".join([
        f'run program=train_gpt.py python=3.12.3 torch=2.11.0+cu130 device="{device}" '
        f'world={world} code_bytes={len(code)} code_sha256={digest} '
        "started=2026-11-20T10:00:00Z stages=train,quantize,eval",
        f'config group=run recipe=pr1876 *seed={seed} run_id="" stages=train,quantize,eval',
        f"config group=data data_dir=data dataset={dataset} rope_dims=16 seq_len=2048",
        "config group=model vocab_size=8192 num_layers=4 model_dim=512 num_loops=2 loop_start=1 "
        "loop_end=2",
        "config group=training max_wallclock_seconds=600 train_batch_tokens=786432 adam_eps=1e-08",
        "config group=quantization code_step=0 embed_step=0",
        "config group=scoring ttt_epochs=3 ttt_lr=0.005 eval_wallclock_seconds=600",
        "model params=9999999 kernels=1 attention=sdpa",
        "group name=scalar optimizer=adamw tensors=18 params=20",
        f"data split=train dataset={dataset} files=80 tokens=8000000000 documents=9000000 "
        f"sha256={'ab' * 32} manifest=checked",
        "warm_up graph=plain seconds=31.2 step_ms=101.2",
        "budget train_s=595 reserve_s=5 limit_s=600 expected_steps=4550",
        *curve,
        f"train_end steps={steps} reason=wallclock elapsed_s={0.13 * steps + 0.1:g} "
        f"seen_tokens={steps * 786432} plan=0123456789abcdef peak_mib=39045",
        f"checkpoint file=runs/s{seed}/checkpoint.golf step={steps} bytes=12345",
        "gradients batches=8 seconds=1.1",
        "hessians count=17 batches=64 seconds=4.2",
        f"data_closed split=train elapsed_s={0.13 * steps + 4.3:g} limit_s=600",
        "compress attempt=1 code_step=0.45 model_bytes=1 total_bytes=2 seconds=8",
        *matrices,
        "matrix name=tok_emb mse=0.0005 bits_per_weight=4.6 entropy_bytes=2400000",
        f"read_back file=runs/s{seed}/model.golf identical=1",
        f"artifact file=runs/s{seed}/model.golf {size} limit_bytes=16000000 "
        f"sha256={hashlib.sha256(model).hexdigest()}",
        "warm_up graph=scoring seconds=2",
        f"data split=val dataset={dataset} files=1 tokens=40540800 documents=50000 "
        f"sha256={'cd' * 32} manifest=checked",
        'note text="nothing of note, 100 % \\"quoted\\""',
        f"validation targets={DATA[dataset][0]} text_bytes={DATA[dataset][1]}",
        *passes(seed, dataset),
        "---",
        f"val_bpb:          {final['val_bpb']}",
        f"val_loss:         {final['val_loss']}",
        "score:            ttt",
        f"train_seconds:    {0.13 * steps + 0.1:g}",
        f"data_seconds:     {0.13 * steps + 4.3:g}",
        "eval_seconds:     420.5",
        f"steps:            {steps}",
        f"seed:             {seed}"]) + "\n"


# ------------------------------------------------------------------------------------------------
# A working folder, and calls
# ------------------------------------------------------------------------------------------------

def fill(folder: Path, **made) -> list[str]:
    """Put three good logs and what belongs to them into `folder`; returns the logs' names."""
    for seed in SEEDS:
        (folder / f"runs/s{seed}").mkdir(parents=True, exist_ok=True)
        (folder / f"runs/s{seed}/model.golf").write_bytes(model_bytes(seed))
    for name, text in {**{f"logs/s{s}.txt": own_log(s, **made) for s in SEEDS},
                       "README.md": README, "requirements.txt": "numpy\n",
                       "packed/train_gpt.py": CODE.decode()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return [f"logs/s{seed}.txt" for seed in SEEDS]


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """A working folder with three good logs; returns their names."""
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


def judged(*texts: str, code: "bytes | None" = CODE) -> dict[str, submit.Verdict]:
    """Return the verdicts on logs of these texts, by rule."""
    for i, text in enumerate(texts):
        Path(f"log{i}.txt").write_text(text)
    logs = [submit.read_log(Path(f"log{i}.txt")) for i in range(len(texts))]
    return {v.rule.key: v for v in submit.judge(submit.Case(logs, submit.PACKED, code))}


def run(*argv: str) -> int:
    """Run the command; returns its exit code."""
    return submit.main([*map(str, argv)])


def examples(count: int):
    """Return the settings of a property that runs in the working folder of its first example."""
    return settings(max_examples=count, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


def edit(pattern: str, new: str, where: int = 0):
    """Return a change of log number `where`: the first match of `pattern` becomes `new`."""
    def change(texts: list[str]) -> list[str]:
        """Apply it."""
        changed = re.sub(pattern, new, texts[where], count=1, flags=re.M)
        assert changed != texts[where], f"{pattern} changes nothing"
        return [*texts[:where], changed, *texts[where + 1:]]
    return change


def everywhere(pattern: str, new: str):
    """Return a change of all logs."""
    return lambda texts: [re.sub(pattern, new, text, flags=re.M) for text in texts]


def move(pattern: str, before: str):
    """Return a change of the first log: the line that matches goes before another one."""
    def change(texts: list[str]) -> list[str]:
        """Apply it."""
        lines = texts[0].split("\n")
        line = next(x for x in lines if re.match(pattern, x))
        lines.remove(line)
        lines.insert(next(i for i, x in enumerate(lines) if re.match(before, x)), line)
        return ["\n".join(lines), *texts[1:]]
    return change


# ------------------------------------------------------------------------------------------------
# Verdicts
# ------------------------------------------------------------------------------------------------

def test_good_logs_pass_every_rule(logs):
    """Three good logs with their files pass all there is."""
    found = judged(*(own_log(seed) for seed in SEEDS))
    assert {k: v.finding for k, v in found.items() if v.state != "PASS"} == {}
    assert run(*logs, "--no-plots") == 0


BAD = [     # rule, change that breaks it, reason
    ("log_complete", everywhere("^ledger .*\n", ""), "log0.txt: no ledger line"),
    ("log_complete", edit(r"^data_closed .*\n", "", 1), "log1.txt: no data_closed line"),
    ("log_complete", edit(r"\Z", "model params=1\n"), "goes on after its final block"),
    ("log_complete", edit(r"^---(.|\n)*", ""), "no result line"),
    ("same_code", edit("code_sha256=.", "code_sha256=x", 1), "code_sha256 is .* and x"),
    ("same_code", edit(r" code_bytes=\d+", " code_bytes=16630", 2), "16630"),
    ("same_code", everywhere("code_sha256=.", "code_sha256=x"), "code_sha256 is .* and x"),
    ("same_code", everywhere(r" code_bytes=\d+", " code_bytes=9"), "code_bytes is 82 and 9"),
    ("same_settings", edit(r"ttt_lr=0\.005", "ttt_lr=0.006", 1), r"ttt_lr is 0\.005 and 0\.006"),
    ("same_settings", edit(" rope_dims=16", "", 2), r"rope_dims is \(not listed\) and 16"),
    ("three_seeds", lambda t: t[:2], "2 of 3 seeds: 42, 314"),
    ("three_seeds", lambda t: [t[0], t[0], t[2]], "twice in 42, 42, 999"),
    ("three_seeds", lambda t: [t[0], t[0].replace("seed=42", "seed=43"), t[2]], "same artifact"),
    ("same_data", edit("sha256=(ab)+", "sha256=00", 1), "sha256 is 00 and abab"),
    ("same_data", edit("sha256=(cd)+", "sha256=00", 1), "sha256 is 00 and cdcd"),
    ("same_data", edit("files=80", "files=79", 1), "files is 79 and 80"),
    ("hardware_named", edit("H100 80GB HBM3", "A100", 1), "A100"),
    ("hardware_named", edit("world=8", "world=4", 1), "world is 4 and 8"),
    ("arithmetic", edit("^seed: ", "counts: 0 (data clock: 601.5 s of 600 s)\\nseed: "),
     r"log0.txt: the run does not count.*: 0 \(data clock: 601.5 s of 600 s\)"),
    ("train_under_600s", edit(r"^(train_end .* elapsed_s)=\S+", r"\1=600.2", 2),
     r"log2.txt: 600\.2 s of 600 s"),
    ("train_under_600s", everywhere("max_wallclock_seconds=600", "max_wallclock_seconds=240"),
     "of 240 s"),
    ("data_under_600s", edit(r"^(data_closed .* elapsed_s)=\S+", r"\1=600.1"), r"600\.1 s"),
    ("no_pre_quant_ttt", move("data split=train", "artifact"), "after it was closed"),
    ("eval_under_600s", edit(r"^(eval name=ttt .* clock_s)=\S+", r"\1=610.3"), r"610\.3 s"),
    ("clocks_add_up", edit(r"^(eval name=sliding .* seconds)=\S+", r"\1=400"), "the clock reads"),
    ("clocks_add_up", edit(r"^(step n=100/.* elapsed_s)=\S+", r"\1=99"), "backwards"),
    ("scored_once", edit(r"^(ledger name=ttt.*) scored_max=1", r"\1 scored_max=2"), "1 to 2 times"),
    ("scored_once", edit(r"^(ledger name=ttt.*) scored_min=1", r"\1 scored_min=0"), "0 to 1 times"),
    ("scored_once", edit(r"^(ledger name=sliding targets=)", r"\g<1>5"), "540,540,160 targets"),
    ("scored_once", edit(r"^(eval name=ttt .*)$", r"\1\n\1"), "more than once"),
    ("scored_once", edit("^score: +ttt", "score: sliding"), "not that of the last pass"),
    ("scored_once", edit("text_bytes=151078222", "text_bytes=151078230"),
     "raw: .* 151,078,222 of 151,078,230 bytes"),
    ("canonical_totals", everywhere("40540160", "9662464"), "9,662,464 targets"),
    ("canonical_totals", everywhere("151078222", "176000000"), "176,000,000 bytes"),
    ("arithmetic", edit(r"^(eval name=quantized .* val_bpb=)1\.\d\d", r"\g<1>1.01"), "quantized: "),
    ("arithmetic", edit(" bytes=151078222", " bytes=151078230"), "raw: val_bpb is"),
    ("arithmetic", edit(r"seen_tokens=\d", "seen_tokens=9"), "steps of 786,432"),
    ("score_first_ttt", move("update chunk=2/4", "score chunk=2/4"), "not right after the score"),
    ("score_first_ttt", edit(r"^(update chunk=2.*)$", r"\1\n\1"), "after the last chunk"),
    ("score_first_ttt", edit(r"^update chunk=2.*\n", ""), "not right after the score"),
    ("score_first_ttt", edit(r"^(update chunk=2/4 first)=\d+", r"\1=0"), "update of 0"),
    ("score_first_ttt", edit(r"^update chunk=3/4 first=(\d+) last=\d+",
                             r"update chunk=3/4 first=\1 last=40540160"),
     "not right after the score"),
    ("score_first_ttt", edit(r"^(score chunk=4/4) first=\d+", r"\1 first=0"), "not chunk 4"),
    ("score_first_ttt", edit(r"^score (chunk=4/4.*) (bpb.*)$", r"score \1 \2\nupdate \1"),
     "an update after the last"),
    ("score_first_ttt", edit(r"^score chunk=4/4.*\n", ""), "not chunk 1"),
    ("score_first_ttt", edit("^score chunk=2/4", "score chunk=3/4"), "not chunk 2"),
    ("score_first_ttt", edit(r"^(score chunk=4/4 .*bpb=1)\.\d\d", r"\1.11"), "the chunks come to"),
    ("score_first_ttt", edit(r"^(score chunk=4/4 .*last=4)0", r"\g<1>1"), "ends at 41540160"),
    ("score_first_ttt", everywhere(r"^(score|update) .*\n", ""), "no score lines"),
    ("no_pre_quant_ttt", move("artifact", "ledger"), "before the artifact is frozen"),
    ("no_pre_quant_ttt", move("step n=100", "eval name=quantized"), "a line step after"),
    ("no_pre_quant_ttt", move("hessians", "eval name=raw"), "a line hessians after"),
    ("no_pre_quant_ttt", edit("^(eval name=raw.*)$", r"\1\nartifact file=x model_bytes=1 "
                              "code_bytes=1 total_bytes=2 sha256=77"), "before the artifact"),
    ("no_pre_quant_ttt", move("warm_up graph=scoring", "eval name=raw"), "a line warm_up after"),
    ("artifact_under_16mb", edit(r" total_bytes=\d{4}", " total_bytes=16000001", 1),
     "log1.txt: 16,000,001 bytes of 16,000,000"),
    ("artifact_under_16mb", edit(r"^(artifact .*) total_bytes=\d+", r"\1 total_bytes=999", 1),
     "999 b"),
    ("artifact_under_16mb", edit(r"^(artifact .*) code_bytes=\d+", r"\1 code_bytes=5", 1),
     "are not"),
    ("artifact_under_16mb", edit(r"^(artifact .* sha256=)..", r"\1zz", 1),
     "log1.*s314.*not the artifact"),
    ("arithmetic", edit(r"^(val_bpb: +)1\.0", r"\g<1>1.1"), "block's val_bpb is 1.1"),
    ("arithmetic", edit(r"^(val_loss: +)2\.7", r"\g<1>2.6"), "val_loss is 2.6"),
    ("arithmetic", edit(r"^train_seconds: +\S+", "train_seconds: 1"), "train_seconds is 1"),
    ("arithmetic", edit(r"^data_seconds: +\S+", "data_seconds: 1"), "data_seconds is 1"),
    ("arithmetic", edit(r"^eval_seconds: +\S+", "eval_seconds: 400"), "eval_seconds is 400"),
    ("arithmetic", edit(r"^steps: +\S+", "steps: 1"), "steps is 1"),
    ("arithmetic", edit(r"^seed: +\S+", "seed: 1"), "seed is 1, its line says 42"),
    ("arithmetic", edit(r"^(seed: .*)", r"artifact_bytes: 5\n\1"), "artifact_bytes is 5"),
]


@pytest.mark.parametrize("key, change, named", BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_a_broken_rule_fails(logs, key, change, named):
    """Each rule fails on logs that break it, and its sentence names what is wrong."""
    found = judged(*change([own_log(seed) for seed in SEEDS]))[key]
    assert found.state == "FAIL" and re.search(named, found.finding), found


def test_every_rule_has_a_failing_example():
    """No rule of the table is left without a log that breaks it."""
    assert {key for key, _, _ in BAD} == {rule.key for rule in submit.RULES}


UNDECIDED = [       # rule, change that takes the evidence away, reason
    ("same_code", None, "packed/train_gpt.py is not here"),
    ("same_data", everywhere(" manifest=checked", ""), "log0.txt has no manifest"),
    ("same_data", edit(" manifest=checked", "", 2), "log2.txt has no manifest"),
    ("canonical_totals", everywhere("fineweb10B_sp8192", "notes_sp8192"), "whose totals"),
    ("hardware_named", everywhere(" world=8", ""), "log0.txt has no world in its run line"),
    ("train_under_600s", everywhere("^train_end", "train_stop"), "log0.txt has no train_end line"),
    ("same_settings", everywhere("^config .*\n", ""), "log0.txt has no seed in its config"),
]


@pytest.mark.parametrize("key, change, reason", UNDECIDED)
def test_undecided(logs, key, change, reason):
    """A rule whose evidence is missing is NOT DECIDED, with the reason, and never a PASS."""
    texts = [own_log(seed) for seed in SEEDS]
    found = judged(*(change(texts) if change else texts), code=CODE if change else None)[key]
    assert found.state == "NOT DECIDED" and reason in found.finding, found


@pytest.mark.parametrize("found", ["checked", "none"])
def test_same_data_by_contents(logs, found):
    """Equal digests of contents pass, and the finding says whether a manifest was checked."""
    verdict = judged(*(re.sub("manifest=checked", f"manifest={found}", own_log(s)) for s in SEEDS))
    assert verdict["same_data"].state == "PASS" and f"manifest {found}" in str(verdict["same_data"])


def test_an_artifact_that_is_not_at_hand(logs):
    """Without the artifact's file its logged size decides, and the finding says so."""
    found = judged(own_log(42).replace("file=runs/s", "file=gone/s"))["artifact_under_16mb"]
    assert found.state == "PASS" and "not at hand" in found.finding


@pytest.mark.parametrize("made, dataset, state", [
    ("openmix_sp8192", "openmix_sp8192", "PASS"),
    ("fineweb10B_sp1024", "fineweb10B_sp1024", "PASS"),
    ("fineweb10B_sp1024", "fineweb10B_sp4096", "PASS"), ("openmix_sp8192", "fineweb_cut", "FAIL")])
def test_totals_of_other_data(logs, made, dataset, state):
    """Known totals are held exactly, other FineWeb ones to its size of text."""
    texts = [own_log(seed, dataset=made).replace(made, dataset) for seed in SEEDS]
    assert judged(*texts)["canonical_totals"].state == state


def test_fixed_predictor_needs_no_chunks(logs):
    """Without test-time training no score lines are needed, and the rule says so."""
    lines = own_log(42).split("\n")
    text = "\n".join(x for x in lines if not re.match("(score|update) |.* name=ttt", x))
    text = text.replace("score:            ttt", "score: sliding")
    found = judged(text)["score_first_ttt"]
    assert found.state == "PASS" and "fixed" in found.finding


def of_documents(text: str) -> str:
    """The log with its four chunks as batches of 64 documents, 100 updates each."""
    text = re.sub("^update .*\n", "", text, flags=re.M)
    text = re.sub(r"^(score .*) bpb", r"\1 documents=64 updates=100 bpb", text, flags=re.M)
    return text.replace("ttt_epochs=3", "ttt_epochs=3 ttt_chunk_tokens=48")


def test_documents_count_their_updates(logs):
    """A batch has a line; its updates leave a last chunk of every document unlearnt."""
    text = of_documents(own_log(42))
    found = judged(text)["score_first_ttt"]
    assert found.state == "PASS" and "4 batches of documents" in found.finding
    for pattern, new, message in (
            (r"^score chunk=2/4(.*) updates=\d+", r"score chunk=2/4\1 updates=999999", "take 48"),
            (r"^score chunk=2/4(.*) documents=64", r"score chunk=2/4\1 documents=0", "of each"),
            (r"^(score chunk=2/4.*) documents=64 updates=100", r"\1", "update lines"),
            (r"^score (chunk=1/4 first=\d+ last=\d+)(.*)$", r"score \1\2\nupdate \1",
             "update lines"),
            (r"^(score (chunk=2/4 first=\d+ last=\d+).*)$", r"\1\nupdate \2", "not right after"),
            (r"^score chunk=2/4.*\n", "", "not chunk")):
        changed = re.sub(pattern, new, text, count=1, flags=re.M)
        found = judged(changed)["score_first_ttt"]
        assert changed != text and found.state == "FAIL" and message in found.finding, pattern


def test_one_log_by_stages(logs):
    """A log that three processes wrote, one a stage, is as good as one of a single process."""
    text = own_log(42)
    head = text[:text.index("model params")]
    text = text.replace("hessians count", head + "hessians count")
    text = text.replace("warm_up graph=scoring", head + "warm_up graph=scoring")
    found = judged(text, own_log(314), own_log(999))
    assert {k: v.finding for k, v in found.items() if v.state != "PASS"} == {}
    mixed = text[::-1].replace("24=dees", "34=dees", 1)[::-1]
    assert judged(mixed, own_log(314), own_log(999))["three_seeds"].state == "FAIL"


def test_the_separator_means_nothing(logs):
    """Where the line of dashes stands, or that it is missing, changes no verdict."""
    text = own_log(42).replace("---\n", "").replace("validation", "---\nvalidation")
    found = judged(text, own_log(314), own_log(999))
    assert {v.state for v in found.values()} == {"PASS"}


NUMBERS = [      # numbers of a good log that matter: pattern before the number
    r"^run .* world=", r"^run .* code_bytes=", r"^config .*\*seed=", r"^config .* seq_len=",
    r"^config .*train_batch_tokens=", r"^config .*ttt_lr=", r"^config .*adam_eps=",
    r"^data split=train .*files=", r"^data split=val .*files=", r"^train_end steps=",
    r"^train_end .*seen_tokens=", r"^train_end .*elapsed_s=", r"^data_closed .*elapsed_s=",
    r"^artifact .*model_bytes=", r"^artifact .*code_bytes=", r"^artifact .*total_bytes=",
    r"^validation targets=", r"^validation .*text_bytes=", r"^eval name=ttt val_loss=",
    r"^eval name=ttt .*val_bpb=",
    r"^eval name=ttt .*targets=", r"^eval name=ttt .* bytes=", r"^eval name=ttt .*clock_s=",
    r"^eval name=quantized val_loss=", r"^eval name=raw .*val_bpb=", r"^ledger name=raw targets=",
    r"^ledger .*scored_min=", r"^ledger .*scored_max=", r"^score chunk=",
    r"^score chunk=2/4 first=",
    r"^score chunk=2/4 .*last=", r"^score chunk=4/4 .*bpb=", r"^update chunk=", r"^update .*first=",
    r"^update .*last=", r"^val_bpb: +", r"^val_loss: +", r"^train_seconds: +", r"^data_seconds: +",
    r"^eval_seconds: +", r"^steps: +", r"^seed: +",
]


def test_an_edited_number_is_noticed(logs):
    """A digit more in front of any number that matters flips a verdict."""
    for pattern in NUMBERS:
        texts = edit(f"({pattern})", r"\g<1>7")([own_log(seed) for seed in SEEDS])
        assert any(v.state != "PASS" for v in judged(*texts).values()), pattern


@examples(8)
@given(st.data())
def test_any_edit_is_noticed_by_check(logs, data):
    """Whatever digit of a log is changed after publication, --check or a verdict tells."""
    assert run(*logs, "--no-plots") == 0
    text = own_log(314)
    at = data.draw(st.sampled_from([m.start() for m in re.finditer(r"\d", text)]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != text[at]]))
    Path(logs[1]).write_text(text[:at] + digit + text[at + 1:])
    assert run(*logs, "--no-plots", "--check") != 0
    Path(logs[1]).write_text(text)
    assert run(*logs, "--no-plots", "--check") == 0


# ------------------------------------------------------------------------------------------------
# Damaged logs
# ------------------------------------------------------------------------------------------------

DAMAGE = [      # pattern, replacement, the reason in the message
    ("(.|\n)*", "", "not a log"), ("(.|\n)*", "hello\n", "public_logs.py reads public logs"),
    ("(.|\n)*", "Hyperparameters:\n  seed: 1\n", "not a log"), ("(.|\n)*", "\0\1\2", "not a log"),
    ("^steps: +", "steps: x", "not a number"),
    ("^step n=50/.*", "step n", "line 14: neither an event"),
    ("(?<=^train_end steps=)", "many", "steps: 'many[0-9]+' is not a number"),
    ("(?<=^train_end steps=)", "-", "is not a number"), ("(?<=val_loss=)", "nan", "not a number"),
    ("(?<=elapsed_s=).*", "1e999", "not a number"), ("(?<=started=)", "../", "not a date"),
    (r"(?<=\*seed=)4", "²", "seed: '²2' is not a number"),
    ("(?<= last=)", "9" * 5000, "not a number"), ("(?<= last=)", "0" * 5000, "not a number"),
    ("sdpa", r'"sd\\u0000"', "control"),
    ("sdpa", r'"\\x"', "not JSON"), (" reason=", " steps=4 reason=", "comes twice"),
    ("^seed: ", "seed: 4\nseed: ", "comes twice"),
    ("^config.*", "Traceback (most recent call last):", "line 2: neither an event nor a result"),
]


@pytest.mark.parametrize("pattern, new, reason", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_log_is_one_clear_line(logs, capsys, pattern, new, reason):
    """Text that is no whole log ends in exit code 2 and one line: file, line, reason."""
    Path("bad.txt").write_text(edit(pattern, new)([own_log(42)])[0])
    assert run("bad.txt") == 2
    err = capsys.readouterr().err
    assert re.fullmatch("submit: bad.txt[,:] .*\n", err) and re.search(reason, err), err


def test_unreadable_files(logs, capsys):
    """A missing file, a folder, a FIFO, and bytes that are no text are named in one line."""
    Path("binary.txt").write_bytes(b"run \xff\xfe=1\n")
    os.mkfifo("fifo.txt")
    for name, reason in (("missing.txt", "No such file"), ("logs", "a folder"),
                         ("fifo.txt", "a pipe"), ("binary.txt", "not UTF-8")):
        assert run(name) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"submit: {name}: ") and reason in err and err.count("\n") == 1


def test_a_byte_order_mark_and_other_line_ends(logs):
    """A log that an editor has saved with a byte-order mark and CRLF gets the same verdicts."""
    text = "\ufeff" + own_log(42).replace("\n", "\r\n")
    found = judged(text, own_log(314), own_log(999))
    assert {v.state for v in found.values()} == {"PASS"}


@pytest.mark.parametrize("redirect, encoding, code, error", [
    (">/dev/full", "utf-8", 2, "No space left"), (">&-", "utf-8", 0, ""), ("2>&-", "utf-8", 0, ""),
    ("| head -c 9", "utf-8", 0, ""), ("", "ascii", 0, "")])
def test_streams_that_are_full_closed_or_ascii(logs, redirect, encoding, code, error):
    """Whatever the standard streams are: no traceback, and files unless the exit code is 2."""
    command = f"{sys.executable} {submit.__file__} {' '.join(logs)} --no-plots {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == code and error in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == bool(error)
    if done.returncode == 0 and not redirect.startswith("|"):
        assert json.loads(Path("submission.json").read_text())["seeds"] == list(SEEDS)


@examples(30)
@given(st.data())
def test_mutated_logs_never_give_a_traceback(logs, data):
    """Whatever happens to a log, the command ends with an exit code, not with an exception."""
    text = own_log(42)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.sampled_from([0, 1, 1, 2, 5, 40, 400])))
        piece = data.draw(st.one_of(
            st.sampled_from(["", "0", "9", "\n", " ", "=", '"', "1e300", "9" * 30, "nan", "/", "-1",
                             "\u00b2", "run a=1\n", "eval name=ttt\n", "val_bpb: 0\n",
                             "seed: 3\n", "---\n"]),
            st.text(max_size=4)))
        text = text[:start] + piece + text[end:]
    Path("mutated.txt").write_text(text, newline="", errors="surrogateescape")
    with_rest = data.draw(st.booleans())
    argv = ["mutated.txt", *(logs[1:] if with_rest else []), "--no-plots", "--baseline", "pr1493"]
    assert run(*argv) in (0, 1, 2)


@examples(30)
@given(st.data())
def test_rearranged_logs_never_give_a_traceback(logs, data):
    """Nor do lines lost, doubled or moved, keys lost, and numbers replaced by others."""
    lines = own_log(42).split("\n")
    some = st.integers(0, len(lines) - 1)
    kinds = st.sampled_from(["lose", "double", "move", "key", "number"])
    for kind in data.draw(st.lists(kinds, max_size=4)):
        at, to = min(data.draw(some), len(lines) - 1), data.draw(some)
        line = lines[at]
        if kind in ("lose", "move"):
            del lines[at]
        if kind in ("double", "move"):
            lines.insert(to, line)
        if kind == "key":
            lines[at] = re.sub(r" \*?\w+=\S+", "", line, count=1)
        if kind == "number":
            number, count = data.draw(st.sampled_from(["0", "0.0", "1", "7e14", "1e-300"])), at % 4
            lines[at] = re.sub(r"(?<=[=: ])[0-9.e-]+", number, line, count=count)
    Path("mutated.txt").write_text("\n".join(lines))
    argv = ["mutated.txt", *(logs[1:] if data.draw(st.booleans()) else [])]
    assert run(*argv, "--no-plots", "--baseline", "pr1493") in (0, 1, 2)


@examples(3)
@given(st.data())
def test_pictures_of_mutated_logs_never_give_a_traceback(logs, data):
    """Nor do the pictures, of figures that are numbers but make no sense."""
    text = own_log(42)
    keys = "elapsed_s|train_loss|mse|entropy_bytes|total_bytes|n|params"
    found = list(re.finditer(rf"({keys})=([\d.]+)", text))
    for match in data.draw(st.lists(st.sampled_from(found), min_size=1, max_size=3)):
        number = data.draw(st.sampled_from(["0", "9", "1e14", "5e-9"]))
        text = text.replace(match[0], f"{match[1]}={number}")
    Path("mutated.txt").write_text(text)
    assert run("mutated.txt") in (0, 1, 2)


def test_a_loss_far_outside_the_picture_is_drawn(logs):
    """The first loss sets no limit of the picture, however large it is."""
    first = re.search(r"train_loss=[\d.]+", own_log(42))[0]
    Path("mutated.txt").write_text(own_log(42).replace(first, "train_loss=1e14", 1))
    assert run("mutated.txt") in (0, 1)


# ------------------------------------------------------------------------------------------------
# Significance
# ------------------------------------------------------------------------------------------------

def test_published_comparison():
    """#1876 against #1493 comes out as published: t = -1.74, p = 0.106, and 0.91 with margin."""
    ours, theirs = list(submit.PRESETS["pr1876"]), submit.PRESETS["pr1493"]
    plain = submit.compare(ours, theirs)
    assert (round(plain["t"], 2), round(plain["p"], 3)) == (-1.74, 0.106)
    assert round(submit.compare(ours, theirs, 0.001936)["p"], 2) == 0.91


def test_a_single_number_is_a_constant():
    """A published mean is tested as a constant; one seed, or equal ones, admit no test."""
    one = submit.compare([1.0, 1.1, 1.2], (1.2,))
    assert one["df"] == 2 and one["t"] == pytest.approx(-math.sqrt(3))
    for ours, reason in (([1.0], "two seeds"), ([1.0, 1.0], "that differ")):
        with pytest.raises(submit.Undecided, match=reason):
            submit.compare(ours, (1.0,))


@pytest.mark.parametrize("dataset, margin", [("fineweb10B_sp8192", 0.001936),
                                             ("fineweb10B_sp1024", 0.00296)])
def test_margin_in_bits_per_byte(tmp_path, monkeypatch, dataset, margin):
    """0.005 nats per token are 0.001936 bits per byte on sp8192 and 0.00296 on sp1024."""
    monkeypatch.chdir(tmp_path)
    logs = [submit.read_log(Path(name)) for name in fill(tmp_path, dataset=dataset)]
    theirs = dict(baseline="b", baseline_data=dataset, baseline_val_bpb=[1.1, 1.2])
    assert submit.comparison(logs, theirs)["margin_bpb"] == pytest.approx(margin, abs=5e-6)


def test_baseline_on_the_command_line(logs, capsys):
    """Presets and numbers give the test, its units and a row; the JSON keeps them for --check."""
    assert run(*logs, "--no-plots", "--baseline", "pr1493") == 0
    out = capsys.readouterr().out
    assert "nats per token" in out and "bits per byte" in out and "Welch t-test, one-sided" in out
    found = json.loads(Path("submission.json").read_text())["comparison"]
    assert found["baseline_val_bpb"] == list(submit.PRESETS["pr1493"])
    assert found["plain"]["p"] < found["margin"]["p"] <= 1
    assert "| pr1493 (n = 3) | 1.08100 ± 0.00020 |" in Path("README.md").read_text()
    assert run(*logs, "--no-plots", "--check") == 0
    assert run(*logs, "--no-plots", "--check", "--baseline", "pr1855") == 1
    assert run(*logs, "--no-plots", "--baseline", "none") == 0
    assert "comparison" not in json.loads(Path("submission.json").read_text())


def test_other_data_is_not_compared(tmp_path, monkeypatch, capsys):
    """Scores on other text are refused a baseline of the leaderboard, in one line."""
    monkeypatch.chdir(tmp_path)
    logs = fill(tmp_path, dataset="openmix_sp8192", device="NVIDIA H200", world=1)
    for argv in (["pr1493"], ["1.0810", "1.0812"],
                 ["1.14", "--baseline-data", "notes_sp8192"]):
        assert run(*logs, "--no-plots", "--baseline", *argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "do not compare" in err
    assert not Path("submission.json").exists()
    named = ["--baseline", "1.14", "1.15", "--baseline-data", "openmix_sp8192"]
    assert run(*logs, "--no-plots", *named) == 0
    assert run(*logs, "--no-plots", "--baseline", "best") == 2


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def test_submission_json(logs):
    """Every number of submission.json is a log's; the worst seed sets the bytes; it round-trips."""
    argv = ["--name", "Ours", "--author", "A. Uthor", "--github-id", "auth"]
    assert run(*logs, "--no-plots", *argv) == 0
    text = Path("submission.json").read_text()
    found = json.loads(text)
    bpb = [float(re.search(r"^val_bpb: +(\S+)", own_log(s), re.M)[1]) for s in SEEDS]
    mean = sum(bpb) / 3
    std = math.sqrt(sum((b - mean) ** 2 for b in bpb) / 2)
    assert (found["val_bpb"], found["val_bpb_std"]) == pytest.approx((mean, std), abs=1e-8)
    assert found["bytes_total"] == len(CODE) + max(len(model_bytes(s)) for s in SEEDS)
    assert found["bytes_code"] == len(CODE) and found["seeds"] == list(SEEDS)
    assert set(found["seed_results"]) == set(map(str, SEEDS)) and found["track"] == "10min_16mb"
    assert found["name"] == "Ours"
    assert found["author"] == "A. Uthor"
    assert found["github_id"] == "auth"
    assert set(found["compliance"].values()) == {True}
    assert "artifact_matches" not in found["compliance"]        # not the same on every machine
    for key in ("blurb", "date", "hardware", "pytorch_version", "technique_summary", "attribution",
                "val_loss", "pre_quant_val_bpb", "wallclock_seconds", "eval_time_seconds"):
        assert found[key], key
    assert run(*reversed(logs), "--no-plots") == 0
    assert Path("submission.json").read_text() == text


def test_published_numbers_are_those_of_the_published_logs(monkeypatch):
    """submission.json and the table of this project's README follow from the logs beside them."""
    monkeypatch.chdir(Path(submit.__file__).parent)
    logs = sorted(Path("logs").glob("p1_*.txt"))
    assert run(*logs, "--packed", "logs/packed_train_gpt.py", "--no-plots", "--check") == 0


def test_check_writes_nothing_and_notices(logs, capsys):
    """--check passes right after writing, and names every file that is gone, edited or stale."""
    assert run(*logs, "--check") == 1
    assert not Path("submission.json").exists() and not Path("logs/curve.svg").exists()
    assert run(*logs) == 0
    edits = {"submission.json": ('"val_bpb": 1', '"val_bpb": 2'), "README.md": ("| 42 |", "| 43 |"),
             "logs/bytes.svg": ("<svg", "<svg "), "logs/curve.svg": ("</svg>", "</svg><!-- -->")}
    for name, (old, new) in edits.items():
        Path(name).write_text(Path(name).read_text().replace(old, new, 1))
    capsys.readouterr()
    assert run(*logs, "--check") == 1
    out = capsys.readouterr().out
    assert sorted(out.split("out of date: ")[1].strip().split(", ")) == sorted(edits)
    for name in ("submission.json", "logs/bytes.svg", "logs/curve.svg"):
        assert run(*logs) == 0
        Path(name).unlink()
        capsys.readouterr()
        assert run(*logs, "--check") == 1
        assert capsys.readouterr().out.endswith(f"missing or out of date: {name}\n")


def test_table_between_markers(logs, capsys):
    """Only what stands between the markers changes; missing or doubled markers are told."""
    assert run(*logs, "--no-plots") == 0
    text = Path("README.md").read_text()
    head, rest = README.split(submit.BEGIN)[0], README.split(submit.END)[1]
    assert text.startswith(head + submit.BEGIN) and text.endswith(submit.END + rest)
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert rows[0] == ("| seed | val_bpb | val_loss | ema | quantized | sliding | artifact_bytes "
                       "| steps | train_time_s | eval_time_s |")
    assert len(rows) == 6 and all(row.count("|") == 11 for row in rows)
    assert rows[2].startswith("| 42 | 1.08") and rows[-1].startswith("| mean ± std | **1.08")
    for bad in (README.replace(submit.END, ""), README + submit.BEGIN, "no markers\n"):
        Path("README.md").write_text(bad)
        assert run(*logs, "--no-plots") == 2
        assert "needs" in capsys.readouterr().err


def test_failing_rules_are_told_and_block_the_folder(logs, capsys):
    """A failing rule gives exit code 1, false in the compliance, and no folder."""
    assert run(*logs[:2], "--no-plots", "--folder", "Short") == 1
    assert json.loads(Path("submission.json").read_text())["compliance"]["three_seeds"] is False
    assert "no 2026-11-20_Short: a rule fails" in capsys.readouterr().out
    assert not list(Path().glob("*Short*")) and not list(Path().glob(".*Short*"))


def test_what_cannot_be_published_is_told(logs, capsys):
    """Logs without a final score, or two of a seed, write nothing and say why."""
    text = own_log(42)
    Path("short.txt").write_text(text[:text.index("---")])
    assert run("short.txt") == 1
    assert "nothing written: short.txt has no result" in capsys.readouterr().out
    assert run(logs[0], logs[0]) == 1
    assert "nothing written: a seed comes twice" in capsys.readouterr().out
    assert not Path("submission.json").exists()


def test_record_folder(logs, capsys):
    """The folder holds exactly the allowed files, unchanged ones byte for byte."""
    assert run(*logs, "--no-plots", "--folder", "CoprimeLoader") == 0
    folder = Path("2026-11-20_CoprimeLoader")
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["README.md", "submission.json", "train_gpt.py", "requirements.txt",
         *(f"train_seed{seed}.log" for seed in SEEDS)])
    assert (folder / "train_gpt.py").read_bytes() == CODE
    assert (folder / "train_seed42.log").read_text() == own_log(42)
    assert (folder / "submission.json").read_text() == Path("submission.json").read_text()
    readme = (folder / "README.md").read_text()
    assert readme.startswith("# ") and "s314.txt" not in readme and "x.svg" not in readme
    assert "SEED=314 torchrun --standalone --nproc_per_node=8 train_gpt.py" in readme
    assert "## How it works\n\nWell." in readme and "* PASS         Three seeds" in readme
    assert "## Libraries, CREDITS\n\nThanks." in readme
    assert run(*logs, "--no-plots", "--folder", "CoprimeLoader") == 2
    assert "exists" in capsys.readouterr().err
    assert run(*logs, "--no-plots", "--folder", "../bad name") == 2


@pytest.mark.parametrize("made", [dict(dataset="openmix_sp8192", device="NVIDIA H200", world=1),
                                  dict(world=1), dict(device="NVIDIA H200")])
def test_other_data_or_hardware_is_no_record(tmp_path, monkeypatch, made):
    """What is not of the challenge's data and machine says so, in the first line of its README."""
    monkeypatch.chdir(tmp_path)
    logs = fill(tmp_path, **made)
    assert run(*logs, "--no-plots", "--folder", "Try") == 0
    found = json.loads(Path("submission.json").read_text())
    assert found["track"] == "non_record" and "Not the challenge's" in found["blurb"]
    first = Path("2026-11-20_Try/README.md").read_text().split("\n")[0]
    assert "Non-record" in first and found["hardware"] in first
    assert found["blurb"] in Path("README.md").read_text()


def test_a_folder_needs_credits_and_keeps_the_license(logs, capsys):
    """Without a section of credits there is no folder; a LICENSE goes into it."""
    Path("LICENSE").write_text("Do.\n")
    Path("README.md").write_text(README.replace("CREDITS", "thanks"))
    before = sorted(Path().rglob("*"))
    assert run(*logs, "--no-plots", "--folder", "Mine") == 2
    assert "credits" in capsys.readouterr().err and sorted(Path().rglob("*")) == before
    Path("README.md").write_text(README)
    assert run(*logs, "--no-plots", "--folder", "Mine") == 0
    assert Path("2026-11-20_Mine/LICENSE").read_text() == "Do.\n"


def test_folder_is_whole_or_absent(logs, monkeypatch, capsys):
    """A failure on the way leaves no folder and no part of one."""
    def refuse(*_):
        """Fail as a full disk would."""
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "rename", refuse)
    before = {p.name for p in Path().iterdir()} | {"submission.json"}
    assert run(*logs, "--no-plots", "--folder", "Full") == 2
    assert "No space" in capsys.readouterr().err and {p.name for p in Path().iterdir()} == before
    for name in ("requirements.txt", "packed/train_gpt.py"):
        Path(name).unlink()
        assert run(*logs, "--no-plots", "--folder", "Full") == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--frob"], ["x.txt", "--folder", "a b"],
                                  ["x.txt", "--folder", "A", "--check"], ["x.txt", "--baseline"],
                                  ["x.txt", "--name", "\udcff"]])
def test_a_wrong_command_line_is_one_line(argv, capsys):
    """Wrong options are told as any other bad input."""
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("submit: ") and err.count("\n") == 1
    assert "\udcff" not in argv or "--name" in err


@pytest.mark.parametrize("text", [
    "{", "[]", '{"comparison": {"baseline": 1}}', "[" * 1000 + "]" * 1000, '{"name": ' + "9" * 4301
    + "}", '{"comparison": {"baseline": "a", "baseline_data": "b", "baseline_val_bpb": [NaN]}}',
    '{"comparison": {"baseline": "a", "baseline_data": "b", "baseline_val_bpb": []}}',
    '{"name": "\\ud800"}', '{"comparison": {"baseline": "a", "baseline_data": "b", '
    f'"baseline_val_bpb": ["{"0" * 5000}"]}}}}'], ids=range(9))
def test_a_damaged_submission_json_is_named(logs, capsys, text):
    """A submission.json that cannot be read is not silently replaced."""
    Path("submission.json").write_text(text)
    assert run(*logs, "--no-plots") == 2
    err = capsys.readouterr().err
    assert err.startswith("submit: submission.json: ") and err.count("\n") == 1
    assert Path("submission.json").read_text() == text


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

def test_pictures_have_no_date_and_differ_by_log(logs):
    """A picture has no date and no trace of the machine, and other logs give another one."""
    cases = [[submit.read_log(Path(name)) for name in names] for names in (logs, logs[:1])]
    for panel in submit.PICTURES.values():
        svg, other = (submit.draw(panel, case) for case in cases)
        assert svg.startswith(b"<?xml") and b"<dc:date>" not in svg and b"/home" not in svg
        assert svg != other


def test_a_picture_of_a_log_whose_name_is_not_utf8(logs):
    """Such a name does not reach the picture as it is."""
    name = Path("\udcff\x01.txt")
    Path(logs[0]).rename(name)
    for panel in submit.PICTURES.values():
        ElementTree.fromstring(submit.draw(panel, [submit.read_log(name)]))


def test_another_process_draws_the_same(logs):
    """Neither the order of a process's hashes nor a user's settings of Matplotlib matter."""
    assert run(*logs) == 0
    for name in ("matplotlibrc", "rc", ".config/matplotlib/matplotlibrc"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"lines.linewidth: 9\n\xff")
    odd = dict(PYTHONHASHSEED="7", MPLBACKEND="none", MATPLOTLIBRC="rc", HOME=str(Path.cwd()))
    command = [sys.executable, submit.__file__, *logs, "--check"]
    told = subprocess.run(command, env={**os.environ, **odd}, capture_output=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_parts_of_the_artifact_add_up(logs):
    """The bars of the byte budget sum to the limit, and kinds keep the ratio of their entropies."""
    parts = submit.byte_parts(submit.read_log(Path(logs[0])))
    assert sum(size for size, *_ in parts.values()) == pytest.approx(submit.LIMIT_BYTES)
    assert parts["attn.c_q"][0] / parts["attn.c_k"][0] == pytest.approx(2)
    assert parts["tok_emb"][1:] == (4.6,) and parts["attn.c_q"][1:] == (3, 3.1, 3.2, 3.3)
