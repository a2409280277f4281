"""train_gpt.py, Configuration: every setting has an effect, and every wrong one raises in one line.

Run alone: python -m pytest -q tests/test_config.py
"""
import ast
import errno
import math
import re
from dataclasses import asdict, fields, replace

import pytest
from conftest import PROGRAM, run_main

import train_gpt
from train_gpt import Config, ConfigError, config_from_env

DEFAULTS = asdict(Config())

# A good value other than the default, for fields that not every value suits.
OTHER = dict(
    flash_attn="0",
    recipe="demo", run_id="third-try_2.1", out_dir="elsewhere", stages="quantize,eval",
    data_dir="corpora", dataset="notes_sp8192", seq_len=1024, model_dim=1024,
    num_heads=16, num_kv_heads=2, rope_dims=32, num_loops=1, loop_start=2, loop_end=6,
    train_batch_tokens=393216, warmup_steps=2, eval_stride=32,
    ttt_chunk_tokens=65536, warmdown_frac=1.0)

# Environments with a value that cannot be used, and how the message begins.
MALFORMED = [
    *((dict(SEED=text), f"SEED={text!r}: expected a whole number")
      for text in ("", "x", "4.5", "1e3", "nan", "0x10", "9" * 5000)),
    *((dict(TTT_LR=text), f"TTT_LR={text!r}: expected a finite number")
      for text in ("", "x", "nan", "-inf", "1e999", "1,5")),
    *((dict(TTT_ENABLED=text), f"TTT_ENABLED={text!r}: expected 0 or 1")
      for text in ("", "2", "yes", "on", "1.0")),
    (dict(RECIPE="pr1867"), f"RECIPE=pr1867: must be one of {', '.join(train_gpt.RECIPES)}"),
    (dict(RECIPE=""), "RECIPE=: must be one of"),
]

# Settings of which one contradicts another or a range of its own, and how the message begins.
CONTRADICTIONS = [
    (dict(stages="eval,train"), "STAGES=eval,train"),
    (dict(stages="train,train"), "STAGES=train,train"),
    (dict(stages="train,score"), "STAGES=train,score"),
    (dict(stages=""), "STAGES="),
    (dict(dataset="10B_sp8192"), "DATASET=10B_sp8192"),
    (dict(dataset=""), "DATASET="),
    (dict(run_id="../other"), "RUN_ID=../other"),
    (dict(run_id="my run"), "RUN_ID=my run"),
    (dict(run_id=".."), "RUN_ID=.."),
    (dict(run_id="one\ntwo"), "RUN_ID=one\ntwo"),
    (dict(mlp_mult=0.001), "MLP_MULT=0.001: leaves no hidden channel at MODEL_DIM=512"),
    (dict(num_heads=7), "NUM_HEADS=7 does not divide MODEL_DIM=512"),
    (dict(num_kv_heads=3), "NUM_KV_HEADS=3 does not divide NUM_HEADS=8"),
    (dict(seq_len=2049), "EVAL_STRIDE=64 does not divide SEQ_LEN=2049"),
    (dict(train_batch_tokens=786433), "SEQ_LEN=2048 does not divide TRAIN_BATCH_TOKENS=786433"),
    (dict(ttt_chunk_tokens=2047), "SEQ_LEN=2048 does not divide TTT_CHUNK_TOKENS=2047"),
    (dict(rope_dims=15), "ROPE_DIMS=15: must be even"),
    (dict(rope_dims=66), "ROPE_DIMS=66: must be even and at most the head width 64"),
    (dict(smear_channels=513), "SMEAR_CHANNELS=513: must be at most MODEL_DIM=512"),
    (dict(head_gate_channels=64, model_dim=32), "HEAD_GATE_CHANNELS=64: must be at most MODEL_DIM"),
    (dict(loop_start=6), "LOOP_START=6, LOOP_END=5"),
    (dict(loop_end=11), "LOOP_START=3, LOOP_END=11: must be layers in order, the last at most 10"),
    (dict(warmup_steps=0), "WARMUP_STEPS=0: a run on the wall clock compiles and then times"),
    (dict(model_dim=10 ** 20), "MODEL_DIM=100000000000000000000: must be below"),
    (dict(matrix_lr=1e38), "MATRIX_LR=1e+38: must be below"),
]

