"""`llmnorm generate`: continue text with a run or a model directory."""

import argparse

from llmnorm.commands.arguments import add_checkpoint, add_import, add_model, text
from llmnorm.commands.configured import load_config

HELP = "continue text with a trained run or a model directory"
TAKES_SETTINGS = True
SECTION = "generation"


def arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_DIR, which weights, and the prompts."""
    add_model(parser)
    add_checkpoint(parser)
    add_import(parser)
    help = "text to continue; may be given several times"
    parser.add_argument("--prompt", type=text, action="append", help=help)
    parser.epilog = (
        "Settings of the sampling: generation.max_new_tokens=64, generation.temperature=0.8 (0: "
        "greedy), generation.top_k=50, generation.top_p=0.95, generation.seed=0."
    )


def run(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Print each prompt with its continuation."""
    from llmnorm.config.file import section
    from llmnorm.config.modules import import_modules
    from llmnorm.config.pretrained import describe, refuse_encoder

    import_modules(parsed.imports, "--import")
    path = parsed.path
    if (path / "config.yaml").is_file():
        config = load_config(path, overrides)
        settings = config.generation
        classes: list[str] | None = [config.objective.architecture]
    else:
        classes = describe(path, "generate").architectures
        settings = section("generation", overrides)
    refuse_encoder(classes, f"generate: {path}", "text is continued by")

    from llmnorm.exchange.loading import load_model
    from llmnorm.generation.sampling import generate

    model, tokenizer = load_model(path, checkpoint=parsed.checkpoint, ema=parsed.ema)
    texts = generate(model, tokenizer, parsed.prompt or [""], settings)
    for number, whole in enumerate(texts):
        print(whole if number == 0 else f"\n{whole}", flush=True)
