"""The Step Law: learning rate and batch of AdamW from the sizes of model and data.

Source: Li et al. 2025, arXiv 2503.04715, fitted to models of 215M to 1.07B parameters (without
embedding and head), 4 to 100 billion tokens, beta2 .95, weight decay .1 and cosine schedules.

    lr = 1.79 N^-0.713 D^0.307        batch in tokens = 0.58 D^0.571

What would surprise: on its own data the best grid point is .78 to 1.71 times the law, and a rate
that is twice too high costs more than one twice too low; other rules' rates are multiples of
AdamW's at equal step size (`OptimizerSettings.adamw_lr`); below the law's batch B* the rate goes
with sqrt(B / B*), above it stays.
"""

FITTED = (0.2e9, 1.1e9)  # parameters
SMALLEST = 10_000_000


def learning_rate(parameters: float, tokens: float) -> float:
    """AdamW's peak learning rate at the law's batch."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def batch_tokens(tokens: float) -> float:
    """Tokens a step."""
    return float(0.58 * tokens**0.571)
