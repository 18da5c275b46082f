"""Completion scripts for bash and zsh: commands, options, files and the keys of overrides."""

import argparse

from llmnorm.config.docs import key_paths

BASH = """\
_llmnorm() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --help --version --completion" -- "$word"))
        return
    fi
    case "$word" in
        -*) COMPREPLY=($(compgen -W "{options}" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word") $(compgen -W "{keys}" -- "$word")) ;;
    esac
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -F _llmnorm llmnorm"""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script for a shell, to be read by `source <(llmnorm --completion bash)`.

    Args:
        shell: "bash" or "zsh".
        parser: of all commands.
    """
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    options = {o for p in commands.choices.values() for o in p._option_string_actions}
    body = BASH.format(
        commands=" ".join(commands.choices),
        options=" ".join(sorted(options)),
        keys=" ".join(f"{key}=" for key in key_paths()),
    )
    if shell == "zsh":
        return f"autoload -U +X bashcompinit && bashcompinit\n{body}"
    return body
