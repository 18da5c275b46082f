"""The Step Law: learning rate and batch of AdamW from the sizes of model and data.

Source: Li et al. 2025, arXiv 2503.04715, fitted to models of 215M to 1.07B parameters (without
embedding and head), 4 to 100 billion tokens, beta2 .95, weight decay .1 and cosine schedules.

    lr = 1.79 N^-0.713 D^0.307        batch in tokens = 0.58 D^0.571

with N parameters outside embedding and head, and D training tokens.

What would surprise:
- On the law's own data the best rate of a grid is .78 to 1.71 times the law's. A rate that is twice
  too high costs more than one that is twice too low.
- The rates of other rules are multiples of AdamW's at equal step size (`OptimizerSettings.adamw_lr`
  and `over_adamw`).
- Below the law's batch B* the rate is multiplied by sqrt(B / B*); above it the rate stays.
"""

FITTED = (0.2e9, 1.1e9)  # parameters of the models that the law was fitted to
SMALLEST = 10_000_000  # parameters; below this the law is not used at all


def learning_rate(parameters: float, tokens: float) -> float:
    """AdamW's peak learning rate at the law's batch."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def batch_tokens(tokens: float) -> float:
    """Tokens a step."""
    return float(0.58 * tokens**0.571)
