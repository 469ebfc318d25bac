"""Ask an exported model a question, with transformers: python examples/ask.py FOLDER QUESTION.

In: a folder in Hugging Face format, and a text. Out: the model's most probable answer, on stdout. FOLDER is
<run directory>/exports/step_<N>/merged.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

END = "<|eot_id|>"  # of a message in Llama-3's chat template; the tokenizer of the tiny model has no token for it
LONGEST = 60  # tokens of an answer


def main(folder: str, question: str) -> None:
    """Print the answer."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}  # a Llama does not know token_type_ids
    made = model.generate(
        **given, do_sample=False, max_new_tokens=LONGEST, stop_strings=[END], tokenizer=tokenizer, pad_token_id=0
    )
    print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :]).partition(END)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
