"""flashmark inside other libraries: `huggingface` (transformers 5.x) and `flex` (FlexAttention)."""
