"""Every adapter, with settings that suit models of a few numbers."""

from llmnorm.config.adapter import DoraSettings, LoraSettings, LowRankSettings

ADAPTERS: dict[str, LowRankSettings] = {
    "lora": LoraSettings(rank=4, alpha=8),
    "rslora": LoraSettings(rank=4, alpha=8, rslora=True, targets=["q_proj", "down_proj"]),
    "dora": DoraSettings(rank=4, alpha=8),
}
