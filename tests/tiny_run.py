"""What a user brings to train.py, small and of the real formats: a LLaMA folder, an open_clip file, packed MMUD."""

import json
import pickle
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent
MMUD = REPO / "tests" / "data" / "mmud"
CLIP = "ViT-S-32-alt"
"""The smallest of open_clip's own ViTs: 224 pixels, 7 x 7 patches, 12 layers 384 wide."""
LAYERS = 4


def texts() -> list[str]:
    """Captions and dialogues of the fixture's training split."""
    rows = pickle.loads((MMUD / "train.pkl").read_bytes())
    return [text for row in rows for text in (row[1], row[2])]


def llama_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer.json of LLaMA-2's kind: BPE over "▁" words, bytes for what is unknown, <s> in front."""
    special = ["<unk>", "<s>", "</s>"]
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    # LLaMA's words never cross a space; its tokenizer.json has no pre-tokenizer, so the corpus comes in words.
    trained.train_from_iterator([word for text in corpus for word in text.split()], trainer)
    found = trained.get_vocab()
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(found, key=found.__getitem__)
    # Older tokenizers write a pair as "a b".
    written = json.loads(trained.to_str())["model"]["merges"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in written]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = spaces
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama(folder: Path, seed: int = 0) -> Path:
    """A LLaMA of random weights in several safetensors files, with grouped queries and a tokenizer."""
    tokenizer = llama_tokenizer(texts())
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    return folder


def clip_file(path: Path) -> Path:
    """Random weights of CLIP, as a file that open_clip reads."""
    torch.manual_seed(0)
    model = open_clip.create_model(CLIP, pretrained=None)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, path)
    return path
