"""The command `fedlight VERB ...`, the same as `python -m fedlight.VERB ...`, and its shell completion."""

import sys
from importlib import import_module

from fedlight.runtime.environment import replace_unencodable

VERBS = {
    "run": "runs one cell, or with -m a sweep",
    "extend": "trains a finished cell longer, as a new cell",
    "sweeps": "shows the state of the cells of a sweep; retry, cancel, sync",
    "report": "writes tables, figures and one page on sweeps",
    "sample": "draws images from a finished cell",
    "export": "writes a trained model for diffusers",
    "audit": "attacks a finished cell, to measure what its models leak",
    "prepare": "downloads data and makes classifier and references, for nodes without internet",
    "deploy": "sets up a federation between institutions: init, check",
    "dashboard": "builds the panels of a project on Weights & Biases",
    "completion": 'prints the completion for bash or zsh: eval "$(fedlight completion)"',
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
    """Exits with the status of the verb, or with 2 for an unknown one."""
    replace_unencodable()
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(f"fedlight VERB ...\n\n{_list_verbs()}\n\nfedlight VERB --help lists the options of a verb.")
    elif verb not in VERBS:
        print(f"fedlight: error: unknown verb {verb}; there are {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    elif verb == "completion":
        print(completion(), end="")
    else:
        sys.argv = [f"fedlight {verb}", *arguments]
        import_module(f"fedlight.{verb}").main()


def completion() -> str:
    """The script for the shell: it completes verbs and, after `run` and `prepare`, keys and choices."""
    from fedlight.compose import ROOT
    from fedlight.manual import list_overrides

    return SCRIPT.replace("VERBS", " ".join(VERBS)).replace("OVERRIDES", " ".join(list_overrides(ROOT)))


def _list_verbs() -> str:
    return "\n".join(f"  {verb:12} {meaning}" for verb, meaning in VERBS.items())


if __name__ == "__main__":
    main()