# What torchrun, containers and shells put into the environment.
SURROUNDINGS = """
    LOCAL_RANK RANK GROUP_RANK ROLE_RANK ROLE_NAME LOCAL_WORLD_SIZE WORLD_SIZE GROUP_WORLD_SIZE
    ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS
    TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE OMP_NUM_THREADS
    TORCH_NCCL_ASYNC_ERROR_HANDLING HOSTNAME HOME PATH PWD OLDPWD SHLVL LANG LC_ALL TERM USER SHELL
    MAIL EDITOR DISPLAY TZ TMPDIR TEMP _ SSH_CONNECTION XDG_RUNTIME_DIR XDG_DATA_DIRS
    LD_LIBRARY_PATH PYTHONPATH PYTHONUNBUFFERED PYTHON_VERSION PYTHONHASHSEED VIRTUAL_ENV
    CONDA_PREFIX CUDA_VERSION CUDA_HOME CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES NCCL_VERSION
    NCCL_DEBUG PYTORCH_ALLOC_CONF PYTORCH_VERSION TORCH_HOME HF_HOME HF_DATASETS_CACHE WANDB_API_KEY
    MKL_NUM_THREADS SLURM_JOB_ID SLURM_PROCID RUNPOD_GPU_COUNT http_proxy no_proxy CI""".split()


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------

def other_value(name: str):
    """A valid value of a field that is not its default."""
    default = DEFAULTS[name]
    if name in OTHER:
        return OTHER[name]
    if type(default) is bool:
        return not default
    return (default / 2 or 0.5) if type(default) is float else default + 1


def error_of(env: dict) -> str:
    """The message of the ConfigError that an environment raises, by Config's own defaults."""
    with pytest.raises(ConfigError) as e:
        config_from_env({"RECIPE": "pr1876", **{name: str(v) for name, v in env.items()}})
    return str(e.value)


def read_attributes(source: str) -> set[str]:
    """Names that a program reads from a `Config`, except where it only checks their values."""
    tree = ast.parse(source)
    return {node.attr for top in tree.body if getattr(top, "name", "") != "find_problems"
            for node in ast.walk(top)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and ast.unparse(node.value).split(".")[-1] in ("cfg", "c")}


def comments() -> dict[str, str]:
    """The comment behind every field of `Config`."""
    body = PROGRAM.read_text().split("class Config:")[1].split("def __post_init__")[0]
    return dict(re.findall(r"^    (\w+): .*  # (.+)$", body, re.M))


# ------------------------------------------------------------------------------------------------
# What can be set
# ------------------------------------------------------------------------------------------------

def test_a_variable_sets_its_field_and_no_other():
    """The upper-case variable of a field changes that field only; the recipe changes its own."""
    assert config_from_env({"RECIPE": "pr1876"})[0] == Config(recipe="pr1876")
    assert config_from_env({})[0] == Config(**train_gpt.RECIPES["golf"])
    for name in set(DEFAULTS) - {"recipe"}:
        value = other_value(name)
        more = dict(ttt_chunk_tokens=48) if name == "ttt_documents" else {}     # of SGD: too long
        env = {key.upper(): str(v) for key, v in {name: value, **more}.items()}
        cfg, chosen = config_from_env({"RECIPE": "pr1876", **env})
        assert value != DEFAULTS[name] and chosen == ["recipe", name, *more]
        assert asdict(cfg) == {**DEFAULTS, "recipe": "pr1876", name: value, **more}
        assert type(getattr(cfg, name)) is type(DEFAULTS[name])


@pytest.mark.parametrize("text,value", [("1", True), ("True", True), ("0", False),
                                        ("FALSE", False)])
def test_booleans_are_spelled_either_way(text, value):
    """Booleans are 0, 1, true or false, in upper or lower case."""
    assert config_from_env({"TTT_ENABLED": text})[0].ttt_enabled is value


