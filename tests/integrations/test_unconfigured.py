"""With nothing configured the hosts stay as they are: on any version, with any `llava`, whatever a handler meets."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from llava_patch import FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError, SettingError
from llava_patch.hosts import compat
from llava_patch.integrations import startup
from tests.support.models import IMAGE, Host, needs_hf
from tests.support.release import write_fileset
from tests.support.tiny_train import TEXT, VISION

COMPAT = ("caches", "features", "layers", "masks", "names", "positions", "versions", "vision")
NOT_SUPPORTED = ("90.1", "91")

# Everything that a stock training script makes the hook's handlers do, short of training.
STOCK_SCRIPT = """
import sys
import llava.train.train
from llava.model import LlavaLlamaForCausalLM
from llava.train.llava_trainer import LLaVATrainer
from transformers import TrainingArguments
model = LlavaLlamaForCausalLM.from_pretrained(sys.argv[1])
trainer = LLaVATrainer(model, args=TrainingArguments(sys.argv[2], use_cpu=True, report_to="none"))
for key, value in {"mm_projector_lr": None, "group_by_modality_length": False}.items():
    setattr(trainer.args, key, value)
trainer.create_optimizer()
print("LOADED", *sorted(name for name in sys.modules if name.startswith("llava_patch")))
"""
STOCK_HF_SCRIPT = """
import sys
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
Trainer(model, args=TrainingArguments(sys.argv[2], use_cpu=True, report_to="none")).create_optimizer()
print("LOADED", *sorted(name for name in sys.modules if name.startswith("llava_patch")))
"""
LIGHT = {
    "llava_patch",
    "llava_patch.core",
    "llava_patch.core.compiled",
    "llava_patch.core.errors",
    "llava_patch.core.hub",
    "llava_patch.core.records",
    "llava_patch.core.registry",
    "llava_patch.core.stored",
    "llava_patch.core.undo",
    "llava_patch.core.version",
    "llava_patch.hosts",
    "llava_patch.hosts.compat",
    "llava_patch.hosts.llava_code",
    "llava_patch.hosts.towers",
    "llava_patch.hosts.towers.layout",
    "llava_patch.hosts.towers.llava",
    "llava_patch.hosts.towers.models",
    "llava_patch.hosts.zero",
    "llava_patch.integrations",
    "llava_patch.integrations.import_hook",
    "llava_patch.integrations.loading",
    "llava_patch.integrations.startup",
    "llava_patch.settings",
    "llava_patch.settings.active",
}
"""What may be loaded without anything to patch: none of it imports a name that only some versions have."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_fileset(tmp_path_factory.mktemp("set"), vision=VISION, text=TEXT, vocab_size=512)


