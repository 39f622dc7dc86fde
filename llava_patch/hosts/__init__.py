"""The host layer: where things are in a model, how images reach the decoder, and version differences."""
