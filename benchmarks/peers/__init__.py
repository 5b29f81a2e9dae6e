"""W1 and W2 on other fine-tuning tools. See ../README.md."""
