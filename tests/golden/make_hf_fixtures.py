"""Make ``tests/golden/hf``: tiny models of transformers, with what they compute.

    pip install '.[hf-test]' && python -m tests.golden.make_hf_fixtures

(Without constraints.txt: torch wants an older mpmath than it pins.)

Each model is saved as transformers saves it, its ``config.json`` in ``configs.json`` under
its name; ``expected.safetensors`` holds inputs and float32 logits, named MODEL/KEY. Weights
are random everywhere: at their start, biases of 0 and scales of 1 would hide mistakes.
Written with transformers 5.24.0 and torch 2.13.0.
"""

import json
import pathlib
import shutil
import tempfile

import torch
import transformers as hf
from safetensors.torch import save_file

HOME = pathlib.Path(__file__).parent / "hf"


def gpt2(vocab, length, layers, width, heads):
    config = hf.GPT2Config(
        vocab_size=vocab, n_positions=length, n_layer=layers, n_embd=width,
        n_head=heads, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def llama(vocab, layers, width, heads, kv_heads, hidden, base, epsilon, tied):
    config = hf.LlamaConfig(
        vocab_size=vocab, num_hidden_layers=layers, hidden_size=width,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=hidden, rms_norm_eps=epsilon, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def vit(classes, image, patch, layers, width, heads, hidden):
    config = hf.ViTConfig(
        num_labels=classes, image_size=image, patch_size=patch,
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=hidden,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def encoder(kind, config, vocab, rows, layers, width, heads, hidden, **rest):
    return kind(
        config(
            vocab_size=vocab, max_position_embeddings=rows, num_hidden_layers=layers,
            hidden_size=width, num_attention_heads=heads, intermediate_size=hidden,
            **rest,
        )
    )  # fmt: skip


BERT, ROBERTA = hf.BertConfig, hf.RobertaConfig
MODELS = {
    "gpt2_a": lambda: gpt2(17, 12, 2, 16, 2),
    "gpt2_b": lambda: gpt2(29, 7, 3, 18, 3),
    "llama_a": lambda: llama(17, 2, 16, 4, 2, 20, 1e4, 1e-6, False),
    "llama_b": lambda: llama(23, 3, 24, 4, 1, 16, 5e5, 1e-5, True),
    "vit_a": lambda: vit(3, 8, 4, 2, 16, 2, 24),
    "vit_b": lambda: vit(5, 6, 2, 3, 24, 3, 20),
    "bert_class": lambda: encoder(
        hf.BertForSequenceClassification, BERT, 17, 12, 2, 16, 2, 24, num_labels=3
    ),
    "bert_token": lambda: encoder(hf.BertForMaskedLM, BERT, 29, 9, 3, 24, 4, 20),
    "roberta_class": lambda: encoder(
        hf.RobertaForSequenceClassification, ROBERTA, 17, 14, 2, 16, 4, 24,
        type_vocab_size=1, layer_norm_eps=1e-5, num_labels=2,
    ),
    "roberta_token": lambda: encoder(
        hf.RobertaForMaskedLM, ROBERTA, 29, 11, 3, 24, 2, 20, type_vocab_size=1,
        layer_norm_eps=1e-5,
    ),
}  # fmt: skip
LENGTHS = {"gpt2_a": 12, "gpt2_b": 5, "llama_a": 9, "llama_b": 6, "bert_class": 10,
           "bert_token": 9, "roberta_class": 12, "roberta_token": 8}  # fmt: skip


def inputs(name, model):
    if name.startswith("vit"):
        size = model.config.image_size
        return {"pixel_values": torch.randn(3, 3, size, size)}
    shape = (3, LENGTHS[name])
    tokens = torch.randint(3, model.config.vocab_size, shape)
    if name.startswith(("gpt2", "llama")):
        return {"input_ids": tokens}
    lengths = torch.tensor([shape[1], 3, shape[1] - 2])
    mask = torch.arange(shape[1])[None] < lengths[:, None]
    tokens = torch.where(mask, tokens, model.config.pad_token_id)
    given = {"input_ids": tokens, "attention_mask": mask.long()}
    if name.startswith("bert"):
        given["token_type_ids"] = torch.randint(0, 2, shape)
    return given


def main():
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    expected, configs = {}, {}
    for seed, (name, build) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = build().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        given = inputs(name, model)
        with torch.no_grad():
            logits = model(**given).logits
        expected |= {f"{name}/{key}": value for key, value in given.items()}
        expected[f"{name}/logits"] = logits.float()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = pathlib.Path(folder)
            shutil.copy(saved / "model.safetensors", HOME / f"{name}.safetensors")
            configs[name] = json.loads((saved / "config.json").read_text())
            print(name, configs[name]["model_type"])
    small = {
        key: value.to(torch.int32) if value.dtype == torch.int64 else value
        for key, value in expected.items()
    }
    save_file(small, HOME / "expected.safetensors")
    (HOME / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")
    for file in HOME.iterdir():
        file.chmod(0o644)
    print(sum(file.stat().st_size for file in HOME.iterdir()), "bytes")


if __name__ == "__main__":
    main()
