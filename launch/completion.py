"""`longcat completion SHELL`: a script that completes verbs, keys and choices, without starting Python at each TAB."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import get_type_hints

from longcat.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
FLAGS = ("--help", "--cfg", "--config-dir", "-m")
COMMANDS = {"data": ("build",), "checkpoint": ("list", "verify"), "completion": SHELLS, "plan": ("search",)}

BASH = """# longcat: completion for bash; load it with: source <(longcat completion bash)
_longcat() {{
    [[ -n $ZSH_VERSION ]] && setopt localoptions sh_word_split null_glob
    local line=${{COMP_LINE:0:COMP_POINT}} word verb
    word=${{line##*[[:space:]]}}
    set -- $line
    verb=$2
    local words found
    if (($# < 2)) || {{ (($# == 2)) && [[ -n $word ]]; }}; then
        words="{verbs} --help --version"
    else
        case $verb in
{commands}
            {keyed})
                words="{words}"
                for found in conf/*/*.yaml; do
                    [[ -e $found ]] || continue
                    found=${{found#conf/}} found=${{found%.yaml}}
                    words+=" ${{found%%/*}}=${{found##*/}}"
                done ;;
            *) COMPREPLY=($(compgen -f -- "$word")); return ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [[ ${{COMPREPLY[0]}} == *= && ${{#COMPREPLY[@]}} -eq 1 ]] && compopt -o nospace 2>/dev/null
    # Where the shell ends words at "=", it replaces only what follows it
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}="}}"); fi
}}
complete -o default -F _longcat longcat
"""
ZSH = """# longcat: completion for zsh; load it with: source <(longcat completion zsh)
autoload -U +X compinit && compinit -u
autoload -U +X bashcompinit && bashcompinit
"""
FISH = """# longcat: completion for fish; load it with: longcat completion fish | source
complete -c longcat -n __fish_use_subcommand -f -a "{verbs} --help --version"
complete -c longcat -n "__fish_seen_subcommand_from {keyed}" -f -a "{words}"
{commands}
"""


def script(shell: str, verbs: Iterable[str]) -> str:
    """The completion script of the program's ``verbs`` for ``shell``.

    Raises:
        ConfigError: another shell than bash, zsh or fish.
    """
    if shell not in SHELLS:
        raise ConfigError(f"{shell!r} has no completion here; say longcat completion {', '.join(SHELLS)}")
    names, words = " ".join(verbs), " ".join([*FLAGS, *values()])
    if shell == "fish":
        commands = "\n".join(
            f'complete -c longcat -n "__fish_seen_subcommand_from {verb}" -f -a "{" ".join(names)}"'
            for verb, names in COMMANDS.items()
        )
        return FISH.format(verbs=names, keyed="train plan check counts data", words=words, commands=commands)
    commands = "\n".join(
        f'            {verb}) words="{" ".join(names)}{" " + words if verb in ("data", "plan") else ""}" ;;'
        for verb, names in COMMANDS.items()
    )
    bash = BASH.format(verbs=names, keyed="train|check|counts", words=words, commands=commands)
    return bash if shell == "bash" else ZSH + bash


def values() -> list[str]:
    """`key=` for each key, and `key=choice` where the choices are known."""
    import configs
    from train.compose import GROUPS, leaf_keys
    from train.config import Config

    folder = Path(configs.__file__).parent
    found = [f"{group}={path.stem}" for group in GROUPS for path in sorted((folder / group).glob("*.yaml"))]
    for key in leaf_keys(Config):
        kind = kind_of(Config, key)
        if isinstance(kind, type) and issubclass(kind, Enum):
            found += [f"{key}={choice.value}" for choice in kind]
        elif kind is bool:
            found += [f"{key}=true", f"{key}=false"]
        else:
            found.append(f"{key}=")
    return found


def kind_of(tree: type, key: str) -> object:
    """The annotated type of a dotted key."""
    kind: object = tree
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind
