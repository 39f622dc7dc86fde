"""The speed table: every routing method and baseline beside the stock model, in one process."""
