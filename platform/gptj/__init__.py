"""GPT-J in PyTorch: model, tokenizer, training and serving parts."""
