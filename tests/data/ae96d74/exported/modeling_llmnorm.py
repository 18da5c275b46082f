"""The classes of the installed package llmnorm (Auto classes, trust_remote_code)."""
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.encoders import LlmNormForMaskedLM, LlmNormForSequenceClassification
from llmnorm.models.modeling import LlmNormForCausalLM, LlmNormModel
