"""The Hugging Face classes; importing this registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.encoders import LlmNormForMaskedLM, LlmNormForSequenceClassification
from llmnorm.models.modeling import LlmNormForCausalLM, LlmNormModel

AutoConfig.register(LlmNormConfig.model_type, LlmNormConfig, exist_ok=True)
AutoModel.register(LlmNormConfig, LlmNormModel, exist_ok=True)
AutoModelForCausalLM.register(LlmNormConfig, LlmNormForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LlmNormConfig, LlmNormForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    LlmNormConfig, LlmNormForSequenceClassification, exist_ok=True
)
