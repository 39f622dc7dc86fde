"""Which of the papers' claims hold on small models: planted effects first, then claims with their controls."""
