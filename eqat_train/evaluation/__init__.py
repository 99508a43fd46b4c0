"""What a model is worth: perplexity of texts, whole or block by block, sample texts, and lm-eval's tasks."""
