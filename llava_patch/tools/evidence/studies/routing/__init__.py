"""DPVR on chain reading: bases that read their image early and late, every variant, and what each arm must beat."""
