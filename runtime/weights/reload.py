"""Load an exported model with transformers, on the CPU and in float32, and use it as its users do.

In: a folder in Hugging Face format, or a base and the folder of an adapter. Out: logits, and a greedy completion.

transformers builds the model from the exported config.json and fills it from the exported files. A weight that is
missing, left over or of another shape is an error here; transformers only warns, and leaves random weights.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.job import memory
from runtime.job.errors import JobError

if TYPE_CHECKING:
    import torch

BYTES = 4  # of a weight in float32
ROOM = 1.25  # times the weights: one file of weights, activations
NEW_TOKENS = 12


class Reloaded:
    """A model that transformers has loaded."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        """JobError: transformers misses a weight, or finds one too many."""
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._folder = folder
        self._model, found = AutoModelForCausalLM.from_pretrained(
            str(folder), torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        if wrong := {key: sorted(map(str, names))[:5] for key, names in found.items() if names}:
            raise JobError(f"transformers does not load {folder} as it is: {wrong}", "please report this export")
        if adapter:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, str(adapter))
        self._model.eval()

    def logits(self, tokens: list[int]) -> "torch.Tensor":
        """Logits [tokens, vocabulary] of one sequence."""
        import torch

        with torch.no_grad():
            found: torch.Tensor = self._model(input_ids=torch.tensor([tokens])).logits[0]
        return found

    def complete(self, prompt: str) -> tuple[str, bool]:
        """The most probable continuation, and whether it is one token repeated to the end."""
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True)
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            made = self._model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                temperature=None, top_p=None, top_k=None, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        new = made[0, inputs["input_ids"].shape[1] :].tolist()
        return str(tokenizer.decode(new)), len(new) == NEW_TOKENS and len(set(new)) == 1


def missing(parameters: int, *packages: str) -> str:
    """Why a model of this size cannot be loaded here; "" if it can."""
    need, free = int(parameters * BYTES * ROOM), memory.available()
    if need > free:
        return f"loading it needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return next((f"{name} is not installed" for name in ("transformers", *packages) if not find_spec(name)), "")
