"""Variants that change what chosen heads give, as interventions on a model do."""
