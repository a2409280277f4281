"""train_gpt.py, Configuration: every knob can be set, and every wrong setting is told in one line.

Run alone: python -m pytest -q tests/test_config.py
"""
import ast
import difflib
import errno
import math
import re
from dataclasses import asdict, fields, replace

import pytest
from conftest import PROGRAM, run_main

import train_gpt
from train_gpt import Config, ConfigError, config_from_env

DEFAULTS = asdict(Config())
NUMBERS = [n for n, v in DEFAULTS.items() if type(v) in (int, float)]
BOOLS = [n for n, v in DEFAULTS.items() if type(v) is bool]

# A good value other than the default, for fields that not every value suits.
OTHER = dict(
    recipe="demo", run_id="third-try_2.1", out_dir="/tmp/elsewhere", stages="quantize,eval",
    flash_attn="off", data_dir="corpora", dataset="notes_sp8192", loader="shuffled", seq_len=1024,
    model_dim=1024, num_heads=16, num_kv_heads=2, rope_dims=32, num_loops=1, loop_start=2,
    loop_end=6, train_batch_tokens=393216, warmup_steps=1, matrix_bits=5, embed_bits=7,
    eval_stride=32, ttt_chunk_tokens=65536, warmdown_frac=1.0, bigram_buckets=2)

# At least one example of every check in `checks` that compares fields or knows a range of its own:
# settings, and what the message must begin with.
WRONG = [
    (dict(matrix_lr=1e38), "MATRIX_LR=1e+38"),
    (dict(loader="random"), "LOADER=random"),
    (dict(bigram_buckets=1), "BIGRAM_BUCKETS=1"),
    (dict(flash_attn="5"), "FLASH_ATTN=5"),
    (dict(flash_attn=""), "FLASH_ATTN="),
    (dict(stages="eval,train"), "STAGES=eval,train"),
    (dict(stages="train,train"), "STAGES=train,train"),
    (dict(stages="train,score"), "STAGES=train,score"),
    (dict(stages=""), "STAGES="),
    (dict(dataset="10B_sp8192"), "DATASET=10B_sp8192"),
    (dict(dataset=""), "DATASET="),
    (dict(run_id="../other"), "RUN_ID=../other"),
    (dict(run_id="my run"), "RUN_ID=my run"),
    (dict(run_id=".."), "RUN_ID=.."),
    (dict(beta1=1.0), "BETA1=1.0"),
    (dict(beta2=1.5), "BETA2=1.5"),
    (dict(muon_momentum=1.0), "MUON_MOMENTUM=1.0"),
    (dict(muon_momentum_warmup_start=1.0), "MUON_MOMENTUM_WARMUP_START=1.0"),
    (dict(ttt_momentum=1.0), "TTT_MOMENTUM=1.0"),
    (dict(mlp_mult=0.001), "MLP_MULT=0.001"),
    (dict(mlp_mult=1e29), "MLP_MULT=1e+29"),
    (dict(model_dim=10 ** 20), "MODEL_DIM=100000000000000000000: must be at most 1099511627776"),
    (dict(num_heads=7), "NUM_HEADS=7"),
    (dict(num_kv_heads=3), "NUM_KV_HEADS=3"),
    (dict(seq_len=2049), "EVAL_STRIDE=64 does not divide SEQ_LEN=2049"),
    (dict(train_batch_tokens=786433), "SEQ_LEN=2048"),
    (dict(eval_stride=60), "EVAL_STRIDE=60"),
    (dict(ttt_chunk_tokens=2047), "SEQ_LEN=2048"),
    (dict(rope_dims=15), "ROPE_DIMS=15"),
    (dict(rope_dims=66), "ROPE_DIMS=66"),
    (dict(loop_start=6), "LOOP_START=6"),
    (dict(loop_end=11), "LOOP_START=3, LOOP_END=11"),
    (dict(warmup_steps=0), "WARMUP_STEPS=0"),
    (dict(matrix_bits=1), "MATRIX_BITS=1"),
    (dict(matrix_bits=9), "MATRIX_BITS=9"),
    (dict(embed_bits=1), "EMBED_BITS=1"),
    (dict(embed_bits=9), "EMBED_BITS=9"),
    (dict(logit_softcap=71.0), "LOGIT_SOFTCAP=71"),
    (dict(vocab_size=65537), "VOCAB_SIZE=65537"),
    (dict(warmdown_frac=1.01), "WARMDOWN_FRAC=1.01"),
]

