"""Checkpoints of the catalogue's other families, tiny and random, through NeMo's own importers of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONVERT = """
import sys
from pathlib import Path
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from runtime.engines.nemo import importer
from runtime.weights import random_llama
folder = Path(sys.argv[1])
shape = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)
for name, config, model in (("mistral", MistralConfig, MistralForCausalLM), ("qwen2", Qwen2Config, Qwen2ForCausalLM)):
    model(config(**shape)).save_pretrained(folder / name)
    random_llama.write_tokenizer(512, 256, folder / name)
    importer.import_directory(folder / name, folder / f"{name}_nemo", folder / "scratch")
"""


@pytest.mark.runtime
def test_a_mistral_and_a_qwen_are_converted(tmp_path):
    done = subprocess.run([sys.executable, "-c", CONVERT, tmp_path], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("mistral", "qwen2"):
        assert {path.name for path in (tmp_path / f"{name}_nemo").iterdir()} == {"context", "weights"}
        assert list((tmp_path / f"{name}_nemo/weights").glob("*.distcp"))
        assert (tmp_path / f"{name}_nemo/context/nemo_tokenizer/tokenizer.json").is_file()
