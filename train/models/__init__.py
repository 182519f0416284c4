"""The networks: tokenizer, predictors and task heads, as plain torch modules."""