TORCHRUN = """
    LOCAL_RANK RANK GROUP_RANK ROLE_RANK ROLE_NAME LOCAL_WORLD_SIZE WORLD_SIZE
    GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT
    TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE
    TORCHELASTIC_ERROR_FILE TORCHELASTIC_SIGNALS_TO_HANDLE TORCH_NCCL_ASYNC_ERROR_HANDLING
    OMP_NUM_THREADS""".split()
CONTAINER = """
    HOSTNAME HOME PATH PWD OLDPWD SHLVL LANG LC_ALL LANGUAGE TERM USER LOGNAME SHELL MAIL
    EDITOR DISPLAY TZ TMPDIR TEMP _ LS_COLORS LESSOPEN SSH_CONNECTION SSH_CLIENT SSH_TTY
    SSH_AUTH_SOCK XDG_RUNTIME_DIR XDG_DATA_DIRS XDG_SESSION_ID LD_LIBRARY_PATH LIBRARY_PATH
    LD_PRELOAD PYTHONPATH PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE PYTHON_VERSION
    PYTHON_SHA256 PYTHONHASHSEED PYTHONIOENCODING VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV
    PIP_NO_CACHE_DIR GPG_KEY DEBIAN_FRONTEND CUDA_VERSION CUDA_HOME CUDA_VISIBLE_DEVICES
    CUDA_MODULE_LOADING NVIDIA_VISIBLE_DEVICES NVIDIA_REQUIRE_CUDA NVIDIA_DRIVER_CAPABILITIES
    NV_CUDA_LIB_VERSION NVARCH NCCL_VERSION NCCL_DEBUG NCCL_IB_DISABLE NCCL_SOCKET_IFNAME
    PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_VERSION TORCH_CUDA_ARCH_LIST
    TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR TORCH_HOME TOKENIZERS_PARALLELISM HF_HOME
    HF_TOKEN HF_HUB_OFFLINE HF_DATASETS_CACHE HUGGING_FACE_HUB_TOKEN WANDB_API_KEY
    MKL_NUM_THREADS OPENBLAS_NUM_THREADS KUBERNETES_SERVICE_HOST KUBERNETES_PORT SLURM_JOB_ID
    SLURM_NTASKS SLURM_PROCID SLURM_NODELIST RUNPOD_POD_ID RUNPOD_GPU_COUNT RUNPOD_API_KEY
    AWS_DEFAULT_REGION http_proxy no_proxy HTTPS_PROXY CI GITHUB_RUN_ID GITHUB_ACTIONS
    PYTEST_CURRENT_TEST""".split()


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
    return default / 2 if type(default) is float and default else default + 1


def error_of(env: dict) -> str:
    """The message with which an environment is refused."""
    with pytest.raises(ConfigError) as e:
        config_from_env(env)
    return str(e.value)


def unchecked(**overrides) -> Config:
    """A `Config` with any values at all, made around its checks."""
    cfg = object.__new__(Config)
    for name, value in {**DEFAULTS, **overrides}.items():
        object.__setattr__(cfg, name, value)
    return cfg


def first_failure(cfg: Config) -> int | None:
    """Which check, counted from 0, is the first that refuses `cfg`."""
    return next((i for i, (wrong, _) in enumerate(train_gpt.checks(cfg)) if wrong), None)


