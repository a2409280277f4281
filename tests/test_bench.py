"""bench/step_time.py: its counts, its tables from made-up times and traces, a tiny real run."""
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "bench"))

import step_time  # noqa: E402

SCRIPT = ROOT / "bench" / "step_time.py"
TINY_ENV = {name.upper(): str(value) for name, value in TINY.items()}


def start(**settings):
    """A `Run` with a log that says nothing."""
    cfg = train_gpt.Config(**settings)
    return train_gpt.start_run(cfg, train_gpt.Dist({}), lambda event, **values: None)


@pytest.fixture(scope="module")
def tiny_bench():
    """A `Bench` of the tiny model on easy ceilings, without a loader."""
    run = start(**{**TINY, "train_batch_tokens": 512})
    rows = torch.randint(TINY["vocab_size"], (16, TINY["seq_len"] + 1))
    trainer = train_gpt.Trainer(run, None, 0.0, 100)
    return step_time.Bench(run, rows, trainer, step_time.Ceilings(1e9, 1e9), 1)


def call_main(monkeypatch, capsys, env, *args):
    """(exit code, stdout, stderr) of `main` under `env` alone."""
    for name in set(os.environ) - {"PATH", "HOME"}:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code = step_time.main(list(args))
    return code, *capsys.readouterr()


# ------------------------------------------------------------------------------------------------
# Counts
# ------------------------------------------------------------------------------------------------

def test_flops_of_the_default_model(monkeypatch):
    """The counts that the measuring protocol states: 296 MFLOP a token plain, 444 looped."""
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda weight, generator: weight)
    run = start()
    counts = [step_time.product_flops(step_time.products(run, looped))
              + step_time.attention_flops(run.cfg, looped) for looped in (False, True)]
    assert [round(count / 1e6) for count in counts] == [296, 444]
    assert counts == [train_gpt.flops_per_token(run.cfg, looped) for looped in (False, True)]


def test_products_are_all_matrices_and_the_head(tiny_bench):
    """Plain, products add up to the matrices and the embedding; looped, layers repeat."""
    run = tiny_bench.run
    params = sum(len(run.flat.part(run.flat.data, g)) for g in ("matrices", "embedding"))
    plain, looped = (step_time.products(run, flag) for flag in (False, True))
    assert step_time.product_flops(plain) == 6 * params
    assert [p.part for p in plain].count("head") == [p.part for p in looped].count("head") == 1
    layer = sum(p.O * p.I for p in plain[:-1]) // run.cfg.num_layers
    assert step_time.product_flops(looped) - step_time.product_flops(plain) == 6 * layer


def test_a_parallel_layer_moves_less(tiny_bench):
    """Layers from parallel_residual_start on save a norm's passes; own-value exclusion costs."""
    cfg = train_gpt.Config(**{**TINY, "xsa_last_n": 0})
    C, K = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
    serial, parallel = (step_time.layer_elements(cfg, i) for i in (1, 2))
    assert serial - parallel == 4 * C
    assert step_time.layer_elements(tiny_bench.run.cfg, 1) - serial == 5 * C + 3 * K


def test_no_layers_leave_embedding_and_head(tiny_bench):
    """`without_layers` takes effect in the model as it is, and ends."""
    model, tokens = tiny_bench.run.model, tiny_bench.rows[:1, :-1]
    with step_time.without_layers():
        inputs = model.matrix_inputs(tokens)
    assert [names for names, _ in inputs] == [("tok_emb",)]
    assert len(model.matrix_inputs(tokens)) > 1


def test_compiled_graphs_notice_missing_layers(tiny_bench):
    """A compiled model drops its layers too, and has them back afterwards."""
    model, tokens = tiny_bench.run.model, tiny_bench.rows[:2, :-1]
    compiled = torch.compile(model.features, dynamic=False, fullgraph=True, backend="eager")
    with torch.no_grad():
        whole = compiled(tokens, False)
        with step_time.without_layers():
            torch.testing.assert_close(compiled(tokens, False), model.features(tokens, False))
        torch.testing.assert_close(compiled(tokens, False), whole)


# ------------------------------------------------------------------------------------------------
# Times and tables
# ------------------------------------------------------------------------------------------------

class FakeEvent:
    """Stands in for torch.cuda.Event: its clock ticks once a record."""
    ticks = 0

    def __init__(self, enable_timing):
        """An event that can be timed."""
        assert enable_timing

    def record(self):
        """Remember the tick."""
        FakeEvent.ticks += 1
        self.at = FakeEvent.ticks

    def elapsed_time(self, end):
        """Ticks between two events."""
        return float(end.at - self.at)