def test_environment_overrides_the_recipe():
    """A recipe sets its own values; a variable beats it; all other fields keep their defaults."""
    cfg, chosen = config_from_env({"RECIPE": "demo", "NUM_LAYERS": "5", "SEED": "7"})
    recipe = train_gpt.RECIPES["demo"]
    assert recipe["num_layers"] != 5 and recipe["model_dim"] != DEFAULTS["model_dim"]
    assert asdict(cfg) == {**DEFAULTS, **recipe, "recipe": "demo", "num_layers": 5, "seed": 7}
    assert sorted(chosen) == ["num_layers", "recipe", "seed"]


@pytest.mark.parametrize("name", train_gpt.RECIPES)
def test_recipes_are_valid_and_name_fields(name):
    """Every recipe is valid and made of known fields; that of Config's defaults is empty."""
    cfg, _ = config_from_env({"RECIPE": name})
    assert set(train_gpt.RECIPES[name]) <= set(DEFAULTS) - {"recipe"}
    assert train_gpt.RECIPES["pr1876"] == {}
    assert cfg.name == f"{name}_seed{cfg.seed}"


def test_paths_follow_from_the_settings():
    """Shards, tokenizer and output lie where prepare_data.py and the README say."""
    cfg = Config(data_dir="d", dataset="demo_sp1024", vocab_size=1024, out_dir="o", seed=3)
    assert str(cfg.dataset_dir) == "d/datasets/demo_sp1024"
    assert str(cfg.tokenizer_path) == "d/tokenizers/demo_1024_bpe.model"
    assert str(cfg.artifact_path) == "o/runs/golf_seed3/model.golf"
    assert str(replace(cfg, run_id="mine").checkpoint_path) == "o/runs/mine/checkpoint.golf"
    assert replace(cfg, dataset="fineweb10B_sp8192").corpus == "fineweb"


def test_groups_partition_the_fields():
    """The groups of the logged table hold every field once, in the order of the class."""
    grouped = [n for g in train_gpt.GROUPS.values() for n in Config().group(g)]
    assert grouped == list(DEFAULTS)
    assert Config(num_layers=12).group("model")["num_layers"] == 12


# ------------------------------------------------------------------------------------------------
# What raises
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("env,beginning", MALFORMED, ids=lambda x: str(x)[:40])
def test_malformed_values_raise(env, beginning):
    """The message begins with the variable and its value and names the kind of value needed."""
    assert error_of(env).startswith(beginning)


@pytest.mark.parametrize("settings,beginning", CONTRADICTIONS, ids=lambda x: str(x)[:40])
def test_contradictions_raise(settings, beginning):
    """Each rule over one or more settings begins with a variable at fault and its value."""
    assert error_of({n.upper(): v for n, v in settings.items()}).startswith(beginning)
    with pytest.raises(ConfigError):
        Config(**settings)                  # the same without an environment


def test_numbers_have_bounds():
    """A number below its least value, which is never negative, or from its bound on raises.

    The least value is declared; without one a number must be positive.  It is 0 where the help
    gives 0 a meaning, and it is a value itself, at most beside another setting's 0.
    """
    beside = dict(warmup_steps=dict(MAX_WALLCLOCK_SECONDS=0), loop_end=dict(LOOP_START=0))
    for f in (f for f in fields(Config) if f.type in (int, float)):
        name, (low, below) = f.name.upper(), map(f.metadata.get, ("low", "below"))
        wrong = [-1, 0 if low is None else low - 1] + [below] * math.isfinite(below or math.inf)
        for value in map(f.type, wrong):
            assert error_of({name: value}).startswith(f"{name}={value}: must be "), name
        assert low == 0 or not re.search(r"\b0 = ", comments()[f.name]), name
        if low is not None:
            env = {"RECIPE": "pr1876", name: low} | beside.get(f.name, {})
            assert getattr(config_from_env({n: str(v) for n, v in env.items()})[0], f.name) == low


@pytest.mark.parametrize("var,value,meant", [
    ("TTT_LRR", "0.1", "TTT_LR"), ("SEEDS", "1", "SEED"), ("MATRIX_L", "0.1", "MATRIX_LR"),
    ("ITERATION", "5", "ITERATIONS"), ("NUM_LAYER", "9", "NUM_LAYERS"), ("SEDE", "1", "SEED"),
    ("WALLCLOCK_MAX_SECONDS", "60", "MAX_WALLCLOCK_SECONDS"), ("DATASETS", "demo", "DATASET"),
    ("ENABLE_COMPILED", "0", "COMPILE_ENABLED"), ("MODEL_DIR", "64", "MODEL_DIM"),
    ("ttt_lr", "0.1", "TTT_LR"), ("Recipe", "demo", "RECIPE"), ("RESUMED", "1", "RESUME")])