def slips(name: str) -> set[str]:
    """A name with one letter left out, one doubled, or, where it is long enough, two swapped."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    slipped = {a + b[1:] for a, b in cuts if b} | {a + b[0] + b for a, b in cuts if b}
    if len(name) >= 7:                      # below, two swapped letters look like another word
        slipped |= {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return slipped - set(DEFAULTS)


def read_attributes(source: str) -> set[str]:
    """Names read from a Config (cfg.x, run.cfg.x, self.x inside Config), but for `checks`."""
    tree, found = ast.parse(source), set()
    for top in tree.body:
        owner = "self" if isinstance(top, ast.ClassDef) and top.name == "Config" else "cfg"
        if getattr(top, "name", "") != "checks":
            found |= {n.attr for n in ast.walk(top)
                      if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
                      and ast.unparse(n.value).split(".")[-1] == owner}
    return found


def comments() -> dict[str, str]:
    """The comment behind every field of `Config`."""
    body = PROGRAM.read_text().split("class Config:")[1].split("def __post_init__")[0]
    return dict(re.findall(r"^    (\w+): .*  # (.+)$", body, re.M))


# ------------------------------------------------------------------------------------------------
# What can be set
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", DEFAULTS)
def test_every_field_is_set_by_its_variable(name):
    """A field's upper-case variable changes this field and, unless it is the recipe, no other."""
    value = other_value(name)
    assert value != DEFAULTS[name]
    cfg, chosen = config_from_env({name.upper(): str(value)})
    assert chosen == [name]
    assert type(getattr(cfg, name)) is type(DEFAULTS[name])
    if name == "recipe":
        assert cfg.recipe == value
    else:
        assert asdict(cfg) == {**DEFAULTS, name: value}


@pytest.mark.parametrize("text,value", [("1", True), ("true", True), ("True", True), ("0", False),
                                        ("false", False), ("FALSE", False)])
def test_booleans_are_spelled_either_way(text, value):
    """0, 1, true and false mean what they say, in upper and lower case."""
    assert config_from_env({"TTT_ENABLED": text})[0].ttt_enabled is value


def test_no_variables_mean_the_defaults():
    """An empty environment gives the defaults, and nothing counts as chosen."""
    assert config_from_env({}) == (Config(), [])


def test_environment_overrides_the_recipe():
    """A recipe sets its own values; a variable beats it; what neither names keeps its default."""
    cfg, chosen = config_from_env({"RECIPE": "demo", "NUM_LAYERS": "5", "SEED": "7"})
    recipe = train_gpt.RECIPES["demo"]
    assert recipe["num_layers"] != 5 and recipe["model_dim"] != DEFAULTS["model_dim"]
    assert asdict(cfg) == {**DEFAULTS, **recipe, "recipe": "demo", "num_layers": 5, "seed": 7}
    assert sorted(chosen) == ["num_layers", "recipe", "seed"]


@pytest.mark.parametrize("name", train_gpt.RECIPES)
def test_recipes_are_valid_and_name_fields(name):
    """Every recipe is valid and made of known fields; the default one changes nothing."""
    cfg, _ = config_from_env({"RECIPE": name})
    assert set(train_gpt.RECIPES[name]) <= set(DEFAULTS) - {"recipe"}
    assert train_gpt.RECIPES[Config().recipe] == {}
    assert cfg.name == f"{name}_seed{cfg.seed}"


def test_surroundings_are_not_settings():
    """What torchrun and a usual container put into the environment is neither used nor refused."""
    env = {name: "1" for name in TORCHRUN + CONTAINER}
    assert config_from_env(env) == (Config(), [])


def test_paths_follow_from_the_settings():
    """Shards, tokenizer and output lie where prepare_data.py and the README say."""
    cfg = Config(data_dir="d", dataset="demo_sp1024", vocab_size=1024, out_dir="o", seed=3)
    assert str(cfg.dataset_dir) == "d/datasets/demo_sp1024"
    assert str(cfg.tokenizer_path) == "d/tokenizers/demo_1024_bpe.model"
    assert str(cfg.run_dir) == "o/runs/pr1876_seed3"
    assert str(replace(cfg, run_id="mine").run_dir) == "o/runs/mine"
    assert replace(cfg, dataset="fineweb10B_sp8192").corpus == "fineweb"