def test_device_events_time_phases_and_turns(monkeypatch):
    """On a GPU events do the timing, and the device is waited for twice only."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    waits, calls = [], []
    dist = SimpleNamespace(on_cuda=True, wait=lambda: waits.append(len(calls)))
    phases = [lambda: calls.append(0), lambda: calls.append(1)]
    times = step_time.time_phases(dist, phases, 5)
    assert times == [1.0, 1.0, 2.0]
    assert waits == [2 * step_time.WARM_CALLS, 2 * (step_time.WARM_CALLS + 5)]


def test_parts_add_up_to_the_step(tiny_bench):
    """The rest is what the timed parts leave of train_step; every floor is positive."""
    shapes = {(p.O, p.I): 1.0 for p in step_time.products(tiny_bench.run, True)}
    shared = step_time.Shared(attention=2.0, products=shapes, ends=3.0, upkeep=0.5)
    phases = [100.0, 7.0, 1.0, 108.0]
    for looped, layers in ((False, 3), (True, 4)):
        parts = step_time.make_parts(tiny_bench, looped, shared, phases)
        ms = {p.name: p.ms for p in parts}
        assert sum(ms.values()) == pytest.approx(108.0)
        assert ms["attention kernel"] == 2.0 * layers
        assert ms["attention products"] == ms["MLP products"] == 2.0 * layers
        assert all(p.floor_ms > 0 for p in parts)


def test_floors_are_flops_and_bytes():
    """At 1 TFLOP/s and 1 GB/s, 2 GFLOP and 3 MB take 2 + 3 ms."""
    assert step_time.Ceilings(1e12, 1e9).floor_ms(2e9, 3e6) == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, kind", [
    ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_splitK_NTN", "matrix products"),
    ("triton_tem_fused_mm_3", "matrix products"),
    ("product_kernel", "matrix products"),
    ("heads_backward", "our kernels"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention kernel"),
    ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", "attention kernel"),
    ("triton_poi_fused__unsafe_view_leaky_relu_pow_9", "compiled pointwise"),
    ("triton_per_fused__scaled_dot_product_cudnn_attention_backward_add_4", "compiled reductions"),
    ("triton_red_fused_mul_sum_transpose_6", "compiled reductions"),
    ("Memcpy HtoD (Pinned -> Device)", "copies, zeroing"),
    ("void at::native::reduce_kernel<128, 4>", "other kernels")])
def test_kernels_have_classes(name, kind):
    """Names that an H200 showed, and a template's."""
    assert step_time.kernel_class(name) == kind


def made_up_trace(steps):
    """Events of steps of 100 us: 60 us of product, 20 of reduction, 5 of Muon, 1 of averaging."""
    marker = "void at::native::triu_tril_kernel<float>"
    phases = (
        (marker, 0, 1),
        ("nvjet_1", 1, 60),
        ("triton_red_2", 61, 20),
        (marker, 81, 1),
        ("nvjet_3", 82, 5),
        (marker, 87, 1),
        ("lerp", 98, 1))
    for step in range(steps):
        first = 1000.0 if step else 0.0         # the first step starts long before the others
        for name, at, lasts in phases:
            yield dict(ph="X", cat="kernel", name=name, ts=first + 100 * step + at, dur=lasts)
    yield dict(ph="X", cat="gpu_user_annotation", name="Optimizer.step", ts=0, dur=9999)
    yield dict(ph="M", name="process_name")
    yield dict(ph="X", cat="kernel", name="triu_tril_kernel", ts=1000 + 100 * steps, dur=1)


@pytest.fixture
def trace(tmp_path):
    """A made-up trace of four steps, as the profiler writes one."""
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(dict(traceEvents=list(made_up_trace(4))[::-1])))
    return step_time.read_trace(path)


def test_kernels_are_tallied_by_phase(trace):
    """Three steps count, a product of the optimiser is the optimiser's, gaps have an end."""
    tallied = step_time.tally_kernels(trace, 4)
    assert tallied.step_ms == pytest.approx(0.1)
    assert tallied.rows == {
        ("matrix products", "nvjet_1"): (pytest.approx(0.06), pytest.approx(1)),
        ("compiled reductions", "triton_red_2"): (pytest.approx(0.02), pytest.approx(1)),
        ("optimiser", "nvjet_3"): (pytest.approx(0.005), pytest.approx(1)),
        ("EMA", "lerp"): (pytest.approx(0.001), pytest.approx(1))}
    assert sum(ms for ms, _ in tallied.gaps) == pytest.approx(3 * 0.011)
    assert [name for _, name in tallied.gaps if name == "lerp"] == ["lerp"] * 3


