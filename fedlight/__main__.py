"""The command `fedlight VERB ...`, the same as python -m fedlight.VERB; and its completion in the shell."""

import sys
from importlib import import_module

from fedlight.runtime.environment import replace_unencodable

VERBS = {
    "run": "a cell, or with -m a sweep of them",
    "sweeps": "how the cells of a sweep stand; retry, cancel, sync",
    "report": "tables, figures and one page of sweeps",
    "sample": "images from a finished cell",
    "export": "a trained model for diffusers",
    "audit": "an attacker against a finished cell: what its models leak",
    "prepare": "data, classifier and references, for nodes without internet",
    "deploy": "a federation between institutions: init, check",
    "dashboard": "the panels of a project on Weights & Biases",
    "completion": 'for the shell, bash or zsh: eval "$(fedlight completion)"',
}
SCRIPT = """\
if [ -n "$ZSH_VERSION" ]; then
  whence compdef > /dev/null || { autoload -U compinit && compinit; }
  autoload -U +X bashcompinit && bashcompinit
fi
_fedlight() {
  local line="${COMP_LINE:0:$COMP_POINT}" words
  local word="${line##* }"
  case "$COMP_CWORD ${COMP_WORDS[1]}" in
    "1 "*) words="VERBS" ;;
    *" run" | *" prepare") words="OVERRIDES"; compopt -o nospace 2> /dev/null ;;
    *) COMPREPLY=(); return ;;  # the shell itself completes paths
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ -n "$ZSH_VERSION" ] || COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")  # bash replaces what follows
}
complete -o default -F _fedlight fedlight
"""


def main() -> None:
    """Exits as the verb does; with 2 for an unknown one."""
    replace_unencodable()
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(f"fedlight VERB ...\n\n{_listed()}\n\nfedlight VERB --help says more.")
    elif verb not in VERBS:
        print(f"fedlight: error: unknown verb {verb}; there are {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    elif verb == "completion":
        print(completion(), end="")
    else:
        sys.argv = [f"fedlight {verb}", *arguments]
        import_module(f"fedlight.{verb}").main()


def completion() -> str:
    """The shell's script: verbs, and after `run` keys and choices."""
    from fedlight.compose import ROOT
    from fedlight.manual import list_overrides

    return SCRIPT.replace("VERBS", " ".join(VERBS)).replace("OVERRIDES", " ".join(list_overrides(ROOT)))


def _listed() -> str:
    return "\n".join(f"  {verb:12} {meaning}" for verb, meaning in VERBS.items())


if __name__ == "__main__":
    main()