def test_groups_partition_the_fields():
    """The groups of the logged table hold every field once, in the order of the class."""
    grouped = [n for g in train_gpt.GROUPS.values() for n in Config().group(g)]
    assert grouped == list(DEFAULTS)
    assert Config(num_layers=12).group("model")["num_layers"] == 12


# ------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NUMBERS)
def test_bad_numbers_are_refused_by_name(name):
    """Words, nothing, NaN, infinities, and fractions for whole numbers name the variable."""
    bad = ["x", "", "nan", "inf", "-inf", "1e999", "1,5", "0x10", "None"]
    for text in bad + (["4.5", "1e3"] if type(DEFAULTS[name]) is int else []):
        message = error_of({name.upper(): text})
        assert message.startswith(f"{name.upper()}={text!r}: expected "), (text, message)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_by_name(name):
    """No number may be negative, and 0 is refused unless the field is among those that may be 0."""
    low = ["-1"] if name in train_gpt.MAY_BE_ZERO else ["-1", "0"]
    for text in low:
        assert error_of({name.upper(): text}).startswith(f"{name.upper()}={text}"), text


@pytest.mark.parametrize("name", train_gpt.MAY_BE_ZERO)
def test_zero_is_a_value_where_it_says_so(name):
    """Where 0 is a value it passes, alone or beside what a cross-field rule asks for."""
    beside = dict(warmup_steps="MAX_WALLCLOCK_SECONDS", loop_end="LOOP_START").get(name)
    env = {name.upper(): "0"} | ({beside: "0"} if beside else {})
    assert getattr(config_from_env(env)[0], name) == 0


def test_zero_is_a_value_where_a_comment_gives_it_meaning():
    """Every field whose comment says what 0 means can be 0."""
    meant = {name for name, comment in comments().items() if re.search(r"\b0: ", comment)}
    assert meant <= set(train_gpt.MAY_BE_ZERO) and len(meant) >= 8


@pytest.mark.parametrize("name", BOOLS)
def test_bad_booleans_are_refused_by_name(name):
    """Anything but 0, 1, true, false is refused, with the variable and what is needed."""
    for text in ("2", "yes", "on", "", "None", "1.0"):
        assert error_of({name.upper(): text}) == f"{name.upper()}={text!r}: expected 0 or 1"


@pytest.mark.parametrize("wrong,beginning", WRONG, ids=[b for _, b in WRONG])
def test_contradictions_are_refused_by_name(wrong, beginning):
    """Each rule over one or more settings is told with the variable and its value first."""
    message = error_of({n.upper(): str(v) for n, v in wrong.items()})
    assert message.startswith(beginning)
    with pytest.raises(ConfigError):
        Config(**wrong)                     # the same without an environment


def test_every_check_has_an_example():
    """No rule in `checks` is without a setting in this file that it is the first to refuse."""
    examples = [w for w, _ in WRONG] + [{n: -1} for n in NUMBERS] + [
        {n: type(DEFAULTS[n])(1e31)} for n in NUMBERS]
    seen = {first_failure(unchecked(**e)) for e in examples}
    assert None not in seen, "an example breaks no rule"
    assert seen == set(range(len(list(train_gpt.checks(Config())))))


@pytest.mark.parametrize("name", DEFAULTS)
def test_misspelt_variables_are_refused(name):
    """A letter left out or doubled, or two swapped in a longer name: refused with a suggestion."""
    for slip in slips(name):
        message = error_of({slip.upper(): "1"})
        meant = message.split("did you mean ")[1].rstrip("?")
        closeness = [difflib.SequenceMatcher(None, slip, n).ratio() for n in (meant.lower(), name)]
        assert message.startswith(f"{slip.upper()} is not a setting")
        assert closeness[0] >= closeness[1], f"{slip}: {meant} is suggested, {name} is nearer"


