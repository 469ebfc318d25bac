"""Names for messages. In: keys of a plan. Out: words."""

ENGINES = {"nemo": "NeMo", "megatron_bridge": "Megatron-Bridge"}
