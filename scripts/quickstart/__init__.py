"""Everything `scripts/quickstart.sh` needs before llava_patch: a small LLaVA-1.5 that reads, and its data.

Modules, in the order they are used:
    render      images of digits in real fonts, crops of real photographs
    english     lines of real English text
    questions   what is asked about an image, and the right answer
    prompts     vicuna_v1 prompts as token ids
    tokenizer   a small sentencepiece tokenizer with vicuna's file set
    hub_files   contents of the configuration files of a LLaVA-1.5 release
    model       the small LLaVA-1.5 as one torch module, for training
    fileset     the files of a LLaVA-1.5 release, as the hub has them
    training    the two stages that teach it to read
    data        training data in LLaVA's JSON format, held-out test rows
    score       exact match on the held-out rows, for either host's model
    base        trains the model and writes all of it (`python -m quickstart.base OUT`)
    evaldata    local POPE and MME data for lmms-eval's stock tasks
    steps       runs steps, none of them for done that has not left what it was to leave
    table       the closing table
    measure     what it needs of one checkpoint
"""

import os

# torch reads this when it is first imported. Threads that spin while they wait make a small model fifty times slower as
# soon as another process wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
