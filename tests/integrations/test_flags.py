"""Flags, environment and the import hook, without a training run."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llava_patch import SkipLinks
from llava_patch.core.errors import SettingError
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import compat, llava_code
from llava_patch.integrations import import_hook as autostart
from llava_patch.integrations import startup
from llava_patch.settings import active


def test_our_flags_leave_the_command_line():
    argv = ["train.py", "--lr", "1", "--gin_file", "a.gin", "--gin_param=X.y = z", "--gin_file=b.gin", "--bf16", "True"]
    assert active.take_flags(argv) == (["a.gin", "b.gin"], ["X.y = z"])
    assert argv == ["train.py", "--lr", "1", "--bf16", "True"]


def test_a_flag_without_a_value():
    with pytest.raises(SettingError, match="--gin_file needs a value"):
        active.take_flags(["train.py", "--gin_file"])


def test_environment_takes_several(monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_GIN_FILE", "dpvr_lf_7b.gin; skiplinks_7b.gin")
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Routing.split = 20;SkipLinks.stride = 4")
    read = active.configuration()
    assert (read.routing.split, read.fusion) == (20, SkipLinks(stride=4))


def test_nothing_configured_is_none():
    assert active.configuration() is None


def test_a_configuration_that_turns_nothing_on_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "empty.gin").write_text("# nothing\n")
    monkeypatch.setenv("LLAVA_PATCH_GIN_FILE", str(tmp_path / "empty.gin"))
    with pytest.raises(SettingError, match="configures nothing"):
        active.configuration()


def test_renamed_flags():
    from transformers import TrainingArguments

    argv = ["--evaluation_strategy", "no", "--evaluation-strategy=no", "--learning_rate=1", "--layer", "-2"]
    before = list(argv)
    llava_code.fix_argv(argv)
    if "evaluation_strategy" in TrainingArguments.__dataclass_fields__:  # the name up to 4.45
        assert argv == before
    else:
        assert argv == ["--eval_strategy", "no", "--eval_strategy", "no", "--learning_rate=1", "--layer", "-2"]


FSDP = ["--fsdp", "full_shard auto_wrap"]
LAYER = ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]


@pytest.mark.parametrize(
    ("argv", "config"),
    [
        (FSDP, '{"version": 1}'),
        ([*FSDP, *LAYER], '{"version": 1, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'),
        ([*FSDP, "--fsdp_config", "own.json"], None),
        (["--fsdp="], None),
    ],
)
def test_fsdp_of_llavas_scripts_stays_fsdp(argv, config):
    """Its layers are in --fsdp_config from transformers 5.0 on, where --fsdp alone became FSDP2 later."""
    from transformers import TrainingArguments

    words = list(argv)
    llava_code.fix_argv(words)
    if config is None or LAYER[0][2:] in TrainingArguments.__dataclass_fields__:
        assert words == argv
    else:
        assert words == [*FSDP, "--fsdp_config", config]


def test_llava_takes_the_length_of_what_fsdp_says():
    assert len(llava_code.fsdp_options(True)) == 1  # from transformers 5.10 on
    assert [llava_code.fsdp_options(given) for given in (None, "", [], ["full_shard"])] == [
        None,
        "",
        [],
        ["full_shard"],
    ]


def test_llavas_optimizer_is_of_the_model_that_fsdp_hands_over():
    class LLaVATrainer:
        model, is_deepspeed_enabled = "its own", False

        def create_optimizer(self):
            return self.model

    with UndoStack() as undo:
        llava_code.fix_optimizer_groups(SimpleNamespace(LLaVATrainer=LLaVATrainer), undo)
        trainer = LLaVATrainer()
        assert trainer.create_optimizer("wrapped") == "wrapped"
        assert trainer.create_optimizer() == trainer.model == "its own"


@pytest.mark.parametrize("argv", [[], ["train.py"], ["train.py", "--bf16"], ["--bf16", "True"]])
def test_other_words_stay(argv):
    words = list(argv)
    llava_code.fix_argv(words)
    assert words == argv


def _arguments(*flags):
    from transformers import HfArgumentParser, TrainingArguments

    argv = ["train.py", "--output_dir", "out", "--report_to", "none", *flags]
    llava_code.fix_argv(argv)
    return HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(argv[1:])[0]


@pytest.mark.parametrize(
    ("flags", "share", "steps"),
    [
        ("--warmup_ratio 0.03", 0.03, None),
        ("--warmup_ratio=0.03 --warmup_steps 0", 0.03, None),  # 0 steps are none given
        ("--warmup_ratio 1", 1, None),
        ("--warmup_ratio 0", 0, None),
        ("--warmup_ratio 0.1 --warmup-ratio 0.03", 0.03, None),
        ("--warmup_steps 5 --warmup_ratio 0.03", None, 5),  # the ratio never counted beside steps
        ("--warmup_ratio 0.03 --warmup_steps 5", None, 5),
    ],
)
def test_a_warm_up_is_as_long_as_its_flags_have_always_said(flags, share, steps):
    from transformers import TrainingArguments

    if "evaluation_strategy" in TrainingArguments.__dataclass_fields__:
        flags = flags.replace("warmup-ratio", "warmup_ratio")  # dashes are taken since about then
    parsed = _arguments("--use_cpu", "True", *flags.split())
    for total in (1, 2, 100, 101, 5198, 3 * 2**20 + 1):
        assert parsed.get_warmup_steps(total) == (math.ceil(total * share) if steps is None else steps)


def test_flags_that_say_it_by_another_name_now():
    for flags in (["--no_cuda"], ["--no_cuda", "True"], ["--no_cuda=True"]):
        parsed = _arguments(*flags)
        assert parsed.device.type == "cpu" and parsed.n_gpu == 0
    grouped = [["--group_by_length"], ["--group_by_length", "yes"], ["--group_by_length=False"]]
    found = [_arguments("--use_cpu", "True", *flags) for flags in grouped]
    now = [getattr(one, "group_by_length", getattr(one, "train_sampling_strategy", None)) for one in found]
    assert now in ([True, True, False], ["group_by_length", "group_by_length", "random"])


def test_versions_outside_the_range_are_refused(monkeypatch):
    import transformers

    from llava_patch.core.errors import HostError

    for version in ("4.36.2", "5.25.0", "6.0.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        with pytest.raises(HostError, match=rf"transformers {version} is outside the supported range"):
            compat.check_versions()


def _python(code, **env):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def test_the_hook_is_lazy():
    heavy = "('torch', 'transformers', 'gin')"
    code = f"import sys, llava_patch; print([m for m in sys.modules if m.split('.')[0] in {heavy}])"
    assert _python(code).stdout.strip() == "[]"


def test_the_hook_can_be_switched_off():
    code = "import sys, llava_patch.integrations.import_hook as a; print(a.installed())"
    assert _python(code).stdout.strip() == "True"
    assert _python(code, LLAVA_PATCH_DISABLE="1").stdout.strip() == "False"


def test_watched_modules_have_a_handler():
    assert set(startup._HANDLERS) == autostart.WATCHED


def test_the_hook_serves_modules_that_are_already_loaded():
    code = (
        "import os, sys; os.environ.pop('LLAVA_PATCH_DISABLE')\n"
        "import transformers.modeling_utils as m; before = m.PreTrainedModel.from_pretrained.__func__\n"
        "import llava_patch\n"
        "print(m.PreTrainedModel.from_pretrained.__func__.__wrapped__ is before)"
    )
    assert _python(code, LLAVA_PATCH_DISABLE="1").stdout.splitlines()[-1] == "True"


def test_other_models_load_through_the_wrapper_unchanged(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert "_llava_patch_handle" not in vars(model)