def _run(code, *arguments, **environment):
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("host, script", [("hf", STOCK_HF_SCRIPT), ("llava", STOCK_SCRIPT)], ids=["hf", "llava"])
def test_a_stock_script_loads_nothing_that_patches(host, script, files, tmp_path):
    if host == "hf":
        needs_hf()
    done = _run(script, getattr(files, host), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "llava_patch:" not in done.stderr  # no handler has failed
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert "llava_patch.integrations.startup" in loaded  # the hook was there
    loaded -= {f"llava_patch.hosts.compat.{part}" for part in COMPAT}
    assert loaded <= LIGHT, loaded - LIGHT


def test_on_a_version_out_of_range_a_stock_script_is_as_without_the_package():
    code = (
        "from llava_patch.hosts import compat\n"
        f"compat.versions.SUPPORTED_TRANSFORMERS = {NOT_SUPPORTED}\n"
        "import llava.train.train"
    )
    here, without = _run(code), _run(code, LLAVA_PATCH_DISABLE="1")
    assert here.returncode == without.returncode
    if without.returncode:  # unmended, a transformers newer than LLaVA's own lacks a name
        assert here.stdout == without.stdout
        assert here.stderr.splitlines()[-1] == without.stderr.splitlines()[-1]
        assert "ALL_LAYERNORM_LAYERS" in without.stderr
    asked = _run(code, LLAVA_PATCH_GIN_PARAM="SkipLinks.stride = 4")
    assert asked.returncode == 1
    assert "outside the supported range >=90.1,<91" in asked.stderr.splitlines()[-1]


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("name", ["hf", "llava"])
def test_on_a_version_out_of_range_stock_models_load_and_patched_ones_are_refused(
    name, form, files, tmp_path, monkeypatch
):
    from llava.model import LlavaLlamaForCausalLM
    from transformers import LlavaForConditionalGeneration

    if name == "hf":
        needs_hf()
    cls, stock = (LlavaForConditionalGeneration, files.hf) if name == "hf" else (LlavaLlamaForCausalLM, files.llava)
    model = cls.from_pretrained(stock)
    handle = patch(model, fusion=SkipLinks(stride=2)) if name == "hf" else patch(model, pruning=FastV(2, 0.5))
    if form == "adapter":
        handle.save(tmp_path / "llava-patched")
    else:
        model.save_pretrained(tmp_path / "llava-patched")
    weights = {n: t.clone() for n, t in cls.from_pretrained(stock).state_dict().items()}

    monkeypatch.setattr(compat.versions, "SUPPORTED_TRANSFORMERS", NOT_SUPPORTED)
    again = cls.from_pretrained(stock)
    assert "forward" not in vars(again)
    assert all(torch.equal(t, weights[n]) for n, t in again.state_dict().items())
    with pytest.raises(HostError, match=r"llava-patched carries a patch, which cannot be applied: transformers 4"):
        cls.from_pretrained(tmp_path / "llava-patched")
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Routing.split = 3")
    with pytest.raises(HostError, match=r"outside the supported range >=90\.1,<91"):
        cls.from_pretrained(stock)


def test_patching_by_hand_out_of_range_names_the_version(monkeypatch, tower_folder):
    from tests.support import models

    monkeypatch.setattr(compat.versions, "SUPPORTED_TRANSFORMERS", NOT_SUPPORTED)
    with pytest.raises(HostError, match="outside the supported range"):
        patch(models.hf_model(), routing=Routing(split=3))


def test_modules_that_every_version_loads_import_no_name_that_only_some_have():
    """What patches may be imported on any transformers, so that `patch` can say which versions it needs."""
    code = """
import transformers.cache_utils, transformers.utils.generic
for module, name in ((transformers.cache_utils, "DynamicLayer"), (transformers.utils.generic, "is_timm_config_dict")):
    vars(module).pop(name, None)
import llava_patch
assert llava_patch.patch and llava_patch.load and llava_patch.Saturation and llava_patch.RProbe
import llava_patch.tools.inspect.read, llava_patch.tools.report.build, llava_patch.cli.main
import llava_patch.integrations.training.llava
"""
    done = _run(code)
    assert done.returncode == 0, done.stderr[-2000:]


def _handler_that_fails_halfway(owner):
    def handler(module, undo):
        undo.set_attribute(module, "greet", lambda: "patched")
        undo.set_attribute(module.Model, "forward", lambda self: "patched")
        undo.set_attribute(module.Model, "added", 1)
        raise AttributeError("module 'llava' has no attribute 'LlavaMetaModel'")

    return handler


def _host_module():
    module = types.ModuleType("llava.model.llava_arch")
    module.Model = type("Model", (), {"forward": lambda self: "stock", "load": classmethod(lambda cls: "stock")})
    module.greet = lambda: "stock"
    return module


def test_a_handler_that_fails_leaves_the_host_alone_and_says_so_once(monkeypatch, capsys):
    module = _host_module()
    before = dict(vars(module)), dict(vars(module.Model))
    monkeypatch.setitem(startup._HANDLERS, module.__name__, _handler_that_fails_halfway(module))
    startup.on_import(module.__name__, module)
    assert (dict(vars(module)), dict(vars(module.Model))) == before
    assert module.greet() == module.Model().forward() == "stock"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("llava_patch: llava.model.llava_arch is not as llava_patch knows it (AttributeError: ")
    assert line.endswith("stays as it is; nothing is configured")


def test_a_handler_that_fails_stops_what_is_configured(monkeypatch):
    module = _host_module()
    monkeypatch.setitem(startup._HANDLERS, module.__name__, _handler_that_fails_halfway(module))
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Routing.split = 3")
    with pytest.raises(HostError, match=r"so what is configured cannot be applied: see `llava-patch doctor`"):
        startup.on_import(module.__name__, module)
    assert module.greet() == "stock"


def test_our_own_errors_come_through_a_handler(monkeypatch):
    module = _host_module()

    def handler(module, undo):
        undo.set_attribute(module, "greet", None)
        raise SettingError("Routing.split = 99")

    monkeypatch.setitem(startup._HANDLERS, module.__name__, handler)
    with pytest.raises(SettingError, match=r"Routing\.split = 99"):
        startup.on_import(module.__name__, module)
    assert module.greet() == "stock"


# --- a `llava` that brings its own vision towers, as LLaVA-NeXT's does ------------------------------------------------

OTHER_LLAVA = {
    "__init__.py": "",
    "model/__init__.py": "",
    "model/multimodal_encoder/__init__.py": "",
    "model/multimodal_encoder/clip_encoder.py": "",
    "model/multimodal_encoder/siglip_encoder.py": "class SigLipVisionTower:\n    image_size = 384\n",
    "model/multimodal_encoder/builder.py": """
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionTower
def build_vision_tower(cfg, **kwargs):
    return SigLipVisionTower()
""",
    "model/llava_arch.py": """
from llava.model.multimodal_encoder.builder import build_vision_tower
class LlavaMetaModel:
    def initialize_vision_modules(self, model_args, fsdp=None):
        return build_vision_tower(model_args)
""",
    "model/language_model/__init__.py": "",
    "model/language_model/llava_llama.py": """
import llava.model.llava_arch
class LlavaLlamaForCausalLM:
    def forward(self, input_ids, cache_position=None):
        return input_ids
""",
    "train/__init__.py": "",
    "train/llava_trainer.py": """
from transformers import Trainer
class LLaVATrainer(Trainer):
    def _get_train_sampler(self):
        return None
    def _save_checkpoint(self, model, trial, metrics=None):
        return None
    def create_optimizer(self):
        return None
""",
}
OTHER_SCRIPT = """
import sys
import llava.model.language_model.llava_llama as llama, llava.model.llava_arch as arch
import llava.model.multimodal_encoder.builder as builder
import llava.train.llava_trainer
forward = llama.LlavaLlamaForCausalLM.forward
print(arch.build_vision_tower is builder.build_vision_tower, hasattr(forward, "__wrapped__"))
class Arguments:
    pretrain_mm_mlp_adapter, mm_vision_tower = None, sys.argv[1]
print(type(arch.LlavaMetaModel().initialize_vision_modules(Arguments)).__module__)
"""


def test_a_package_with_towers_of_its_own_keeps_them_and_its_forwards(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    for name, text in OTHER_LLAVA.items():
        path = tmp_path / "other" / "llava" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tower = tmp_path / "siglip"
    SiglipVisionModel(
        SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(tower)
    path = os.pathsep.join(filter(None, [str(tmp_path / "other"), os.environ.get("PYTHONPATH")]))
    done = _run(OTHER_SCRIPT, tower, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ["True False", "llava.model.multimodal_encoder.siglip_encoder"]


def test_the_original_package_still_gets_the_towers_that_it_refuses(tower_folder):
    import llava.model.multimodal_encoder.builder as builder

    from tests.support import models

    assert not compat.brings_towers(builder)
    host = Host("llava", models.llava_model(tower_folder))  # and its forward the argument that generate passes
    batch = host.batch([(2, IMAGE, 3)]).inputs
    assert host.model(**batch, cache_position=None).logits.shape[0] == 1


def test_a_fork_with_files_of_its_own_is_mended_too(tmp_path):
    """What makes a mend necessary is the code that it mends, not what else a package holds."""
    import llava

    shutil.copytree(Path(llava.__file__).parent, tmp_path / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "llava" / "model" / "multimodal_encoder" / "utils.py").write_text("")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    code = "import llava.train.train, llava; print(llava.__file__)"
    done = _run(code, PYTHONPATH=path)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr[-1000:]


def test_another_module_called_llava_changes_nothing(files, tmp_path):
    needs_hf()
    (tmp_path / "llava.py").write_text("")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    code = (
        "import sys, llava\nfrom transformers import LlavaForConditionalGeneration as L\n"
        "L.from_pretrained(sys.argv[1]); print(llava.__file__)"
    )
    done = _run(code, files.hf, PYTHONPATH=path)
    assert done.returncode == 0 and "llava.py" in done.stdout, done.stderr[-1000:]
    assert "llava_patch:" not in done.stderr


@pytest.mark.parametrize("asked", ["Routing.split = 1", "RProbe.lr = 0.01", ""])
def test_another_kind_of_model_is_loaded_without_what_is_configured_and_that_is_said(
    asked, tmp_path, monkeypatch, capsys
):
    import transformers

    if not hasattr(transformers, "Mistral3Config"):
        pytest.skip("this transformers has no Mistral3, which is a model of images that llava_patch does not know")
    from transformers import CLIPVisionModel, LlamaConfig, Mistral3Config, Mistral3ForConditionalGeneration

    from tests.support import models

    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 64, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Mistral3Config(vision_config=vision, text_config=LlamaConfig(**models.TEXT))
    Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path / "other")
    CLIPVisionModel(models.vision_config()).save_pretrained(tmp_path / "tower")
    capsys.readouterr()
    if asked:
        monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", asked)
    CLIPVisionModel.from_pretrained(tmp_path / "tower")
    Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "other")
    Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "other")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llava_patch:")]
    if "Routing" not in asked:
        assert not said
    else:
        [line] = said
        assert line.startswith("llava_patch: Mistral3ForConditionalGeneration is not a model that llava_patch knows")
        assert "Routing(" in line


@pytest.mark.parametrize("kind", ["AutoModel", "LlavaModel"])
def test_a_patched_checkpoint_is_not_loaded_as_a_bare_stock_model(kind, files, tmp_path, monkeypatch):
    import transformers
    from transformers import LlavaForConditionalGeneration

    needs_hf()
    cls = getattr(transformers, kind)
    assert cls.from_pretrained(files.hf) is not None
    model = LlavaForConditionalGeneration.from_pretrained(files.hf)
    patch(model, routing=Routing(split=3))
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(
        HostError, match=r"full carries a patch, which LlavaModel would be loaded without: load it with"
    ):
        cls.from_pretrained(tmp_path / "full")
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Routing.split = 3")
    with pytest.raises(HostError, match=r"Routing\(.*is configured, which LlavaModel would be loaded without"):
        cls.from_pretrained(files.hf)


def test_flags_that_a_script_of_ones_own_leaves_in_its_arguments_count(files, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    from llava_patch import get_handle

    needs_hf()
    monkeypatch.setattr(sys, "argv", ["own.py", "--own", "1", "--gin_param", "Routing.split = 3"])
    assert get_handle(LlavaForConditionalGeneration.from_pretrained(files.hf)).routing == Routing(split=3)
    assert sys.argv == ["own.py", "--own", "1"]
