# shellcheck shell=bash
# Sourced by the launchers: which Python, which words are flags of vit_dist.train, how commands are shown.
# shellcheck disable=SC2034  # the launchers read PYTHON, DRY_RUN, TAKEN and CHECKOUT

TRAIN_FLAGS=()
DRY_RUN=

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
CHECKOUT=$PWD
if [[ -z ${PYTHON:-} ]]; then
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# The comment at the top of a launcher is its help.
show_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "launch/${0##*/}"
  exit 0
}

# show_help_if_asked WORD...: shows the help if --help is among the launcher's own options, before any --.
show_help_if_asked() {
  local word
  for word; do
    case "$word" in
      -h | --help) show_help ;;
      --) return 0 ;;
    esac
  done
}

# need_value OPTION VALUE...: the first word has to be followed by one.
need_value() {
  [[ $# -ge 2 && $2 != --* ]] || fail "$1 needs a value"
}

# Moves the leading flag of vit_dist.train from the arguments to TRAIN_FLAGS; TAKEN counts its words.
# Only --config* and --workdir are known here: anything else that looks like an option might be a
# misspelt one of the launcher's, so it has to stand after --.
take_train_flag() {
  TAKEN=1
  case "$1" in
    --)
      TAKEN=$#
      TRAIN_FLAGS+=("${@:2}")
      ;;
    --config | --workdir)
      need_value "$@"
      TAKEN=2
      TRAIN_FLAGS+=("$1" "$2")
      ;;
    --config=* | --config.* | --workdir=*) TRAIN_FLAGS+=("$1") ;;
    -[!0-9]*) fail "unknown option '$1' (see --help); flags of vit_dist.train other than --config* and --workdir stand after --" ;;
    *)
      [[ ${#TRAIN_FLAGS[@]} -gt 0 ]] || fail "unexpected '$1' (see --help)"
      TRAIN_FLAGS+=("$1")  # the value of a --config.some.key
      ;;
  esac
}

# has_train_flag NAME: whether TRAIN_FLAGS sets it, as --name value or --name=value.
has_train_flag() {
  local word
  for word in ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}; do
    [[ $word == "$1" || $word == "$1="* ]] && return 0
  done
  return 1
}

# train_flag NAME: the value that TRAIN_FLAGS gives it, the last one if there are several.
train_flag() {
  local i value=
  for i in ${TRAIN_FLAGS[@]+"${!TRAIN_FLAGS[@]}"}; do
    case "${TRAIN_FLAGS[i]}" in
      "$1") value=${TRAIN_FLAGS[i + 1]-} ;;
      "$1="*) value=${TRAIN_FLAGS[i]#*=} ;;
    esac
  done
  echo "$value"
}

# Without these two vit_dist.train cannot begin; --flagfile may hold them.
need_train_flags() {
  local name
  for name in --config --workdir; do
    has_train_flag "$name" || has_train_flag --flagfile || fail "$name is missing: give --config FILE and --workdir DIR (see --help)"
  done
}

# set_by_launcher NAME VALUE REASON: adds a flag, behind --config, where ml_collections wants it.
set_by_launcher() {
  ! has_train_flag "$1" || fail "$1 is set by $3: leave one of them out"
  TRAIN_FLAGS+=("$1=$2")
}

# quoted WORD...: one line that a shell reads back as these words.
quoted() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}