def test_kernels_are_printed(trace):
    """Both tables name what was found, slowest first."""
    lines = step_time.kernel_lines("plain", step_time.tally_kernels(trace, 4), 4, top=2)
    text = "\n".join(lines)
    assert re.search(r"matrix products +0\.06 +1 +60\.0 %", text)
    assert "nvjet_1" in lines[-2] and "triton_red_2" in lines[-1]


def test_a_trace_without_markers_is_refused(trace):
    """No table is better than a wrong one."""
    with pytest.raises(train_gpt.GolfError, match="0 of 13 markers among 16 kernels"):
        step_time.tally_kernels([k for k in trace if "triu" not in k.name], 4)


def test_the_profiler_wraps_whole_steps(tiny_bench, monkeypatch, capsys):
    """The report runs as many steps as it says, a marker around each phase."""
    class Profile:
        """Stands in for torch.profiler.profile."""
        def __init__(self, activities):
            """Only what the device does is asked for."""
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            """Start."""
            return self

        def __exit__(self, *exception):
            """Stop."""

        def export_chrome_trace(self, path):
            """Write the made-up trace."""
            with open(path, "w") as file:
                json.dump(dict(traceEvents=list(made_up_trace(4))), file)

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    step_time.report_kernels(tiny_bench, "plain")
    assert "kernels, plain: mean of 3 steps" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------

def test_a_tiny_run(run_program, tmp_path):
    """Both graphs are timed part by part, from no data, and nothing is left behind."""
    env = {**TINY_ENV, "OUT_DIR": str(tmp_path), "DATA_DIR": "nowhere"}
    done = run_program(env, program=SCRIPT, args=("--steps", "2"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    assert re.match(r"CPU, torch \S+, attention math, medians of 2; settings: ", done.stdout)
    assert re.search(r"^ceilings: matrix product \S+ TFLOP/s, copy \S+ TB/s$", done.stdout, re.M)
    for graph in ("plain", "looped"):
        assert re.search(rf"^{graph}: \S+ ms a step, [\d,]+ tokens/s, \S+ MFLOP", done.stdout, re.M)
        table = done.stdout.split(f"{graph}, part by part\n")[1].split("\n\n")[0].splitlines()
        assert [re.split("  +", line)[0] for line in table[1:]] == [
            "attention kernel", "attention products", "MLP products", "embedding, head, loss",
            "gradient upkeep", "elementwise rest", "optimiser", "EMA", "whole step",
            "loader, host waits"]


@pytest.mark.parametrize("env, args, message", [
    (dict(SEQ_LEN="0"), (), "SEQ_LEN=0: must be more than 0"),
    (dict(SEQ_LENN="8"), (), "SEQ_LENN is not a setting; did you mean SEQ_LEN?"),
    (dict(WORLD_SIZE="2"), (), "WORLD_SIZE=2: times one device; start it without torchrun"),
    ({}, ("--steps", "0"), "--steps 0: must be 1 or more"),
    (dict(NUM_LOOPS="0"), ("--graph", "looped"),
     "--graph looped: NUM_LOOPS=0 leaves no layer to loop over"),
    ({}, ("--kernels",), "--kernels: only a GPU has kernels to profile")])
def test_bad_input_is_one_line(monkeypatch, capsys, env, args, message):
    """Exit code 2 and one line, before anything is timed."""
    found = call_main(monkeypatch, capsys, {**TINY_ENV, **env}, *args)
    assert found == (2, "", f"step_time: {message}\n")


def test_one_graph_in_this_process(monkeypatch, capsys):
    """--graph times only that one; a model without loops has no looped graph."""
    env = {**TINY_ENV, "NUM_LOOPS": "0", "TRAIN_BATCH_TOKENS": "64"}
    code, out, _ = call_main(monkeypatch, capsys, env, "--steps", "1")
    assert code == 0 and "plain, part by part" in out and "looped" not in out
    code, out, _ = call_main(monkeypatch, capsys, TINY_ENV, "--steps", "1", "--graph", "looped")
    assert code == 0 and "looped, part by part" in out and "plain" not in out
