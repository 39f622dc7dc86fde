"""What a forward pass costs, from a model's sizes alone: closed form for the stock model and every variant."""