@pytest.mark.parametrize("name", DEFAULTS)
def test_lower_case_variables_are_refused(name):
    """A setting in lower case would have no effect, so it is refused with the right spelling."""
    message = error_of({name: str(other_value(name))})
    assert message == f"{name} is not a setting; did you mean {name.upper()}?"


def test_unknown_recipe_is_refused_with_the_known_ones():
    """The message names the variable, its value and every recipe there is."""
    message = error_of({"RECIPE": "pr1867"})
    assert message.startswith("RECIPE=pr1867: ")
    assert all(name in message for name in train_gpt.RECIPES)


def test_ranks_must_share_the_batch_equally(cfg, quiet):
    """A world size that does not divide the sequences of a step is refused, with both numbers."""
    dist = train_gpt.Dist({})
    dist.world = 3
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE=3 does not divide the 8 sequences"):
        train_gpt.start_run(cfg, dist, quiet)


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("env,args,message", [
    (dict(TTT_LR="nan"), (), "train_gpt: TTT_LR='nan': expected a finite number"),
    (dict(SEED="4.5"), (), "train_gpt: SEED='4.5': expected a whole number"),
    (dict(TTT_LRR="1"), (), "train_gpt: TTT_LRR is not a setting; did you mean TTT_LR?"),
    (dict(NUM_HEADS="7"), (), "train_gpt: NUM_HEADS=7 does not divide MODEL_DIM=512"),
    ({}, ("--seed", "3"), "train_gpt: --seed: settings are environment variables; see --help"),
])
def test_main_tells_the_problem_in_one_line(monkeypatch, capsys, env, args, message):
    """A user's mistake prints one line on stderr, nothing on stdout, and returns 2."""
    assert run_main(monkeypatch, capsys, env, *args) == (2, "", message + "\n")


@pytest.mark.parametrize("error,told", [
    (OSError(errno.ENOMEM, "no memory"), f"[Errno {errno.ENOMEM}] no memory"),
    (OSError("odd"), "odd"), (OSError(errno.EIO, "input/output", "disk"), "disk: input/output")])
def test_main_tells_what_the_system_refuses(monkeypatch, capsys, error, told):
    """An error of the system's is told with the file that it is about, where it names one."""
    def refuse(*_):
        """What some call deep in a library may do."""
        raise error
    monkeypatch.setattr(train_gpt, "run_stages", refuse)
    assert run_main(monkeypatch, capsys, {}) == (2, "", f"train_gpt: {told}\n")


def test_a_wrong_setting_ends_a_real_process(run_program, tmp_path):
    """Exit code 2, one line on stderr, silence on stdout, nothing written."""
    done = run_program(dict(RECIPE="pr1867", OUT_DIR=str(tmp_path)), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"train_gpt: {error_of({'RECIPE': 'pr1867'})}\n"
    assert not list(tmp_path.iterdir())


def test_help_lists_every_setting(run_program):
    """--help prints each field with its default and the meaning that its comment gives."""
    done = run_program({}, args=["--help"])
    lines = {line.split("=")[0].strip(): line for line in done.stdout.splitlines() if "=" in line}
    assert (done.returncode, done.stderr) == (0, "")
    for name, default in DEFAULTS.items():
        shown, _, meaning = lines[name.upper()].partition("=")[2].partition(" ")
        assert shown == str(default), name
        assert meaning.strip() == comments()[name] and len(meaning) > 10, name


def test_every_field_is_read_somewhere():
    """No knob is without effect: each field is read by the program, outside of its own checks."""
    source = PROGRAM.read_text()
    assert set(DEFAULTS) <= read_attributes(source)
    unread = source.replace("cfg.ttt_lr", "0.005")
    assert "ttt_lr" not in read_attributes(unread), "the search finds what is not there"


def test_fields_are_typed_and_explained():
    """Every field has a finite default of its declared type, so that 0 or False can mean off."""
    for f in fields(Config):
        assert type(f.default) is f.type and f.type in (bool, int, float, str), f.name
        assert f.type is not float or math.isfinite(f.default), f.name
