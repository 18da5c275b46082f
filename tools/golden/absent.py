"""What recorded files are of where llmnorm has no part: the words of the verdict `no part`."""

import fnmatch

WORDS: dict[str, str] = {
    "lightning/*": "lightning attention of MiniMax-01 (arXiv 2501.08313), linear attention with a "
    "fixed decay a head; llmnorm has no such mixer",
    "norm/evonorm*": "EvoNorm (arXiv 2004.02967), a norm and an activation in one layer; llmnorm "
    "has no such norm",
    "*ngpt*": "nGPT (arXiv 2410.01131), whose weights and hidden states have length 1; llmnorm has "
    "no such block",
    "statistics/balanced_momentum": "AdaB2N's batch norm with an adaptive momentum; llmnorm has no "
    "batch norm",
    "embedding/basis_transformation": "BT2 (arXiv 2211.03989), embeddings that stay comparable "
    "with an older model's; llmnorm trains no embeddings",
    "bytes/*": "exact byte-level probabilities of a token model (arXiv 2410.09303); llmnorm's "
    "generation has no byte level",
    "measure/calibration": "calibration errors as RankMixup measures them (arXiv 2308.11990); "
    "llmnorm has no such measure",
    "loss/rank_mixup": "RankMixup's losses (arXiv 2308.11990); llmnorm has no such objective",
    "contrastive/ccp": "contrastive context prediction (arXiv 2206.03281); llmnorm has no "
    "contrastive objective",
    "loss/contrastive_chunks": "a contrastive loss in chunks (GradCache; BASIC, arXiv 2111.10050); "
    "llmnorm has no contrastive objective",
    "retrieval/dual_bank": "dual bank normalisation (arXiv 2310.11612); llmnorm has no retrieval",
    "optimizer/gradient_variance_modulator": "AGVM (arXiv 2210.11078), learning rates by the "
    "variance of gradients; llmnorm has no such optimizer",
    "batch_size/norm_test": "AdAdaGrad's norm test (arXiv 2402.11215); llmnorm has no adaptive "
    "batch size",
    "quantization/*": "Outlier Suppression+ (arXiv 2304.09145); llmnorm has no quantised export",
    "quantize/*": "ZeroQ's quantisation (arXiv 2001.00281); llmnorm has no quantised export",
    "pruning/*": "sparsity a layer by FARMS exponents (arXiv 2506.06280); llmnorm measures the "
    "exponents and does not prune",
    "scaling/*": "fits of scaling laws (arXiv 2403.06563); llmnorm has no such analysis",
    "weights/standardized": "standardised weights (arXiv 1903.10520); llmnorm has no such linear "
    "layer",
    "sampled_linear/*": "WTA-CRS (arXiv 2305.15265), linear layers with a sampled backward pass; "
    "llmnorm has no such linear layer",
}


def no_part(kind: str) -> str:
    """What a kind that nothing serves is, and what llmnorm lacks for it."""
    found = (words for pattern, words in WORDS.items() if fnmatch.fnmatch(kind, pattern))
    return next(found, f"no function of tools/golden knows the kind {kind}")