def test_misspelt_settings_raise(var, value, meant):
    """A letter too few or too many, or words in another order: the message suggests the setting."""
    assert error_of({var: value}) == f"{var} is not a setting; did you mean {meant}?"


def test_surroundings_are_not_settings():
    """Variables of other programs change nothing, also a near name with another kind of value."""
    env = dict.fromkeys(SURROUNDINGS, "1") | dict(MODEL_DIR="/models", RESUMED="yes")
    assert config_from_env(env) == config_from_env({})


@pytest.mark.parametrize("var", train_gpt.FOREIGN)
def test_names_of_the_challenge_raise_with_their_setting(var):
    """A name that the challenge's scripts read would be ignored; the message names ours instead."""
    message = error_of({var: "1"})
    remedy = message.partition("use ")[2].split()[0].rstrip(",")
    assert message.startswith(f"{var} is not a setting here") and remedy.lower() in DEFAULTS


def test_ranks_must_share_the_batch_equally(cfg, quiet):
    """A world size that does not divide the sequences of a step raises, with both numbers."""
    dist = train_gpt.Dist({})
    dist.world = 3
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE=3 does not divide the 8 sequences"):
        train_gpt.build_run(cfg, dist, quiet)


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("env,args,message", [
    (dict(SEED="4.5"), (), "SEED='4.5': expected a whole number"),
    (dict(RUN_ID="one\ntwo"), (), "RUN_ID=one two: must be letters, digits and . _ - after the "
                                  "first"),
    ({}, ("--seed", "3"), "--seed: settings are environment variables; see --help")])
def test_a_wrong_setting_ends_the_program_in_one_line(
        monkeypatch, capsys, tmp_path, env, args, message):
    """Exit code 2, one line on stderr, nothing on stdout, nothing written."""
    done = run_main(monkeypatch, capsys, env | dict(OUT_DIR=tmp_path), *args)
    assert done == (2, "", f"train_gpt: {message}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error,printed", [
    (OSError(errno.ENOSPC, "no space", "disk"), "disk: no space"),
    (OSError(errno.EIO, "input/output"), "the console: input/output"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; lower"),
    (RuntimeError("Connection closed by peer"), "another rank has died")])
def test_failures_of_the_system_are_one_line(monkeypatch, capsys, error, printed):
    """An error of the machine ends the program in one line that names the file or the remedy."""
    def fail(*_):
        """Raise it."""
        raise error
    monkeypatch.setattr(train_gpt, "run_stages", fail)
    code, out, err = run_main(monkeypatch, capsys, {})
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"train_gpt: {printed}")


def test_help_lists_every_setting(monkeypatch, capsys):
    """--help prints each field with its default and the meaning that its comment gives."""
    code, out, err = run_main(monkeypatch, capsys, {}, "--help")
    lines = {line.split("=")[0].strip(): line for line in out.splitlines() if "=" in line}
    assert (code, err) == (0, "")
    for name, default in DEFAULTS.items():
        shown, _, meaning = lines[name.upper()].partition("=")[2].partition(" ")
        assert shown == str(default), name
        assert meaning.strip() == comments()[name] and len(meaning) > 10, name


def test_every_field_is_read_somewhere():
    """No setting is without effect: the program reads each field outside of its own checks."""
    source = PROGRAM.read_text()
    assert set(DEFAULTS) <= read_attributes(source)
    unread = source.replace("cfg.ttt_lr", "cfg.seed")
    assert "ttt_lr" not in read_attributes(unread), "the search finds what is not there"


def test_fields_are_typed():
    """Every field has a finite default of its declared type, so that 0 or False can mean off."""
    for f in fields(Config):
        assert type(f.default) is f.type and f.type in (bool, int, float, str), f.name
        assert f.type is not float or math.isfinite(f.default), f.name
