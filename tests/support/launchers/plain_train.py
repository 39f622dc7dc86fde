"""Runs LLaVA's training script with the compatibility fixes alone: no start-up hook, nothing that patches.

The stock script cannot start on a current transformers without them, so this is what "without llava_patch" means there.
"""

import runpy
import sys

from llava_patch.core.undo import UndoStack
from llava_patch.hosts import llava_code

assert "llava_patch.integrations.startup" not in sys.modules
import llava.model.language_model.llava_llama as llava_llama  # noqa: E402
import transformers.trainer  # noqa: E402
from transformers.models.llama.tokenization_llama import LlamaTokenizer  # noqa: E402

llava_code.fix_trainer_exports(transformers.trainer, UndoStack())
import llava.train.llava_trainer as llava_trainer  # noqa: E402

llava_code.fix_trainer_methods(llava_trainer, UndoStack())
llava_code.fix_forward_arguments(llava_llama.LlavaLlamaForCausalLM, UndoStack())
llava_code.fix_llama_tokenizer(LlamaTokenizer, UndoStack())
llava_code.fix_argv(sys.argv)
stock = llava_llama.LlavaLlamaForCausalLM.from_pretrained.__func__


def from_pretrained(cls, *args, **kwargs):
    llava_code.full_precision(kwargs)
    return stock(cls, *args, **kwargs)


llava_llama.LlavaLlamaForCausalLM.from_pretrained = classmethod(from_pretrained)
script = sys.argv[1]
del sys.argv[0]
runpy.run_path(script, run_name="__main__")
